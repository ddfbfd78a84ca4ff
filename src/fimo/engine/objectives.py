"""Runs of further training on objectives of their own: other batches, other weights of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size, worker_threads
from fimo.engine.leave_out import Batch, BatchStream, Mask
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.engine.threads import side_by_side
from fimo.models.loss_function import Loss

Batches = Callable[[Tensor], Iterator[Batch]]
"""Returns the batches, without end, of the runs whose numbers ``[R]`` it is given."""


def run_on(
    setting: Setting,
    seed: int,
    runs: int,
    batches: Batches,
    steps: Sequence[int],
    read: Sequence[tuple[Instances, Loss]],
) -> list[Tensor]:
    """Run further training on batches of one's own, and return losses ``[runs, E, n]`` (float64, CPU).

    Args:
        setting: a protocol with a number of steps; its training set holds all instances of the batches.
        seed: of the steps' randomness (dropout), the same for all runs.
        runs: how many.
        steps: ``[E]``, ascending, after which losses are read.
        read: sets of instances, in the evaluation dtype, and which loss is read of them.
    """
    numbers = torch.arange(runs)

    def run(part: Tensor) -> list[Tensor]:
        chunk = Chunk(setting, [Replica(seed)] * len(part))
        # a single run has a companion
        chunk.follow(batches(part[torch.arange(chunk.network.replicas).clamp(max=len(part) - 1)]))
        found: list[list[Tensor]] = [[] for _ in read]
        for step in steps:
            chunk.advance(step)
            for losses, (instances, loss) in zip(found, read, strict=True):
                losses.append(chunk.losses(instances, loss))
        return [torch.stack(losses, 1) for losses in found]

    parts = numbers.split(chunk_size(setting, runs))
    each = side_by_side(run, parts, worker_threads(setting))
    return [torch.cat([part[k] for part in each]) for k in range(len(read))]


def full_batches(
    protocol: Protocol, instances: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Batch]:
    """Yield the batches ``[1, B]`` of a seed's full run over so many training instances, without end."""
    return BatchStream([Replica(seed)], Mask(instances), protocol, dtype, device).starting_at(0)
