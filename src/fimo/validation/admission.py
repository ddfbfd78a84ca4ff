"""What a final model, its training and its test instances must be, wherever they come from."""

from __future__ import annotations

import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError, reason, shortened
from fimo.models.copied import copied, duplicate
from fimo.models.final_model import FinalModel, apply, functional_apply
from fimo.models.loss_function import Loss
from fimo.models.train_mode import TrainMode, seeded
from fimo.store.description import content_of
from fimo.validation.independence import (
    MIXING_NETWORK,
    UNSTEADY,
    Evaluate,
    WithoutDropout,
    couples,
    problem,
    same,
)
from fimo.validation.poor import Comparison, compared, untold
from fimo.validation.probabilities import unlike_logits
from fimo.validation.reassigned import reassigned
from fimo.validation.recomputation import PROBLEM, recomputes
from fimo.validation.targets import Conversion, candidates, known_targets
from fimo.validation.unseen import check_seen

log = logging.getLogger(__name__)

PROBE = 4
"""Instances on which a network and its losses are tried."""

REMEMBERED = 8
"""Sets of instances that a final model remembers to have been admitted with."""


def admit(final_model: FinalModel, train: Any, test: Any = None) -> tuple[Instances, Instances]:
    """Check a final model with its instances, and return the instances as the loss takes them.

    The result is remembered with the final model, while the instances' tensors are the same.

    Args:
        train: training instances, or a data set of them (see :func:`fimo.data.conversion.to_instances`).
        test: test instances; ``train`` when None.

    Returns:
        The training and test instances: inputs in the network's dtype, labels int64 ``[n]``, values in the
        shape of the outputs.

    Raises:
        InputError: naming ``model.network``, ``model.loss``, ``model.measurement``, ``dataset.train`` or
            ``dataset.test``.
    """
    if not isinstance(final_model, FinalModel):
        kind = type(final_model).__name__
        raise InputError("model", f"expected a FinalModel(network, loss) but got {kind}")
    if test is None or (isinstance(train, Instances) and isinstance(test, Instances)):
        train = as_instances(train, "dataset.train")
        test = None if test is None else as_instances(test, "dataset.test")
    else:
        from fimo.data.conversion import train_and_test

        train, test = (as_instances(part, "dataset") for part in train_and_test(train, test))
    digest = functools.cache(_digest)
    memory: list[_Admitted] = final_model.admitted
    for known in memory:
        if known.is_for(train, test, digest):
            found = known.train.converted(train)
            return found, found if known.test is None or test is None else known.test.converted(test)
    found, tested = _checked(final_model, train, test)
    entry = _Admitted(
        _Checked.of(train, found, digest), None if test is None else _Checked.of(test, tested, digest)
    )
    memory[:] = [entry, *(known for known in memory if known.alive)][:REMEMBERED]
    return found, tested


def as_instances(source: Any, key: str) -> Instances:
    """Return instances as they are, and any data set's elements as instances in memory."""
    found: Instances = source
    if not isinstance(source, Instances):
        from fimo.data.conversion import to_instances  # pandas and Lightning take seconds to import

        found = to_instances(source, key=key)
    if not len(found):
        raise InputError(key, "has no instances")
    return found.detached()


Digest = Callable[[Tensor], str]


@dataclass(frozen=True)
class _Known:
    """A tensor that was seen: the object as it was then, or its content.

    Content is compared where that takes milliseconds, and where the tensor was converted: what NumPy or
    ``.data`` write into it, its version doesn't count.

    Args:
        small: whether it is remembered when it is gone.
        converted: what became of it; None where it is taken as it is.
    """

    tensor: weakref.ref[Tensor]
    version: int
    small: bool
    content: str | None
    converted: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, found: Tensor, digest: Digest) -> _Known:
        converted = None if found is tensor else found
        if converted is not None and converted.data_ptr() == tensor.data_ptr():
            converted = converted.clone()  # of a view: the tensor may be written into later
        small = tensor.numel() * tensor.element_size() <= SMALL
        content = digest(tensor) if small or converted is not None else None
        return cls(weakref.ref(tensor), tensor._version, small, content, converted)

    def is_like(self, tensor: Tensor, digest: Digest) -> bool:
        if self.content is not None:
            return self.content == digest(tensor)
        return self.tensor() is tensor and tensor._version == self.version

    @property
    def alive(self) -> bool:
        return self.small or self.tensor() is not None


def _digest(tensor: Tensor) -> str:
    content = content_of(tensor.detach().cpu())
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content).hexdigest()


SMALL = 2**22
"""Bytes of a tensor whose content is hashed in milliseconds."""

