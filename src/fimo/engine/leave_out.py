"""Leave-out rules: what a run without some instances does otherwise than the full run of its seed.

A rule is a class here and its name in :mod:`fimo.engine.settings`. The engine's batches, derivatives of the
full run in instances' weights and the linear response all ask it the same few questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fimo.data.duplicates import duplicate_groups
from fimo.data.instances import Instances
from fimo.engine.devices import without_waiting
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica, Unit
from fimo.engine.settings import LeaveOutRule

AT_ONCE = 2**21
"""Entries of batches that are made together, of all replicas: an epoch of small data."""


class LeaveOut:
    """How instances are left out; what isn't said otherwise is as under ``mask``.

    Args:
        train: all N training instances; their number alone where the rule doesn't look at them.
    """

    name: ClassVar[str]

    shares_batches: ClassVar[bool] = True
    """Whether all runs of a seed see the same instances at each step, with weights of their own."""

    until_occurrence: ClassVar[bool] = True
    """Whether a run equals the full one until the batch where one of its left-out instances occurs first."""

    even: ClassVar[LeaveOutRule | None] = None
    """The rule whose effects have the same mean over seeds, without the noise of when batches occur."""

    takes_evenly: ClassVar[bool] = False
    """Whether left-out instances are taken from all batches alike, whenever they occur."""

    def __init__(self, train: Instances | int) -> None:
        self.instances = train if isinstance(train, int) else len(train)

    def members(self, unit: Unit) -> Unit:
        """Return the instances that are left out where ``unit`` is asked for, ascending."""
        return unit

    def distinct(self, unit: Unit) -> Unit:
        """Return the instances of a unit without those that go with another of them."""
        return unit

    def multiplicity(self, index: Tensor) -> Tensor:
        """Return how many exact copies of each instance ``[L]`` are left out with it, itself among them."""
        return torch.ones(len(index), dtype=torch.int64)

    def of_units(self, derivative: Tensor) -> Tensor:
        """Return derivatives ``[..., N]`` in the weight of :meth:`members`, from those in each one's own."""
        return derivative

    def kept(self, width: int) -> int:
        """Return how many instances an epoch of a run has that leaves out so many."""
        return self.instances

    def shortens_epochs(self, protocol: Protocol) -> bool:
        """Return whether an epoch without an instance has fewer steps."""
        return protocol.batches_per_epoch(self.kept(1)) != protocol.batches_per_epoch(self.instances)

    def width(self, unit: Unit) -> int:
        """Return in what runs must agree to be advanced together: the width of their batches."""
        return 0

    def seen(self, out: Tensor, size: int) -> Tensor:
        """Return in which batch of an epoch a run sees the instance at each place of the seed's order, or -1.

        Args:
            out: ``[R, N, ...]``, whether the instance at that place is left out.
            size: of batches.

        Returns:
            int32, ``[R, N, ...]``.
        """
        return torch.where(out, -1, torch.div(self._places(out), size, rounding_mode="floor"))

    def factor(self, width: int) -> float:
        """Return what a batch's weights are multiplied with in a run that leaves out so many instances."""
        return 1.0

    def outside(self, present: Tensor, width: int) -> Tensor | None:
        """Return the weights of left-out instances' losses that are added to every batch's, or None.

        Args:
            present: 1 for an instance that the run leaves out, else 0.
            width: how many it leaves out.
        """
        return None

    def in_own_weights(self, values: Tensor, weight: Tensor, size: int) -> tuple[slice, Tensor]:
        """Return derivatives in the instances' own weights w, which leaving out takes from 1 to 0.

        Args:
            values: ``[..., B + G]``, derivatives in the weights that losses are multiplied with, of the batch
                and of instances outside.
            weight: ``[B + G]``, those weights.
            size: B.

        Returns:
            Which of the B + G places have a weight of their own, and their derivatives.
        """
        return slice(0, size), values[..., :size] * weight[:size]

    def of_own_weights(self, of_unit: Tensor, weight: Tensor, size: int) -> Tensor:
        """Return the derivatives ``[L, B + G]`` of losses' weights, in units' own.

        Args:
            of_unit: ``[L, B + G]``, 1 where the instance at a place is of a unit, else 0.
            weight, size: see :meth:`in_own_weights`.
        """
        places, derivative = self.in_own_weights(of_unit, weight, size)
        found = torch.zeros_like(of_unit)
        found[:, places] = derivative
        return found

    def _places(self, out: Tensor) -> Tensor:
        places = torch.arange(out.shape[1], dtype=torch.int32, device=out.device)
        return places.view(1, -1, *[1] * (out.ndim - 2))


class Mask(LeaveOut):
    """Batches and their divisors stay, and the instance's loss is dropped where it occurs."""

    name = "mask"
    even: ClassVar[LeaveOutRule | None] = "every_batch"


class Shift(LeaveOut):
    """The instance is removed from the seed's permutation, so that later instances move up.

    In derivatives it is taken as ``mask``: its later batches are others altogether.
    """

    name = "shift"
    shares_batches = False
    even = "reweighted"

    def kept(self, width: int) -> int:
        return self.instances - width

    def width(self, unit: Unit) -> int:
        return len(unit)

    def seen(self, out: Tensor, size: int) -> Tensor:
        rank = self._places(out) - out.cumsum(1, dtype=torch.int32)
        return torch.where(out, -1, torch.div(rank, size, rounding_mode="floor"))


