"""A seed's optimizer steps: which instances the full run sees, and what leaving instances out changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.further_training.protocol import Protocol


@dataclass(frozen=True)
class Step:
    """One step of L runs that leave out an instance, aligned with the full run's.

    Args:
        index: ``[m]``, all instances that any of the runs sees.
        full: ``[m]``, what the full run multiplies their losses with.
        without: ``[m, L]``, what the runs leaving out instances multiply them with.
        lr: learning rate.
    """

    index: Tensor
    full: Tensor
    without: Tensor
    lr: float


def steps(
    seed: int, left_out: Tensor, instances: int, protocol: Protocol, dtype: torch.dtype
) -> Iterator[Step]:
    """Yield the steps of a seed's full run, to its last evaluation point.

    The rules are those of :class:`~fimo.further_training.schedule.BatchStream`. Where ``shift`` makes an
    epoch one step shorter, that step is empty, so that epochs stay aligned.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
    """
    total, size = protocol.total_steps(instances), protocol.batch_size
    generator = torch.Generator().manual_seed(seed)
    left_out = left_out.cpu()
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
            else:
                window, full, without = _everywhere(window, full, without, left_out, instances)
            yield Step(window, full, without, protocol.learning_rate(taken, total))
            taken += 1
            if taken == total:
                return


def _everywhere(
    window: Tensor, full: Tensor, without: Tensor, left_out: Tensor, instances: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract each run's own loss / N, whether or not the batch holds the instance."""
    missing = left_out[~torch.isin(left_out, window)].unique()
    window = torch.cat([window, missing])
    full = torch.cat([full, full.new_zeros(len(missing))])
    without = torch.cat([without, without.new_zeros(len(missing), without.shape[1])])
    return window, full, without - (window[:, None] == left_out).to(without.dtype) / instances
