"""Methods' scores of a run, cached by content."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fimo.cost import Cost
from fimo.engine.leave_out import make_rule
from fimo.engine.replicas import Unit
from fimo.errors import InputError
from fimo.further_training import evaluation_points, full_runs
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.applicability import why_not
from fimo.methods.base import AttributionMethod
from fimo.methods.following import FollowingMethod
from fimo.store.description import Indescribable
from fimo.store.files import Store, read_tensors, write_tensors
from fimo.store.fingerprint import Key, Problem, kept, scores_key
from fimo.validation import choices

if TYPE_CHECKING:  # no code of these is in the scores, whose key holds the source of what is imported here
    from fimo.app.plan import Plan
    from fimo.data.datamodule import InstancesModule
    from fimo.data.instances import Instances
    from fimo.engine.protocol import Protocol
    from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)


def applicable(
    methods: Mapping[str, AttributionMethod], final_model: FinalModel, train: Instances, protocol: Protocol
) -> tuple[dict[str, AttributionMethod], dict[str, str]]:
    """Split methods into those that can run here, and the reasons of those that can't.

    Args:
        final_model: trained or not; only its structure matters.
        protocol: of further training.

    Raises:
        InputError: none can.
    """
    skipped = {
        name: reason
        for name, method in methods.items()
        if (reason := why_not(method, final_model, train, protocol)) is not None
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
    problem: Problem | Indescribable,
) -> dict[str, Tensor]:
    """Return a method's ``scores`` ``[J, L]`` or ``[E, J, L]`` on the CPU (and :func:`bars_of_groups`).

    A group's score is the sum of its members' scores.

    Args:
        final_model: on the device to use.
        cost: gets the gradient evaluations, and what was reused.
        problem: :func:`described`, once for all methods.
    """

    def key() -> Key:
        if isinstance(problem, Indescribable):
            raise problem
        settings = OmegaConf.to_container(config.methods[name], resolve=True)
        assert isinstance(settings, dict)
        followed = None
        if method.follows_further_training:
            steps = list(map(int, evaluation_points(plan.protocol, len(data.train))[0]))
            followed = {
                "protocol": plan.protocol.key(),
                "steps": steps,
                "seeds": plan.followed * method.follows_seeds,
            }
        named = {str(k): v for k, v in settings.items()}
        test = data.test[plan.test]
        units = summed(plan, method, data.train)
        return scores_key(problem, test, name, type(method), named, units, config.seed, followed)

    with kept(store, "scores", key) as folder, FileLock(folder / "lock"):
        path = folder / "scores.safetensors"
        if path.exists():
            cost.recall(folder)
            return read_tensors(path)
        known = None if isinstance(problem, Indescribable) else problem
        tensors = _compute(method, final_model, data, plan, config, store, known, cost)
        cost.gradient_evaluations = method.gradient_evaluations
        write_tensors(path, tensors)
        cost.keep(folder)
    return tensors


def described(final_model: FinalModel, data: InstancesModule) -> Problem | Indescribable:
    """Return what all scores of a final model and a training set depend on, or why it can't be described."""
    try:
        return Problem.of(final_model, data.train)
    except Indescribable as error:
        return error


def _compute(
    method: AttributionMethod,
    final_model: FinalModel,
    data: InstancesModule,
    plan: Plan,
    config: DictConfig,
    store: Store,
    problem: Problem | None,
    cost: Cost,
) -> dict[str, Tensor]:
    device = next(iter(final_model.parameters().values())).device
    train, test = data.train.to(device), data.test[plan.test].to(device)
    groups = summed(plan, method, data.train)
    members = sorted({i for group in groups for i in group})
    position = {i: k for k, i in enumerate(members)}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # methods that draw do so alike in any run
        found = method.attribute(
            final_model,
            train,
            test,
            torch.tensor(members, device=device),
            further_training(final_model, train, plan, store, problem, cost),
        )
    membership = torch.zeros(len(members), len(groups), dtype=found.dtype)
    for column, group in enumerate(groups):
        membership[[position[i] for i in group], column] = 1
    tensors = {"scores": found.cpu() @ membership, **bars_of_groups(method, membership)}
    if not torch.isfinite(tensors["scores"]).all():
        log.warning("%s gave scores that are not finite", type(method).__name__)
    return tensors


def summed(plan: Plan, method: AttributionMethod, train: Instances) -> list[Unit]:
    """Return, for each of what the gold standard leaves out, the instances whose scores are added.

    Methods that follow the runs leave out by the rule themselves whatever goes with an instance.
    """
    rule = make_rule(plan.protocol, train)
    units = choices.units(plan.left_out, len(train))
    return [rule.distinct(unit) if method.follows_seeds else rule.members(unit) for unit in units]


def bars_of_groups(method: AttributionMethod, membership: Tensor) -> dict[str, Tensor]:
    """Return the error bars of groups' scores, ``sem`` and ``sem_adjusted`` ``[E, J, G]``, as far as known.

    What members' errors have of their own adds in squares. What all left-out instances share, the part of the
    variance that goes when their mean is subtracted, adds up, and is left in adjusted scores only where
    groups differ in size. ``sem_withheld`` says why bars are missing or NaN, as bytes (:func:`withheld`).

    Args:
        membership: ``[L, G]``, 1 where an instance is in a group.
    """
    if not isinstance(method, FollowingMethod):
        return {}
    found = {}
    size, bars = membership.sum(0), method.bars
    if bars.raw is not None and bars.adjusted is not None:
        raw, adjusted = bars.raw.cpu().square(), bars.adjusted.cpu().square()
        shared = (raw - adjusted).mean(-1, keepdim=True).clamp(min=0)
        found["sem"] = (raw @ membership + shared * (size**2 - size)).sqrt()
        found["sem_adjusted"] = (adjusted @ membership + shared * (size - size.mean()) ** 2).sqrt()
    if bars.withheld:
        found["sem_withheld"] = torch.tensor(list(bars.withheld.encode()), dtype=torch.uint8)
    return found


def withheld(tensors: Mapping[str, Tensor]) -> str:
    """Return why error bars are missing (or NaN in part), empty where they aren't or there never are any."""
    return bytes(tensors["sem_withheld"].tolist()).decode() if "sem_withheld" in tensors else ""


def further_training(
    final_model: FinalModel,
    train: Instances,
    plan: Plan,
    store: Store,
    problem: Problem | None = None,
    cost: Cost | None = None,
) -> FurtherTraining:
    """Return what a method that follows further training is handed; runs nothing yet.

    Args:
        cost: of the method; pays for full runs that are there already when they are first asked for.
    """
    steps = tuple(int(s) for s in evaluation_points(plan.protocol, len(train))[0])
    payers = itertools.chain([cost], itertools.repeat(None))
    return FurtherTraining(
        plan.protocol,
        steps,
        tuple(plan.followed),
        lambda: full_runs(
            final_model,
            train,
            plan.protocol,
            plan.followed,
            store=store,
            device=train.targets.device,
            problem=problem,
            cost=next(payers),
        ),
    )