class EveryBatch(LeaveOut):
    """The instance's loss / N is subtracted from every batch's mean loss."""

    name = "every_batch"
    until_occurrence = False
    takes_evenly = True

    def width(self, unit: Unit) -> int:
        return len(unit)

    def seen(self, out: Tensor, size: int) -> Tensor:
        return torch.div(self._places(out), size, rounding_mode="floor").expand(out.shape)

    def outside(self, present: Tensor, width: int) -> Tensor | None:
        return present / -self.instances

    def in_own_weights(self, values: Tensor, weight: Tensor, size: int) -> tuple[slice, Tensor]:
        return slice(size, None), values[..., size:] / self.instances


class Reweighted(EveryBatch):
    """Every batch's mean loss is made an estimate of the mean over the instances that stay.

    It is multiplied with N / (N - 1), and the instance's loss / (N - 1) is subtracted (for k instances, N - k
    for N - 1). ``shift`` does so on average over orders: those that stay have each a larger weight.
    """

    name = "reweighted"

    def factor(self, width: int) -> float:
        return self.instances / (self.instances - width)

    def outside(self, present: Tensor, width: int) -> Tensor | None:
        return present / (width - self.instances)

    def in_own_weights(self, values: Tensor, weight: Tensor, size: int) -> tuple[slice, Tensor]:
        of_batch = (values[..., :size] * weight[:size]).sum(-1, keepdim=True)
        return slice(size, None), (values[..., size:] - of_batch) / self.instances

    def of_own_weights(self, of_unit: Tensor, weight: Tensor, size: int) -> Tensor:
        out = of_unit[:, size:]
        of_batch = out.sum(1, keepdim=True) * weight[:size]
        return torch.cat([-of_batch, out], 1) / self.instances


class WithDuplicates(Mask):
    """As ``mask``, for an instance with all its exact duplicates, which have the same inputs and target."""

    name = "with_duplicates"
    even: ClassVar[LeaveOutRule | None] = None

    def __init__(self, train: Instances | int) -> None:
        super().__init__(train)
        if isinstance(train, int):
            raise TypeError("with_duplicates compares instances; their number alone doesn't say which agree")
        self.group = duplicate_groups(train)

    def members(self, unit: Unit) -> Unit:
        return tuple(torch.isin(self.group, self.group[list(unit)]).nonzero().flatten().tolist())

    def distinct(self, unit: Unit) -> Unit:
        first: dict[int, int] = {}
        for instance, group in zip(unit, self.group[list(unit)].tolist(), strict=True):
            first.setdefault(group, instance)
        return tuple(first.values())

    def multiplicity(self, index: Tensor) -> Tensor:
        return self.group.bincount()[self.group[index.cpu()]]

    def of_units(self, derivative: Tensor) -> Tensor:
        group = self.group.to(derivative.device)
        sums = derivative.new_zeros(*derivative.shape[:-1], int(group.max()) + 1)
        return sums.index_add_(-1, group, derivative)[..., group]


RULES: dict[str, type[LeaveOut]] = {
    rule.name: rule for rule in (Shift, Mask, EveryBatch, Reweighted, WithDuplicates)
}
"""By name; the names are those of :data:`fimo.engine.settings.LEAVE_OUT_RULES`."""


def make_rule(protocol: Protocol, train: Instances | int) -> LeaveOut:
    """Return a protocol's rule for a training set (or so many instances of one)."""
    return RULES[protocol.leave_out](train)


def evenly(protocol: Protocol, instances: int) -> Protocol:
    """Return a protocol whose effects have the same mean over seeds and less of their noise.

    Under ``mask`` a step's batch has an instance with probability B / N and then weighs it by 1 / B, so that
    leaving it out takes 1 / N of its loss from every step on average; ``every_batch`` does so at each step.
    Under ``shift`` the others weigh 1 / (N - 1) besides, which ``reweighted`` does at each step. To first
    order in 1 / N the mean effect is the same, while a seed's effect no longer depends on where in an epoch
    the seed has the instance, nor (``shift``) on which others take its place.

    Returns:
        The protocol itself where its rule has no such counterpart, gradients are clipped (which isn't linear
        in a batch's composition) or leaving out makes epochs a step shorter.
    """
    rule = RULES[protocol.leave_out]
    if rule.even is None or protocol.clip_norm is not None:
        return protocol
    if rule(instances).shortens_epochs(protocol):
        return protocol
    return replace(protocol, leave_out=rule.even)


def members_of(rule: LeaveOut, units: Sequence[Unit]) -> Tensor:
    """Return what each of L units leaves out, ``[L, G]`` int64, padded by repetition."""
    members = [rule.members(unit) for unit in units]
    width = max((len(m) for m in members), default=0)
    rows = [[*m, *[m[0]] * (width - len(m))] for m in members]
    return torch.tensor(rows, dtype=torch.int64).view(len(units), width)


