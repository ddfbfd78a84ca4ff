"""Methods' scores of a run, cached by content."""

from __future__ import annotations

import hashlib
import inspect
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training import evaluation_points, full_runs
from fimo.further_training.identity import describe_problem
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.plan import Plan
from fimo.store import Store, read_tensors, write_tensors

log = logging.getLogger(__name__)


def applicable(
    methods: Mapping[str, AttributionMethod], final_model: FinalModel, train: Instances
) -> tuple[dict[str, AttributionMethod], dict[str, str]]:
    """Split methods into those that can run here, and the reasons of those that can't.

    Args:
        final_model: trained or not; only its structure matters.

    Raises:
        InputError: none can.
    """
    skipped = {
        name: reason
        for name, method in methods.items()
        if (reason := method.inapplicable(final_model, train)) is not None
    }
    kept = {name: method for name, method in methods.items() if name not in skipped}
    if not kept:
        raise InputError("method", "; ".join(f"{n} does not apply: {r}" for n, r in skipped.items()))
    return kept, skipped


def score(
    name: str,
    method: AttributionMethod,
    final_model: FinalModel,
    data: InstancesModule,
    plan: Plan,
    config: DictConfig,
    store: Store,
    cost: Cost,
) -> dict[str, Tensor]:
    """Return a method's ``scores`` ``[J, L]`` or ``[E, J, L]`` on the CPU (and ``sem`` where it gives one).

    A group's score is the sum of its members' scores.

    Args:
        final_model: on the device to use.
        cost: gets the gradient evaluations, and what was reused.
    """
    key = {
        "method": OmegaConf.to_container(config.methods[name], resolve=True),
        "source": source_hash(method),
        **_described(final_model, data, plan),
        "left_out": plan.left_out,
    }
    if method.follows_further_training:
        points = evaluation_points(plan.protocol, len(data.train))[0]
        key |= {
            "protocol": plan.protocol.key(),
            "steps": list(map(int, points)),
            "seeds": plan.followed * method.follows_seeds,
        }
    folder = store.folder("scores", key)
    path = folder / "scores.safetensors"
    with FileLock(folder / "lock"):
        if path.exists():
            cost.recall(folder)
            return read_tensors(path)
        tensors = _compute(method, final_model, data, plan, config, store)
        cost.gradient_evaluations = method.gradient_evaluations
        write_tensors(path, tensors)
        cost.keep(folder)
    return tensors


def _described(final_model: FinalModel, data: InstancesModule, plan: Plan) -> dict[str, Any]:
    """Return :func:`describe_problem`'s description, made once for all methods of a run.

    Hashing a network of 110 million parameters takes a second. The last description is used again while model
    and data are the same objects, with the same tensors, none of them changed in place.
    """
    tensors = [*final_model.state().values(), *data.train.tensors().values(), *data.test.tensors().values()]
    now = (tuple(plan.test), [(t.data_ptr(), t._version, t.shape) for t in tensors])
    same = _last is not None and _last.final_model() is final_model and _last.data() is data
    if not same or _last is None or _last.state != now:
        found = describe_problem(final_model, data.train, data.test[plan.test])
        globals()["_last"] = _Described(weakref.ref(final_model), weakref.ref(data), now, found)
        return found
    return _last.description


@dataclass(frozen=True)
class _Described:
    final_model: weakref.ref[FinalModel]
    data: weakref.ref[InstancesModule]
    state: tuple[Any, ...]
    description: dict[str, Any]


_last: _Described | None = None


def source_hash(method: AttributionMethod) -> str:
    """Return a hash of the module that defines a method, so that an edited method is another one."""
    module = inspect.getmodule(type(method))
    try:
        return hashlib.sha256(inspect.getsource(module or type(method)).encode()).hexdigest()[:24]
    except (OSError, TypeError):  # defined in a session without files
        return ""


def _compute(
    method: AttributionMethod,
    final_model: FinalModel,
    data: InstancesModule,
    plan: Plan,
    config: DictConfig,
    store: Store,
) -> dict[str, Tensor]:
    device = next(iter(final_model.parameters().values())).device
    train, test = data.train.to(device), data.test[plan.test].to(device)
    groups = [list(u) if isinstance(u, list) else [u] for u in plan.left_out]
    members = sorted({i for group in groups for i in group})
    position = {i: k for k, i in enumerate(members)}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # methods that draw do so alike in any run
        found = method.attribute(
            final_model,
            train,
            test,
            torch.tensor(members, device=device),
            further_training(final_model, train, plan, store),
        )
    membership = torch.zeros(len(members), len(groups), dtype=found.dtype)
    for column, group in enumerate(groups):
        membership[[position[i] for i in group], column] = 1
    tensors = {"scores": found.cpu() @ membership}
    sem = getattr(method, "score_sem", None)
    if sem is not None:
        tensors["sem"] = (sem.cpu().square() @ membership).sqrt()
    if not torch.isfinite(tensors["scores"]).all():
        log.warning("%s gave scores that are not finite", type(method).__name__)
    return tensors


def further_training(final_model: FinalModel, train: Instances, plan: Plan, store: Store) -> FurtherTraining:
    """Return what a method that follows further training is handed; runs nothing yet."""
    steps = tuple(int(s) for s in evaluation_points(plan.protocol, len(train))[0])
    return FurtherTraining(
        plan.protocol,
        steps,
        tuple(plan.followed),
        lambda: full_runs(
            final_model, train, plan.protocol, plan.followed, store=store, device=train.targets.device
        ),
    )
