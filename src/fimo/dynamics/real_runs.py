"""A few real leave-one-out runs: which ones are worth making, and making them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.dynamics.threads import even_parts, side_by_side
from fimo.further_training.chunk import Chunk
from fimo.further_training.protocol import Protocol
from fimo.further_training.replicas import Replica
from fimo.further_training.setting import Setting, worker_threads
from fimo.models.final_model import FinalModel


def worthwhile(size: Tensor, seeds: int, own: float) -> list[tuple[int, int]]:
    """Return all runs as (position of the instance, which of the seeds), the most worthwhile first.

    The n-th run of an instance lowers the share of its effect that isn't known from own / (n - 1 + own) to
    own / (n + own), and makes up for as much of the scores as the effect is large.

    Args:
        size: ``[L]``, squared sizes that effects are expected to have.
        seeds: S; an instance's n-th run is with the n-th seed.
        own: see :data:`~fimo.dynamics.remainder.OWN`.
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
    runs: Sequence[tuple[int, int]],
    at_once: int = 16,
) -> Tensor:
    """Run further training without an instance, and return the test losses ``[K, E, J]`` (float64).

    Args:
        runs: K pairs of a training instance and a seed.
        at_once: most runs that are advanced together.
    """
    setting = Setting.build(final_model, train, test, protocol, train.targets.device)
    order = sorted(range(len(runs)), key=lambda k: runs[k][1])
    mixed = setting.engine == "linear"  # others share their dropout masks, which are a seed's own
    chunks: list[list[int]] = []
    for _, same in itertools.groupby(order, lambda k: None if mixed else runs[k][1]):
        some = list(same)
        waiting = iter(some)
        chunks += [list(itertools.islice(waiting, size)) for size in even_parts(len(some), at_once)]

    def run(chunk: list[int]) -> Tensor:
        running = Chunk(setting, [Replica(runs[k][1], (runs[k][0],)) for k in chunk])
        found = []
        for step in running.evaluation_steps:
            running.advance(step)
            found.append(running.evaluate()[0])
        return torch.stack(found, 1)

    losses = side_by_side(run, chunks, worker_threads(setting))
    back = torch.tensor([k for chunk in chunks for k in chunk]).argsort()
    return torch.cat([found.cpu() for found in losses])[back]
