"""Seeds' optimizer steps: which instances the full runs see, and what leaving instances out changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.further_training.protocol import Protocol


@dataclass(frozen=True)
class Step:
    """One step of S full runs, and for each of L runs without an instance and K without a group.

    Args:
        index: ``[S, m]``, all instances that any of a seed's runs sees; one that occurs twice counts twice.
        full: ``[m]``, what the full runs multiply their losses with.
        without: ``[S, m, L + K]``, what the runs leaving out instances multiply them with.
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
    groups: Tensor | None = None,
) -> Iterator[Step]:
    """Yield the steps of the seeds' full runs, to their last evaluation point.

    The rules are those of :class:`~fimo.further_training.schedule.BatchStream`. Where ``shift`` makes an
    epoch one step shorter, that step is empty, so that epochs stay aligned.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
        groups: ``[S, K, G]``, instances that K more runs leave out together; ``shift`` is ``mask`` for them.
    """
    total, size = protocol.total_steps(instances), protocol.batch_size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    left_out = left_out.cpu()
    groups = torch.empty(len(seeds), 0, 1, dtype=torch.int64) if groups is None else groups.cpu()
    member = torch.zeros(len(seeds), groups.shape[1], instances, dtype=torch.bool)
    member = member.scatter_(2, groups, True).transpose(1, 2)
    runs = len(left_out) + groups.shape[1]
    shift = protocol.leave_out == "shift"
    kept = instances - 1 if shift else instances
    if protocol.leave_out == "every_batch":  # their losses are subtracted from every batch's
        outside = torch.cat([left_out, groups.flatten()]).unique()
        subtracted = torch.cat(
            [(outside[:, None] == left_out).expand(len(seeds), -1, -1), member[:, outside]], 2
        ).to(dtype)
        subtracted = subtracted / -instances
    taken = 0
    while True:
        order = torch.stack([torch.randperm(instances, generator=g) for g in generators])
        seen = _batch_seen(order, left_out, member, protocol)
        for batch, start in enumerate(range(0, instances, size)):
            stop = min(start + size, instances)
            reach = min(stop + 1, instances) if shift else stop
            window = order[:, start:reach]
            full = torch.full((reach - start,), 1 / (stop - start), dtype=dtype)
            full[stop - start :] = 0.0
            scale = torch.full((runs,), 1 / (stop - start), dtype=dtype)
            scale[: len(left_out)] = 1 / max(1, min(stop, kept) - start)
            without = (seen[:, start:reach] == batch).to(dtype).mul_(scale)
            if protocol.leave_out == "every_batch":
                window = torch.cat([window, outside.expand(len(seeds), -1)], 1)
                full = torch.cat([full, full.new_zeros(len(outside))])
                without = torch.cat([without, subtracted], 1)
            yield Step(window, full, without, protocol.learning_rate(taken, total))
            taken += 1
            if taken == total:
                return


def _batch_seen(order: Tensor, left_out: Tensor, member: Tensor, protocol: Protocol) -> Tensor:
    """Return in which batch ``[S, N, L + K]`` of an epoch each run sees the instance at each place, or -1."""
    seeds, n = order.shape
    at = torch.arange(n, dtype=torch.int32)[:, None]
    hole = torch.argsort(order, 1)[:, None, left_out]  # [S, 1, L], where each left-out instance occurs
    rank = at - (at > hole).int() if protocol.leave_out == "shift" else at.expand(seeds, n, len(left_out))
    alone = torch.div(rank, protocol.batch_size, rounding_mode="floor")
    groups = torch.div(at, protocol.batch_size, rounding_mode="floor").expand(seeds, n, member.shape[2])
    if protocol.leave_out != "every_batch":
        alone.scatter_(1, hole, -1)
        groups = groups.masked_fill(member.gather(1, order[:, :, None].expand(-1, -1, member.shape[2])), -1)
    return torch.cat([alone, groups], 2)
