"""Seeds' optimizer steps: which instances the full runs see, and what leaving instances out changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.engine.protocol import Protocol


@dataclass(frozen=True)
class Step:
    """One step of S full runs, and for each of L runs without an instance.

    Args:
        index: ``[S, m]``, all instances that any of a seed's runs sees; one that occurs twice counts twice.
        full: ``[m]``, what the full runs multiply their losses with.
        without: ``[S, m, L]``, what the runs leaving out an instance multiply them with.
        lr: learning rate of the full runs; None where they make no step.
        lr_without: of the runs leaving out an instance; None where they make no step.
        evaluated: whether an evaluation point follows.
    """

    index: Tensor
    full: Tensor
    without: Tensor
    lr: float | None
    lr_without: float | None
    evaluated: bool


def steps(
    seeds: Sequence[int],
    left_out: Tensor,
    instances: int,
    protocol: Protocol,
    dtype: torch.dtype,
) -> Iterator[Step]:
    """Yield the steps of the seeds' full runs, to their last evaluation point.

    The rules are those of :class:`~fimo.engine.leave_out.BatchStream`. Where ``shift`` makes an
    epoch one step shorter (N = k B + 1), the two kinds of runs count their steps apart: from one evaluation
    point to the next both start together, and the one with fewer steps to make waits at the end. So runs
    that are compared at the end of epochs stay aligned by epoch, and runs that are compared after a number
    of steps are aligned by step.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
    """
    total = protocol.total_steps(instances)
    batches = _Batches(seeds, left_out.cpu(), instances, protocol, dtype)
    counts = (instances, batches.kept)
    points = [protocol.evaluation_steps(n, instances) for n in counts]
    lengths = [protocol.batches_per_epoch(n) for n in counts]
    spans = [list(itertools.pairwise([0, *p])) for p in points]
    for full, without in zip(*spans, strict=True):
        together = max(full[1] - full[0], without[1] - without[0])
        for tick in range(together):
            taken = [first + tick if first + tick < last else None for first, last in (full, without)]
            places = [None if t is None else divmod(t, n) for t, n in zip(taken, lengths, strict=True)]
            rates = [None if t is None else protocol.learning_rate(t, total) for t in taken]
            index, weight, weights = batches.at(places[0], places[1])
            yield Step(index, weight, weights, rates[0], rates[1], evaluated=tick == together - 1)


Place = tuple[int, int]
"""An epoch and a batch in it."""


class _Batches:
    """The batches of seeds' runs, epoch after epoch."""

    def __init__(
        self,
        seeds: Sequence[int],
        left_out: Tensor,
        instances: int,
        protocol: Protocol,
        dtype: torch.dtype,
    ) -> None:
        self.left_out, self.instances, self.protocol, self.dtype = left_out, instances, protocol, dtype
        self.shift = protocol.leave_out == "shift"
        self.kept = instances - 1 if self.shift else instances
        if protocol.leave_out == "every_batch":  # their losses are subtracted from every batch's
            self.outside = left_out.unique()
            chosen = (self.outside[:, None] == left_out).to(dtype)
            self.subtracted = chosen.expand(len(seeds), -1, -1) / -instances
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._drawn: list[tuple[Tensor, Tensor]] = []  # of epochs from `_first` on
        self._first = 0

    def at(self, full: Place | None, without: Place | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return index, full and without (see :class:`Step`) where the two kinds of runs are."""
        parts = {place: self._window(*place) for place in (full, without) if place is not None}
        self._forget(min(epoch for epoch, _ in parts))
        for place, (_, weight, each) in parts.items():
            if place != full:
                weight.zero_()
            if place != without:
                each.zero_()
        indices, weights, all_weights = zip(*parts.values(), strict=True)
        return torch.cat(indices, 1), torch.cat(weights), torch.cat(all_weights, 1)

    def _window(self, epoch: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of runs that all are at this batch."""
        order, seen = self._epoch(epoch)
        start = batch * self.protocol.batch_size
        stop = min(start + self.protocol.batch_size, self.instances)
        reach = min(stop + 1, self.instances) if self.shift else stop
        window = order[:, start:reach]
        full = torch.full((reach - start,), 1 / (stop - start), dtype=self.dtype)
        full[stop - start :] = 0.0
        without = (seen[:, start:reach] == batch).to(self.dtype)
        without.div_(max(1, min(stop, self.kept) - start))
        if self.protocol.leave_out == "every_batch":
            window = torch.cat([window, self.outside.expand(len(window), -1)], 1)
            full = torch.cat([full, full.new_zeros(len(self.outside))])
            without = torch.cat([without, self.subtracted], 1)
        return window, full, without

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return an epoch's order ``[S, N]``, and in which batch ``[S, N, L]`` each run sees each place."""
        while self._first + len(self._drawn) <= epoch:
            order = torch.stack([torch.randperm(self.instances, generator=g) for g in self._generators])
            self._drawn.append((order, _batch_seen(order, self.left_out, self.protocol)))
        return self._drawn[epoch - self._first]

    def _forget(self, before: int) -> None:
        del self._drawn[: before - self._first]
        self._first = before


def _batch_seen(order: Tensor, left_out: Tensor, protocol: Protocol) -> Tensor:
    """Return in which batch ``[S, N, L]`` of an epoch each run sees the instance at each place, or -1."""
    seeds, n = order.shape
    at = torch.arange(n, dtype=torch.int32)[:, None]
    hole = torch.argsort(order, 1)[:, None, left_out]  # [S, 1, L], where each left-out instance occurs
    rank = at - (at > hole).int() if protocol.leave_out == "shift" else at.expand(seeds, n, len(left_out))
    seen = torch.div(rank, protocol.batch_size, rounding_mode="floor")
    return seen if protocol.leave_out == "every_batch" else seen.scatter_(1, hole, -1)
