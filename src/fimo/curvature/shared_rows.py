"""Rows that the methods of a run share, and what is made of them: made once, and given to all that ask.

Methods ask for rows as if they were alone (:class:`~fimo.curvature.gradients.InstanceGradients`). While a
run scores several of them at one final model, rows that fit into the memory are kept, those that were used
last before others: the loss gradients of the training set, say, are then taken in one pass for all methods.
Outside of such a run nothing is kept, as where methods are timed one by one.

What is kept stands in for the very same computation, and is charged as if it were made: a method's scores are
those that it has alone, bit for bit, and it costs as many evaluations, in whatever order methods run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)

T = TypeVar("T")

Make = Callable[[], tuple[tuple[T, ...], int]]
"""Makes what is kept (consecutive instances' rows, say), and returns it with the evaluations that it took."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What was made.

    Args:
        instances: of which set.
        kind: what it is, and all else that it depends on.
        values: dataclasses and tuples with tensors.
        evaluations, seconds: that it takes to make.
        versions: of its tensors, see :func:`versions_of`.
    """

    instances: Instances
    kind: tuple[object, ...]
    values: tuple[Any, ...]
    evaluations: int
    seconds: float
    versions: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """A tensor that several layers share counts once."""
        held = {t.data_ptr(): t.numel() * t.element_size() for t in tensors_of(self.values)}
        return sum(held.values())


class SharedRows:
    """What is kept for the methods of a run.

    Only sets of instances that the run's methods are given (:meth:`set_of`) count, not batches of them.

    Args:
        final_model: at which rows are taken; a model at other parameters is another one.

    Attributes:
        seconds: that what was there would have taken, so far.
    """

    def __init__(self, final_model: FinalModel) -> None:
        self.final_model = final_model
        self.seconds = 0.0
        self._parameters = versions_of(_tensors(final_model))
        self._sets: list[tuple[Instances, tuple[int, ...]]] = []
        self._kept: list[Kept] = []  # the one that was used last at the end
        self._dropped: list[tuple[Instances, tuple[object, ...]]] = []

    def set_of(self, instances: Instances) -> Instances:
        """Return a set that was given before where it is the same; methods' left-out instances are copies."""
        for known, versions in self._sets:
            if versions_of(known.tensors().values()) == versions and _same(known, instances):
                return known
        self._sets.append((instances, versions_of(instances.tensors().values())))
        return instances

    def kept(
        self,
        what: str,
        instances: Instances,
        kind: tuple[object, ...],
        size: float,
        memory: float,
        make: Make[T],
    ) -> tuple[tuple[T, ...], int]:
        """Return what ``make`` does, which is called only where that is not there.

        Args:
            what: it is, in words, more than one.
            kind: what it depends on besides the instances; equal kinds are the same, bit for bit.
            size: bytes that it takes, as far as that is known.
            memory: bytes that all that is kept may take.
        """
        self._check_parameters()
        known = self._known(instances)
        if known is None or size > memory:
            return make()
        for found in self._kept:
            if found.instances is known and found.kind == kind:
                self._kept.remove(found)
                if versions_of(tensors_of(found.values)) != found.versions:
                    log.info("%s were changed in place, and are made again", what)
                    break
                self._kept.append(found)
                self.limit(memory)
                self.seconds += found.seconds
                return found.values, found.evaluations
        if any(instances is known and before == kind for instances, before in self._dropped):
            log.info(
                "%s are made again: memory_mb=%.0f does not hold them beside what other methods use",
                what, memory / 2**20,
            )  # fmt: skip
        self.limit(memory - size)
        before, start = self.seconds, _now(known)
        values, evaluations = make()
        seconds = _now(known) - start + self.seconds - before
        made = Kept(known, kind, values, evaluations, seconds, versions_of(tensors_of(values)))
        if made.bytes <= memory:
            self.limit(memory - made.bytes)
            self._kept.append(made)
        return values, evaluations

    def limit(self, memory: float) -> None:
        """Drop what was used longest ago until the rest takes no more bytes."""
        held = sum(kept.bytes for kept in self._kept)
        while self._kept and held > memory:
            first = self._kept.pop(0)
            self._dropped.append((first.instances, first.kind))
            held -= first.bytes

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._sets.clear()

    def _known(self, instances: Instances) -> Instances | None:
        tensors = {name: id(t) for name, t in instances.tensors().items()}
        for known, versions in self._sets:
            found = known.tensors()
            if tensors == {n: id(t) for n, t in found.items()} and versions_of(found.values()) == versions:
                return known
        return None

    def _check_parameters(self) -> None:
        versions = versions_of(_tensors(self.final_model))
        if versions != self._parameters:
            log.info("the final model's parameters were changed in place: gradients are made again")
            self._parameters = versions
            self._kept.clear()


_OPEN: ContextVar[SharedRows | None] = ContextVar("shared_rows", default=None)


@contextlib.contextmanager
def shared_rows(final_model: FinalModel) -> Iterator[SharedRows]:
    """Keep rows at a final model for all methods that are scored meanwhile, in this thread."""
    shared = SharedRows(final_model)
    token = _OPEN.set(shared)
    try:
        yield shared
    finally:
        _OPEN.reset(token)
        shared.clear()


def shared_at(final_model: FinalModel) -> SharedRows | None:
    """Return what is kept of rows at a final model; None where they are not shared."""
    shared = _OPEN.get()
    return shared if shared is not None and shared.final_model is final_model else None


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the tensors that rows, or dataclasses and tuples of others, hold."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors_of(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def versions_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return how often each tensor was changed in place; of inference tensors that isn't known."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def _tensors(final_model: FinalModel) -> Iterator[Tensor]:
    yield from final_model.network.parameters()
    yield from final_model.network.buffers()


def _same(one: Instances, other: Instances) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def _now(instances: Instances) -> float:
    """Return the time in seconds, when all that was asked of the instances' device is done."""
    device = instances.targets.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
