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
    taken = 0
    while True:
        order = torch.randperm(instances, generator=generator)
        at = torch.arange(instances)
        hole = torch.argsort(order)[left_out]  # [L], where in this epoch each left-out instance occurs
        rank = at[:, None] - (at[:, None] > hole).long() if protocol.leave_out == "shift" else at[:, None]
        kept = instances - 1 if protocol.leave_out == "shift" else instances
        for start in range(0, instances, size):
            stop = min(start + size, instances)
            reach = min(stop + 1, instances) if protocol.leave_out == "shift" else stop
            window, here = order[start:reach], at[start:reach]
            full = (here < stop).to(dtype) / (stop - start)
            seen = (rank[start:reach] >= start) & (rank[start:reach] < stop)
            without = seen.to(dtype) / max(1, min(stop, kept) - start)
            without = without.expand(len(here), len(left_out)).clone()
            if protocol.leave_out != "every_batch":
                without[here[:, None] == hole] = 0.0
                masked = full[:, None].masked_fill(member[window], 0.0)
            else:
                apart = member.any(1)
                apart[left_out] = True
                apart[window] = False
                missing = apart.nonzero()[:, 0]  # their losses are subtracted from every batch's
                window = torch.cat([window, missing])
                full = torch.cat([full, full.new_zeros(len(missing))])
                without = torch.cat([without, without.new_zeros(len(missing), len(left_out))])
                without -= (window[:, None] == left_out).to(dtype) / instances
                masked = full[:, None] - member[window].to(dtype) / instances
            without = torch.cat([without, masked], 1)
            yield Step(window, full, without, protocol.learning_rate(taken, total))
            taken += 1
            if taken == total:
                return
