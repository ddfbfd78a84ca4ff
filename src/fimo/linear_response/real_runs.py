"""A few real leave-one-out runs: which ones are worth making, and making them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size, worker_threads
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica, next_chunk
from fimo.engine.threads import side_by_side
from fimo.models.final_model import FinalModel


def worthwhile(size: Tensor, seeds: int, own: float) -> list[tuple[int, int]]:
    """Return all runs as (position of the instance, which of the seeds), the most worthwhile first.

    The n-th run of an instance lowers the share of its effect that isn't known from own / (n - 1 + own) to
    own / (n + own), and makes up for as much of the scores as the effect is large.

    Args:
        size: ``[L]``, squared sizes that effects are expected to have.
        seeds: S; an instance's n-th run is with the n-th seed.
        own: see :data:`~fimo.linear_response.discrepancy.OWN`.
    """
    unknown = own / (torch.arange(seeds + 1, dtype=torch.float64) + own)
    gain = size.double()[:, None] * (unknown[:-1] - unknown[1:])
    order = gain.flatten().argsort(descending=True, stable=True).tolist()
    return [(k // seeds, k % seeds) for k in order]


def run_without(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    runs: Sequence[tuple[int | None, int]],
    at_once: int | None = None,
) -> Tensor:
    """Run further training without an instance, and return the test losses ``[K, E, J]`` (float64).

    Args:
        runs: K pairs of a training instance (None: the full run) and a seed.
        at_once: most runs that are advanced together; None: as many as the gold standard's.
    """
    setting = Setting.build(final_model, train, test, protocol, train.targets.device)
    size = chunk_size(setting, len(runs)) if at_once is None else at_once
    replicas = [Replica(seed, () if instance is None else (instance,)) for instance, seed in runs]
    waiting, chunks = dict.fromkeys(sorted(replicas)), []
    while waiting:
        chunks.append(next_chunk(waiting, size, setting.rule.width, setting.stochastic))
        for replica in chunks[-1]:
            del waiting[replica]

    def run(chunk: list[Replica]) -> Tensor:
        running, found = Chunk(setting, chunk), []
        for step in running.evaluation_steps:
            running.advance(step)
            found.append(running.evaluate()[0])
        return torch.stack(found, 1).cpu()

    losses: dict[Replica, Tensor] = {}
    for chunk, found in zip(chunks, side_by_side(run, chunks, worker_threads(setting)), strict=True):
        losses.update(zip(chunk, found, strict=True))
    return torch.stack([losses[replica] for replica in replicas])