OF_NETWORK = (MIXING_NETWORK, UNSTEADY)
"""What is wrong, where the network is at fault."""


@dataclass(frozen=True)
class _Checked:
    """A set of instances that was checked: its tensors by name."""

    tensors: dict[str, _Known]

    @classmethod
    def of(cls, given: Instances, found: Instances, digest: Digest) -> _Checked:
        became = found.tensors()
        return cls({name: _Known.of(t, became[name], digest) for name, t in given.tensors().items()})

    def is_like(self, instances: Instances, digest: Digest) -> bool:
        now = instances.tensors()
        return now.keys() == self.tensors.keys() and all(
            self.tensors[name].is_like(tensor, digest) for name, tensor in now.items()
        )

    def converted(self, given: Instances) -> Instances:
        """Return instances as the loss takes them."""
        made = {n: known.converted for n, known in self.tensors.items() if known.converted is not None}
        if not made:
            return given
        tensors = {**given.tensors(), **made}
        targets = tensors.pop("targets")
        return Instances(tensors if isinstance(given.inputs, Mapping) else tensors["inputs"], targets)

    @property
    def alive(self) -> bool:
        return all(known.alive for known in self.tensors.values())


@dataclass(frozen=True)
class _Admitted:
    """Instances that were checked together."""

    train: _Checked
    test: _Checked | None

    def is_for(self, train: Instances, test: Instances | None, digest: Digest) -> bool:
        if test is None or self.test is None:
            return test is None and self.test is None and self.train.is_like(train, digest)
        return self.train.is_like(train, digest) and self.test.is_like(test, digest)

    @property
    def alive(self) -> bool:
        return self.train.alive and (self.test is None or self.test.alive)


def _checked(model: FinalModel, train: Instances, test: Instances | None) -> tuple[Instances, Instances]:
    if model.measurement is not None and model.measurement.targets == "quantities":
        return _with_quantities(model, train, test)
    sets = {"dataset.train": train} | ({} if test is None else {"dataset.test": test})
    for key, instances in sets.items():
        _check_numbers(instances, key)
    for name, parameter in model.network.named_parameters():
        if not parameter.isfinite().all():
            raise InputError("model.network", f"its parameter {name} holds NaN or infinite values")
    sets = {key: _in_dtype_of(model, instances) for key, instances in sets.items()}
    outputs = {key: tried(model, _probe(instances)) for key, instances in sets.items()}
    if recomputes(model, sets["dataset.train"][:2].inputs):
        raise InputError("model.network", PROBLEM)
    if names := reassigned(model, sets["dataset.train"][:2].inputs):
        raise InputError(
            "model.network",
            f"its forward pass assigns another tensor to the data of {shortened(names)}, which steps of "
            "further training can't follow; write into it: weight.data.copy_(...) for weight.data = ...",
        )
    _check_trained(model, _probe(sets["dataset.train"]))
    mode = TrainMode.of(model, sets["dataset.train"])
    convert = _conversion(model, sets["dataset.train"], outputs["dataset.train"])
    if convert is not None:
        sets = {key: _with_targets(part, convert(part.targets)) for key, part in sets.items()}
    else:
        sets = {
            key: _with_targets(part, known_targets(model.loss, outputs[key], part.targets, key))
            for key, part in sets.items()
        }
    train, last = sets["dataset.train"], list(sets.values())[-1]
    _refuse(model, model.loss, train, "model.loss")
    _refuse(model, model.loss, train, "model.loss", mode)
    if model.measurement is not None:
        if model.measurement.of_classes and last.targets.is_floating_point():
            raise InputError(
                "model.measurement",
                f"{model.measurement.name} needs classes as targets but they are {last.targets.dtype}",
            )
        _refuse(model, model.measurement, last, "model.measurement")
    elif last is not train:
        _refuse(model, model.loss, last, "dataset.test")
    for key, loss in (("model.loss", model.loss), ("model.measurement", model.measurement)):
        if loss is not None:
            _check_differentiable(loss, tried(model, _probe(last)), _probe(last).targets, key)
    for key, part in sets.items():
        check_seen(model, model.loss, part, outputs[key], key)
    if model.measurement is not None:
        check_seen(model, model.measurement, last, outputs[key], key)
    if not model.admitted and (said := unlike_logits(model.loss, outputs["dataset.train"])) is not None:
        log.warning("model.network: %s", said)  # once for each model, whatever its instances
    if not model.accept_poor and last is not train:
        _judge(model, train, last)
    return train, last


