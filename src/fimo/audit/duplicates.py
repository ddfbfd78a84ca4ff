"""Training rows that are the same, or nearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.leave_out import duplicate_groups

NEAR = 0.05
"""Nearly the same: as many standard deviations apart, as root mean square over features."""

BLOCK = 4096
"""Rows that are compared at a time."""


def duplicates(train: Instances) -> list[tuple[int, ...]]:
    """Return the groups of rows whose inputs are exactly the same, whatever their targets are.

    By sorting their bytes: O(N log N).
    """
    blank = replace(train, targets=torch.zeros(len(train), dtype=torch.uint8))
    number = duplicate_groups(blank)
    sizes = number.bincount()
    several = (sizes[number] > 1).nonzero().flatten()
    order = several[number[several].argsort(stable=True)]
    return [tuple(part.tolist()) for part in order.split(sizes[sizes > 1].tolist())]


def near_duplicates(
    train: Instances, leaders: Sequence[int], distance: float = NEAR
) -> list[tuple[int, ...]]:
    """Return groups of rows whose inputs are nearly the same, around some rows.

    Each group is a leader and all rows within the distance of it, so that groups don't grow along chains; a
    leader that is in a group already makes none. Those whose members are exactly the same are left to
    :func:`duplicates`. Only inputs of one floating-point tensor have distances.

    Args:
        leaders: R rows, the most important first; O(R N d).
        distance: root mean square over features that vary, each in its standard deviations over rows.
    """
    if not isinstance(train.inputs, Tensor) or not train.inputs.is_floating_point() or len(train) < 3:
        return []
    rows = train.inputs.reshape(len(train), -1).float()
    leaders = [int(leader) for leader in leaders]
    near = _pairs(rows, torch.tensor(leaders, device=rows.device), distance)
    found: list[tuple[int, ...]] = []
    taken: set[int] = set()
    for k, leader in enumerate(leaders):
        members, apart = near[k]
        if leader in taken or len(members) < 2 or max(apart) == 0:
            continue
        taken.update(members)
        found.append(tuple(members))
    return found


def _pairs(rows: Tensor, leaders: Tensor, distance: float) -> list[tuple[list[int], list[float]]]:
    """Return for each of R leaders the rows within a distance of it, ascending, and how far they are.

    Products of matrices find candidates, and differences, which don't cancel, tell which are near.

    Args:
        rows: ``[N, d]``.
    """
    deviation, mean = rows.std(0), rows.mean(0)
    vary = deviation > 0
    near: list[tuple[list[int], list[float]]] = [([], []) for _ in leaders]
    if not vary.any():
        return near
    scale = deviation[vary] * vary.sum() ** 0.5

    def standard(some: Tensor) -> Tensor:
        return (some - mean)[:, vary] / scale

    ours = standard(rows[leaders])
    size = ours.square().sum(1)
    for start in range(0, len(rows), BLOCK):
        theirs = standard(rows[start : start + BLOCK])
        whole = size[:, None] + theirs.square().sum(1)
        rounding = 1e-4 * whole  # of float32, with room
        candidates = (whole - 2 * ours @ theirs.T <= distance**2 + rounding).nonzero()
        for some in candidates.split(BLOCK):
            apart = (ours[some[:, 0]] - theirs[some[:, 1]]).square().sum(1).sqrt()
            kept = apart <= distance
            for (k, row), d in zip(some[kept].tolist(), apart[kept].tolist(), strict=True):
                near[k][0].append(start + row)
                near[k][1].append(d)
    return near
