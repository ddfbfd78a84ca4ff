"""Runs that leave an instance out in part: to see whether its effect is linear in its weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimo.checking.problem import Clock, aligned_steps
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.leave_out import Batch, BatchStream
from fimo.engine.replicas import Replica, Unit

REMOVED = (1.0, 0.5, 0.25)
"""Shares of an instance's weight."""


def partial_effects(
    setting: Setting, seed: int, units: Sequence[Unit], steps: int, clock: Clock
) -> Iterator[tuple[int, Tensor]]:
    """Yield effects ``[3, J, L]`` (float64) of removing 1, 1/2 and 1/4 of each instance, at doubling steps.

    A run that removes the share w of an instance descends (1 - w) times the full run's batch loss plus w
    times that of the run leaving the instance out, at every step: under each leave-out rule the runs between
    the two that are made otherwise, along a straight line in the objective.

    Args:
        steps: at most so many; the last is always yielded.
    """
    replicas = [Replica(seed, unit) for _ in REMOVED for unit in units]
    full = Replica(seed, units[0])
    chunk = Chunk(setting, [*replicas, full])  # the last with nothing removed
    removed = torch.tensor([w for w in REMOVED for _ in units] + [0.0], dtype=chunk.network.dtype)
    chunk.follow(partial_batches(setting, chunk.replicas, removed.to(setting.device)))
    steps, due = aligned_steps(setting, steps), 1
    while chunk.step < steps:
        chunk.advance(chunk.step + 1)
        late = clock.left < 0
        if chunk.step == due or chunk.step == steps or late:
            losses = chunk.evaluate()[0]
            found = (losses[:-1] - losses[-1:]).view(len(REMOVED), len(units), -1).transpose(1, 2)
            yield chunk.step, found
            due *= 2
        if late:
            return


def partial_batches(setting: Setting, replicas: Sequence[Replica], removed: Tensor) -> Iterator[Batch]:
    """Yield batches between those of full runs and those of runs leaving instances out.

    Args:
        removed: ``[R]``, the share of each replica's left-out instances that is removed.
    """
    rule, protocol, dtype = setting.rule, setting.protocol, removed.dtype
    w, nothing = removed[:, None], [Replica(replicas[0].seed)] * len(replicas)
    without = BatchStream(replicas, rule, protocol, dtype, setting.device).starting_at(0)
    full = BatchStream(nothing, rule, protocol, dtype, setting.device).starting_at(0)
    for whole, less in zip(full, without, strict=False):
        if not rule.shares_batches:  # other instances: both batches, one after the other
            index = torch.cat(
                [whole.index.expand(len(replicas), -1), less.index.expand(len(replicas), -1)], 1
            )
            yield Batch(index, torch.cat([whole.weight * (1 - w), less.weight * w], 1))
        elif less.extra is not None and less.extra_weight is not None:
            weight = whole.weight * (1 - w) + less.weight * w
            yield Batch(less.index, weight, less.extra, less.extra_weight * w)
        else:
            yield Batch(less.index, whole.weight * (1 - w) + less.weight * w)
