"""Seeds' optimizer steps: which instances the full runs see, and what leaving instances out changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.engine.leave_out import LeaveOut, members_of
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
    rule: LeaveOut,
    protocol: Protocol,
    dtype: torch.dtype,
    every: int = 1,
) -> Iterator[Step]:
    """Yield the steps of the seeds' full runs, to their last evaluation point.

    Where the rule makes an
    epoch one step shorter (N = k B + 1), the two kinds of runs count their steps apart: from one evaluation
    point to the next both start together, and the one with fewer steps to make waits at the end. So runs
    that are compared at the end of epochs stay aligned by epoch, and runs that are compared after a number
    of steps are aligned by step.

    Args:
        left_out: ``[L]``, one instance per run.
        rule: of leaving out.
        every: where the rule adds left-out instances to every batch, take each to every so-manieth batch
            alone, with that many times the weight, seeds in turn: fewer of them at a step.
    """
    total = protocol.total_steps(rule.instances)
    batches = _Batches(seeds, left_out, rule, protocol, dtype, every)
    counts = (rule.instances, batches.kept)
    points = [protocol.evaluation_steps(n, rule.instances) for n in counts]
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
        rule: LeaveOut,
        protocol: Protocol,
        dtype: torch.dtype,
        every: int,
    ) -> None:
        self.members = members_of(rule, [(i,) for i in left_out.tolist()])  # [L, G]
        self.rule, self.size, self.dtype = rule, protocol.batch_size, dtype
        self.kept = rule.kept(1)
        self.per_epoch = protocol.batches_per_epoch(rule.instances)
        self.every, self.seeds = every, torch.tensor(seeds)
        self.adds = rule.outside(torch.ones(1), 1) is not None
        # by an instance's own number: what is said of it must not depend on which others are asked about
        instances = self.members.unique()
        of_turn = [instances[instances % every == turn] for turn in range(every)]
        # [every, U], which are left out of batches in turn
        self.outside = torch.nn.utils.rnn.pad_sequence(of_turn, batch_first=True, padding_value=-1)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._drawn: list[tuple[Tensor, Tensor]] = []  # of epochs from `_first` on
        self._first = 0

    def at(self, full: Place | None, without: Place | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return index, full and without (see :class:`Step`) where the two kinds of runs are."""
        places = dict.fromkeys(place for place in (full, without) if place is not None)  # mostly one
        parts = {place: self._window(*place) for place in places}
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
        n = self.rule.instances
        start = batch * self.size
        stop = min(start + self.size, n)
        reach = min(stop + n - self.kept, n)  # instances that move up into the batch
        window = order[:, start:reach]
        full = torch.full((reach - start,), 1 / (stop - start), dtype=self.dtype)
        full[stop - start :] = 0.0
        without = (seen[:, start:reach] == batch).to(self.dtype)
        without.mul_(self.rule.factor(1)).div_(max(1, min(stop, self.kept) - start))
        if self.adds:
            added = self.outside[(epoch * self.per_epoch + batch + self.seeds) % self.every]  # [S, U]
            chosen = (added[..., None, None] == self.members).any(-1).to(self.dtype)
            weights = self.rule.outside(chosen * self.every, 1)
            assert weights is not None
            window = torch.cat([window, added.clamp(min=0)], 1)
            full = torch.cat([full, full.new_zeros(added.shape[1])])
            without = torch.cat([without, weights], 1)
        return window, full, without

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return an epoch's order ``[S, N]``, and in which batch ``[S, N, L]`` each run sees each place."""
        while self._first + len(self._drawn) <= epoch:
            order = torch.stack([torch.randperm(self.rule.instances, generator=g) for g in self._generators])
            self._drawn.append((order, self._seen(order)))
        return self._drawn[epoch - self._first]

    def _seen(self, order: Tensor) -> Tensor:
        holes = torch.argsort(order, 1)[:, self.members]  # [S, L, G], where each left-out instance occurs
        out = torch.zeros(*order.shape, len(self.members), dtype=torch.bool)
        out.scatter_(1, holes.transpose(1, 2), True)
        return self.rule.seen(out, self.size)

    def _forget(self, before: int) -> None:
        del self._drawn[: before - self._first]
        self._first = before
