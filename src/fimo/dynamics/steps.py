"""Seeds' optimizer steps: which instances the full runs see, and what leaving instances out changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.further_training.protocol import Protocol


@dataclass(frozen=True)
class Step:
    """One step of S full runs, and for each of L runs without an instance.

    Args:
        index: ``[S, m]``, all instances that any of a seed's runs sees; one that occurs twice counts twice.
        full: ``[m]``, what the full runs multiply their losses with.
        without: ``[S, m, L]``, what the runs leaving out an instance multiply them with.
        lr: learning rate.
    """

    index: Tensor
    full: Tensor
    without: Tensor
    lr: float


def steps(
    seeds: Sequence[int],
    left_out: Tensor,
    instances: int,
    protocol: Protocol,
    dtype: torch.dtype,
) -> Iterator[Step]:
    """Yield the steps of the seeds' full runs, to their last evaluation point.

    The rules are those of :class:`~fimo.further_training.schedule.BatchStream`. Where ``shift`` makes an
    epoch one step shorter, that step is empty, so that epochs stay aligned.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
    """
    total, size = protocol.total_steps(instances), protocol.batch_size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    left_out = left_out.cpu()
    shift = protocol.leave_out == "shift"
    kept = instances - 1 if shift else instances
    if protocol.leave_out == "every_batch":  # their losses are subtracted from every batch's
        outside = left_out.unique()
        subtracted = (outside[:, None] == left_out).to(dtype).expand(len(seeds), -1, -1) / -instances
    taken = 0
    while True:
        order = torch.stack([torch.randperm(instances, generator=g) for g in generators])
        seen = _batch_seen(order, left_out, protocol)
        for batch, start in enumerate(range(0, instances, size)):
            stop = min(start + size, instances)
            reach = min(stop + 1, instances) if shift else stop
            window = order[:, start:reach]
            full = torch.full((reach - start,), 1 / (stop - start), dtype=dtype)
            full[stop - start :] = 0.0
            without = (seen[:, start:reach] == batch).to(dtype).div_(max(1, min(stop, kept) - start))
            if protocol.leave_out == "every_batch":
                window = torch.cat([window, outside.expand(len(seeds), -1)], 1)
                full = torch.cat([full, full.new_zeros(len(outside))])
                without = torch.cat([without, subtracted], 1)
            yield Step(window, full, without, protocol.learning_rate(taken, total))
            taken += 1
            if taken == total:
                return


def _batch_seen(order: Tensor, left_out: Tensor, protocol: Protocol) -> Tensor:
    """Return in which batch ``[S, N, L]`` of an epoch each run sees the instance at each place, or -1."""
    seeds, n = order.shape
    at = torch.arange(n, dtype=torch.int32)[:, None]
    hole = torch.argsort(order, 1)[:, None, left_out]  # [S, 1, L], where each left-out instance occurs
    rank = at - (at > hole).int() if protocol.leave_out == "shift" else at.expand(seeds, n, len(left_out))
    seen = torch.div(rank, protocol.batch_size, rounding_mode="floor")
    return seen if protocol.leave_out == "every_batch" else seen.scatter_(1, hole, -1)
