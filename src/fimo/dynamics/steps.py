"""A seed's optimizer steps: which instances the full run sees, and what leaving instances out changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.further_training.protocol import Protocol


@dataclass(frozen=True)
class Step:
    """One step of L runs that leave out an instance and K that leave out a group, beside the full run's.

    Args:
        index: ``[m]``, all instances that any of the runs sees.
        full: ``[m]``, what the full run multiplies their losses with.
        without: ``[m, L + K]``, what the runs leaving out instances multiply them with.
        lr: learning rate.
    """

    index: Tensor
    full: Tensor
    without: Tensor
    lr: float


def steps(
    seed: int,
    left_out: Tensor,
    instances: int,
    protocol: Protocol,
    dtype: torch.dtype,
    groups: Tensor | None = None,
) -> Iterator[Step]:
    """Yield the steps of a seed's full run, to its last evaluation point.

    The rules are those of :class:`~fimo.further_training.schedule.BatchStream`. Where ``shift`` makes an
    epoch one step shorter, that step is empty, so that epochs stay aligned.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
        groups: ``[K, G]``, instances that K more runs leave out together; ``shift`` is ``mask`` for them.
    """
    total, size = protocol.total_steps(instances), protocol.batch_size
    generator = torch.Generator().manual_seed(seed)
    left_out = left_out.cpu()
    groups = torch.empty(0, 0, dtype=torch.int64) if groups is None else groups.cpu()
    member = torch.zeros(instances, len(groups), dtype=torch.bool)
    member.scatter_(0, groups.T, True)
    everywhere = torch.cat([left_out, groups.flatten()]).unique()
    taken = 0
    while True:
        order = torch.randperm(instances, generator=generator)
        seen = _batch_seen(order, left_out, member, protocol)
        kept = instances - 1 if protocol.leave_out == "shift" else instances
        for batch, start in enumerate(range(0, instances, size)):
            stop = min(start + size, instances)
            reach = min(stop + 1, instances) if protocol.leave_out == "shift" else stop
            window = order[start:reach]
            full = torch.full((reach - start,), 1 / (stop - start), dtype=dtype)
            full[stop - start :] = 0.0
            without = (seen[start:reach] == batch).to(dtype)
            without[:, : len(left_out)] /= max(1, min(stop, kept) - start)
            without[:, len(left_out) :] /= stop - start
            if protocol.leave_out == "every_batch":
                missing = everywhere[~torch.isin(everywhere, window)]
                window = torch.cat([window, missing])  # their losses are subtracted from every batch's
                full = torch.cat([full, full.new_zeros(len(missing))])
                without = torch.cat([without, without.new_zeros(len(missing), without.shape[1])])
                without[:, : len(left_out)] -= (window[:, None] == left_out).to(dtype) / instances
                without[:, len(left_out) :] -= member[window].to(dtype) / instances
            yield Step(window, full, without, protocol.learning_rate(taken, total))
            taken += 1
            if taken == total:
                return


def _batch_seen(order: Tensor, left_out: Tensor, member: Tensor, protocol: Protocol) -> Tensor:
    """Return in which batch ``[N, L + K]`` of an epoch each run sees the instance at each place, or -1."""
    at = torch.arange(len(order), dtype=torch.int32)[:, None]
    hole = torch.argsort(order)[left_out]  # where each left-out instance occurs
    rank = at - (at > hole).int() if protocol.leave_out == "shift" else at
    alone = (rank // protocol.batch_size).expand(len(order), len(left_out)).clone()
    groups = (at // protocol.batch_size).expand(-1, member.shape[1])
    if protocol.leave_out != "every_batch":
        alone[hole, torch.arange(len(left_out))] = -1
        groups = groups.masked_fill(member[order], -1)
    return torch.cat([alone, groups], 1)
