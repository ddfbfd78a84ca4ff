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

NUMBERS = 2**24
"""Differences computed at a time."""


def duplicates(train: Instances) -> list[tuple[int, ...]]:
    """Return the groups of rows whose inputs are exactly the same, whatever their targets are.

    By sorting their bytes: O(N log N).
    """
    blank = replace(train, targets=torch.zeros(len(train), dtype=torch.uint8))
    number = duplicate_groups(blank)
    order = number.argsort(stable=True)
    sizes = number.bincount().tolist()
    return [tuple(part.tolist()) for part in order.split(sizes) if len(part) > 1]


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
    deviation = rows.std(0)
    vary = deviation > 0
    if not vary.any():
        return []
    rows = ((rows - rows.mean(0)) / deviation)[:, vary] / vary.sum() ** 0.5
    found: list[tuple[int, ...]] = []
    taken: set[int] = set()
    leaders = [int(leader) for leader in leaders]
    for some in torch.tensor(leaders).split(max(1, NUMBERS // len(rows))):
        apart = torch.cdist(rows[some], rows, compute_mode="donot_use_mm_for_euclid_dist")
        for leader, row in zip(some.tolist(), apart, strict=True):
            members = (row <= distance).nonzero().flatten().tolist()
            if leader in taken or len(members) < 2 or float(row[members].max()) == 0:
                continue
            taken.update(members)
            found.append(tuple(members))
    return found