def _with_quantities(
    model: FinalModel, train: Instances, test: Instances | None
) -> tuple[Instances, Instances]:
    """Check test instances whose targets say what is measured of them: no targets of the loss."""
    bare = FinalModel(model.network, model.loss, None, model.trainable, accept_poor=True)
    bare.admitted.extend(model.admitted)
    train, _ = _checked(bare, train, None)
    if test is None:
        return train, train
    _check_numbers(test, "dataset.test")
    test = _in_dtype_of(model, test)
    assert model.measurement is not None
    _refuse(model, model.measurement, test, "model.measurement")
    return train, test


def _judge(model: FinalModel, train: Instances, test: Instances) -> None:
    """Say in the log that the model predicts worse than a constant, or that this can't be told."""
    try:
        found = compared(model, train, test)
    except InputError:
        raise
    except Exception:  # of an instance that no trial has seen, such as an empty text
        _check_each(model, train, "dataset.train")
        _check_each(model, test, "dataset.test")
        raise
    if not isinstance(found, Comparison):
        log.info("%s", untold(found))
    elif found.poor is not None:
        log.warning("%s (FinalModel(..., accept_poor=True) says that it is meant)", found.poor)


def _check_each(model: FinalModel, instances: Instances, key: str) -> None:
    """Refuse the first instance that has no loss by itself."""
    for row, one in enumerate(instances.batches(1)):
        try:
            model.losses(one)
        except Exception as error:  # whatever a network or a loss raises
            raise InputError(key, f"the model fails on instance {row}: {reason(error)}") from error