@dataclass(frozen=True)
class Batch:
    """One step's instances of R replicas; the step's loss is the weighted sum of their losses.

    Args:
        index: ``[R, B]`` int64, into the training set; ``[1, B]`` where all replicas see the same.
        weight: ``[R, B]``, what each instance's loss is multiplied with.
        extra: ``[R, G]`` int64, instances outside the batch whose losses are added, or None.
        extra_weight: ``[R, G]``.
    """

    index: Tensor
    weight: Tensor
    extra: Tensor | None = None
    extra_weight: Tensor | None = None


class BatchStream:
    """The batches of a chunk of replicas, epoch after epoch.

    A seed's order is drawn as by a plain loop: one generator seeded with the seed, one permutation of all N
    instances at the start of each epoch, whatever is left out. So a seed's runs agree in every permutation,
    and the state of the generator after an epoch does not depend on the left-out instance.

    Args:
        replicas: of one chunk (see :func:`~fimo.engine.replicas.next_chunk`).
        rule: of leaving out.
        dtype, device: of the weights.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        rule: LeaveOut,
        protocol: Protocol,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.rule, self.protocol, self.device = rule, protocol, device
        self.seeds = [r.seed for r in replicas]
        members = [rule.members(r.left_out) for r in replicas]
        width = max((len(m) for m in members), default=0)
        # padded with -1, which is no instance
        rows = [list(m) + [-1] * (width - len(m)) for m in members]
        self.left_out = torch.tensor(rows, dtype=torch.int64, device=device).view(len(replicas), width)
        self.kept = rule.kept(width)
        self.dtype = dtype
        self.shared = rule.shares_batches and len(set(self.seeds)) == 1

    def starting_at(self, step: int) -> Iterator[Batch]:
        """Yield the batches from optimizer step ``step`` (from 0) on, without end."""
        first, skip = divmod(step, self.protocol.batches_per_epoch(self.kept))
        generators = {seed: torch.Generator().manual_seed(seed) for seed in self.seeds}
        at = {seed: row for row, seed in enumerate(generators)}
        row = torch.tensor([at[seed] for seed in self.seeds], device=self.device)
        epoch = 0
        while True:
            drawn = [torch.randperm(self.rule.instances, generator=g) for g in generators.values()]
            if epoch >= first:
                orders = without_waiting(torch.stack(drawn), self.device)
                yield from self._epoch(orders, row, skip if epoch == first else 0)
            epoch += 1

    def _epoch(self, orders: Tensor, row: Tensor, skip: int) -> Iterator[Batch]:
        """Yield an epoch's batches, made on the device by operations that wait for nothing.

        Args:
            orders: ``[S, N]``, of each seed.
            row: ``[R]``, each replica's seed.
        """
        size, n, width = self.protocol.batch_size, self.rule.instances, self.left_out.shape[1]
        if width:  # where each is in its seed's order, ascending; what is padded (-1, the last) is after all
            places = torch.arange(n, device=self.device).expand_as(orders)
            inverse = torch.empty_like(orders).scatter_(1, orders, places)
            place = torch.nn.functional.pad(inverse, (0, 1), value=n)[row[:, None], self.left_out].sort(1)[0]
            del places, inverse
        else:
            place = self.left_out
        weights = self.rule.outside((self.left_out >= 0).to(self.dtype), width) if width else None
        extra = None if weights is None else self.left_out.clamp(min=0)
        at_once = size * max(1, AT_ONCE // (size * len(row)))
        for first in range(skip * size, self.kept, at_once):
            window, weight = self._window(orders, row, place, first, min(first + at_once, self.kept))
            for start in range(0, weight.shape[1], size):
                index = window[:, start : start + size].contiguous()
                yield Batch(index, weight[:, start : start + size] / index.shape[1], extra, weights)

    def _window(
        self, orders: Tensor, row: Tensor, place: Tensor, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Return the instances ``[R, last - first]`` of a part of an epoch, and their weights.

        ``[1, last - first]`` instances where all replicas see the same.

        Args:
            place: ``[R, G]``, ascending, of left-out instances in their seeds' orders.
        """
        rule, width = self.rule, place.shape[1]
        at = torch.arange(first, last, device=self.device)
        of_each = at.repeat(len(row), 1)
        unseen = torch.zeros_like(of_each, dtype=torch.bool)
        if width and not rule.shares_batches:  # those that are seen move up, past all left out before them
            before = place - torch.arange(width, device=self.device)
            index = orders[row[:, None], of_each + torch.searchsorted(before, of_each, right=True)]
        else:
            index = orders[:1, first:last] if self.shared else orders[:, first:last][row]
            if width:
                next_out = torch.nn.functional.pad(place, (0, 1), value=-1)
                out = next_out.gather(1, torch.searchsorted(place, of_each)) == at
                unseen = rule.seen(out, self.protocol.batch_size) < 0
        weight = torch.ones(unseen.shape, dtype=self.dtype, device=self.device).masked_fill_(unseen, 0.0)
        factor = rule.factor(width)
        return index, weight if factor == 1 else weight * factor
