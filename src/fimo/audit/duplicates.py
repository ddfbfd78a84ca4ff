"""Training rows that are the same, or nearly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.data.duplicates import duplicate_groups
from fimo.data.instances import Instances

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
        leaders: R rows, the most important first; O(R N d) in time.
        distance: root mean square over features that vary, each in its standard deviations over rows.
    """
    if not isinstance(train.inputs, Tensor) or not train.inputs.is_floating_point() or len(train) < 3:
        return []
    rows = train.inputs.reshape(len(train), -1).float()
    standard = _standard(rows)
    if standard is None:
        return []
    first = torch.tensor([int(leader) for leader in leaders], device=rows.device)
    first = first[_apart(standard(rows[first]), distance)]
    found: list[tuple[int, ...]] = []
    taken: set[int] = set()
    near = _near(rows, standard(rows[first]), standard, distance)
    for leader, (members, furthest) in zip(first.tolist(), near, strict=True):
        if leader in taken or len(members) < 2 or furthest == 0:
            continue
        found.append(tuple(members.tolist()))
        taken.update(found[-1])
    return found


def _standard(rows: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return what makes some rows ``[n, d]`` ones whose distances count; None where nothing varies.

    Args:
        rows: ``[N, d]``, all of them.
    """
    deviation, mean = rows.std(0), rows.mean(0)
    vary = deviation > 0
    if not vary.any():
        return None
    scale = deviation[vary] * vary.sum() ** 0.5
    return lambda some: (some - mean)[:, vary] / scale


def _apart(leaders: Tensor, distance: float) -> Tensor:
    """Return the numbers of leaders ``[R, d]``, in order, that are not near to an earlier one of these.

    The others make no group: they are in the earlier one's, or the same as it, and then it takes them or has
    only such members. Of rows that are left, few are near to the same one, so that all that are near to them
    are about N pairs and not R N.
    """
    kept: list[int] = []
    for k, leader in enumerate(leaders):
        if not kept or bool(((leaders[kept] - leader).square().sum(1).sqrt() > distance).all()):
            kept.append(k)
    return torch.tensor(kept, dtype=torch.int64, device=leaders.device)


def _near(
    rows: Tensor, leaders: Tensor, standard: Callable[[Tensor], Tensor], distance: float
) -> list[tuple[Tensor, float]]:
    """Return for each of R leaders the rows within a distance of it, ascending, and how far the furthest is.

    Products of matrices find candidates, and differences, which don't cancel, tell which are near.

    Args:
        rows: ``[N, d]``.
        leaders: ``[R, d]``, standard.
    """
    near: list[list[Tensor]] = [[] for _ in leaders]
    furthest = torch.zeros(len(leaders), device=rows.device, dtype=torch.float32)
    size = leaders.square().sum(1)
    for start in range(0, len(rows), BLOCK):
        theirs = standard(rows[start : start + BLOCK])
        whole = size[:, None] + theirs.square().sum(1)
        rounding = 1e-4 * whole  # of float32, with room
        candidates = (whole - 2 * leaders @ theirs.T <= distance**2 + rounding).nonzero()
        for some in candidates.split(BLOCK):
            apart = (leaders[some[:, 0]] - theirs[some[:, 1]]).square().sum(1).sqrt()
            which, row = some[apart <= distance].unbind(1)
            furthest.scatter_reduce_(0, which, apart[apart <= distance], "amax")
            for k in which.unique().tolist():
                near[k].append(start + row[which == k])
    none = torch.empty(0, dtype=torch.int64)
    return [
        (torch.cat(parts) if parts else none, f) for parts, f in zip(near, furthest.tolist(), strict=True)
    ]