def _check_numbers(instances: Instances, key: str) -> None:
    for name, tensor in instances.tensors().items():
        if not tensor.is_floating_point():
            continue
        bad = torch.isnan(tensor) if name != "targets" else ~torch.isfinite(tensor)
        if bad.any():
            row = int(bad.flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else int(bad.nonzero()[0])
            what = "NaN among its" if name != "targets" else "NaN or infinite"
            raise InputError(key, f"instance {row} has {what} {name}")


def _in_dtype_of(model: FinalModel, instances: Instances) -> Instances:
    """Return instances with floating-point tensors in the network's dtype, where it has one."""
    dtypes = {p.dtype for p in model.network.parameters() if p.is_floating_point()}
    floating = {t.dtype for t in instances.tensors().values() if t.is_floating_point()}
    if len(dtypes) != 1 or not floating - dtypes:
        return instances
    return instances.to(dtype=dtypes.pop())


def _probe(instances: Instances) -> Instances:
    n = min(PROBE, len(instances))
    rows = torch.tensor([k * len(instances) // n for k in range(n)], device=instances.targets.device)
    return instances[rows]


@torch.no_grad()
def tried(model: FinalModel, probe: Instances) -> Tensor:
    """Return a network's outputs ``[n, ...]`` of a few instances.

    Raises:
        InputError: it fails, or returns something else.
    """
    try:
        outputs: Any = apply(model.network, probe.inputs)
    except InputError:
        raise
    except Exception as error:  # whatever a network makes of inputs that are not for it
        shapes = ", ".join(
            f"{name} {tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}"
            for name, t in probe.tensors().items()
            if name != "targets"
        )
        raise InputError(
            "model.network", f"does not fit the data ({shapes} each): {reason(error)}"
        ) from error
    if not isinstance(outputs, Tensor):
        parts = list(outputs) if hasattr(outputs, "keys") else []
        part = f"'{'logits' if 'logits' in parts else parts[0]}'" if parts else "0"
        raise InputError(
            "model.network",
            f"returns {type(outputs).__name__}, expected a tensor [n, ...]; name the part to use: "
            f"fimo.models.adapted.Adapted(network, output={part})",
        )
    if outputs.ndim == 0 or len(outputs) != len(probe):
        raise InputError(
            "model.network",
            f"returns shape {tuple(outputs.shape)} for {len(probe)} instances, expected [n, ...]",
        )
    if outputs.ndim == 1:
        raise InputError(
            "model.network",
            "returns outputs [n], expected [n, 1] or more: leave out the squeeze, or pass "
            "fimo.models.adapted.Adapted(network, column=True)",
        )
    return outputs


def _conversion(model: FinalModel, train: Instances, outputs: Tensor) -> Conversion | None:
    """Return what becomes of the targets for a user's loss; None for a known one, which says so itself.

    Raises:
        InputError: no form of the targets gives one value for each instance, which depends on it alone.
    """
    if model.loss.targets is not None:
        return None
    first: str | None = None
    for convert in candidates(outputs, train.targets):
        probe = _probe(train)
        tried = _with_targets(probe, convert(probe.targets))
        wrong = _wrong(model, model.loss, tried)
        if wrong is None:
            return convert
        first = first or wrong
        if wrong.startswith(OF_NETWORK):
            break
    key = "model.network" if (first or "").startswith(OF_NETWORK) else "model.loss"
    raise InputError(key, _explained(model, first or "", train, outputs))


def _refuse(
    model: FinalModel, loss: Loss, instances: Instances, key: str, mode: TrainMode | None = None
) -> None:
    """Refuse a loss whose values aren't one per instance, depending on it alone."""
    probe = _probe(instances)
    if (wrong := _wrong(model, loss, probe, mode)) is not None:
        outputs = tried(model, probe)
        key = "model.network" if wrong.startswith(OF_NETWORK) else key
        raise InputError(key, _explained(model, wrong, instances, outputs, mode))


def _wrong(model: FinalModel, loss: Loss, probe: Instances, mode: TrainMode | None = None) -> str | None:
    """Return what is wrong; where that may be rounding, tried once more in float64."""

    def found(model: FinalModel, probe: Instances) -> str | None:
        try:
            return problem(_evaluation(model, loss, mode), probe, in_place=mode is not None)
        except InputError as error:
            return error.problem
        except Exception as error:  # a user's loss may fail in any way
            return reason(error)

    wrong = found(model, probe)
    if wrong is None or not wrong.startswith(("an instance's",)):
        return wrong
    if next(iter(model.parameters().values())).dtype == torch.float64:
        return wrong
    return found(model.to(dtype=torch.float64), probe.to(dtype=torch.float64))


def _evaluation(model: FinalModel, loss: Loss, mode: TrainMode | None) -> Evaluate:
    if mode is None:

        def evaluate(instances: Instances) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                outputs = apply(model.network, instances.inputs)
                return outputs, loss(outputs, instances.targets)

        return evaluate
    network = mode.set(duplicate(model.network))

    def in_steps(instances: Instances) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), seeded(0, instances.targets.device), WithoutDropout():
            buffers = {name: b.clone() for name, b in network.named_buffers()}
            outputs = functional_apply(network, buffers, instances.inputs)
            return outputs, loss(outputs, instances.targets)

    return in_steps


def _explained(
    model: FinalModel, wrong: str, instances: Instances, outputs: Tensor, mode: TrainMode | None = None
) -> str:
    if wrong.startswith(MIXING_NETWORK):
        where = " in train mode, as in further training's steps" if mode is not None else ""
        if names := couples(model.network):
            return (
                f"{wrong}{where}: batch normalisation without running statistics ({shortened(names)}); use "
                "track_running_stats=True, or GroupNorm or LayerNorm"
            )
        return f"{wrong}{where}; expected layers that treat each instance alone"
    if wrong.startswith(UNSTEADY):
        where = "in eval mode" if mode is None else "in a training step of one seed"
        return (
            f"{wrong} {where}; expected no counters, and no random numbers but torch's own in train mode "
            "(self.training)"
        )
    if wrong.startswith("an instance's"):
        ours, theirs = tuple(outputs.shape[1:]), tuple(instances.targets.shape[1:])
        return (
            f"{wrong}: outputs of shape {ours} and targets of shape {theirs} for each instance may be "
            "broadcast, or the loss averages over the batch"
        )
    return wrong


def _check_trained(model: FinalModel, probe: Instances) -> None:
    """Refuse outputs that have no derivative in any trainable parameter, or are others where it is taken."""
    # a copy, since hooks of pruning or weight normalisation leave what they computed in the modules
    network = copied(model.network)
    with torch.enable_grad():
        moved = {name: p for name, p in model.parameters().items() if p.is_floating_point()}
        free = {name: p.clone().requires_grad_() for name, p in moved.items()}
        outputs = functional_apply(network, free, probe.inputs)
    if not outputs.requires_grad:
        raise InputError(
            "model.network",
            f"its outputs have no derivative in the trainable parameters ({shortened(list(free))}): they are "
            "not used, or under torch.no_grad or detach",
        )
    with torch.no_grad():
        first, second = (functional_apply(network, moved, probe.inputs) for _ in range(2))
    steady = same(second, first)  # what changes by itself is told of later
    if steady and not same(outputs, first):
        raise InputError(
            "model.network",
            "its outputs in eval mode are others under torch.no_grad than where gradients are taken, so that "
            "these would be of another function; expected no branch on torch.is_grad_enabled()",
        )


def _check_differentiable(loss: Loss, outputs: Tensor, targets: Tensor, key: str) -> None:
    with torch.enable_grad():
        values = loss(outputs.detach().requires_grad_(), targets)
    if not values.requires_grad:
        raise InputError(
            key, "has no derivative in the network's outputs; expected differentiable operations"
        )


def _with_targets(instances: Instances, targets: Tensor) -> Instances:
    return instances if targets is instances.targets else replace(instances, targets=targets)
