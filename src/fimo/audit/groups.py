"""Training rows that act together: duplicates and clusters, each verified by leaving it out as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from fimo.audit.clusters import clusters
from fimo.audit.duplicates import duplicates, near_duplicates
from fimo.audit.removal import Removal, mean_and_error
from fimo.audit.result import GROUPS
from fimo.audit.shared import shared
from fimo.audit.verdicts import verdicts
from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.models.final_model import FinalModel

Kind = Literal["duplicates", "duplicates with other targets", "near duplicates", "cluster"]

MOST = 10
"""Groups of each kind."""

LEADERS = 300
"""Rows around which near duplicates are looked for."""

RANDOM = 8
"""Sets of random rows, of the groups' sizes, by which is known what leaving out so many rows does."""

SAMPLE = 500
"""Rows outside a group with which its members are compared in words, and members that are read."""


@dataclass(frozen=True)
class Group:
    """Rows that are the same or act alike, by position, ascending."""

    kind: Kind
    rows: tuple[int, ...]


def find_groups(
    train: Instances, score: Tensor, effects: Tensor | None, rows: Sequence[int], most: int = MOST
) -> list[Group]:
    """Return groups of rows worth leaving out together.

    Of each kind those whose summed scores are largest; none of more than half of all rows, none twice.

    Args:
        train: as the whole network takes them.
        score: ``[N]``, predicted effects on the mean test loss.
        effects: ``[S, J, R]`` measured or ``[J, R]`` predicted effects over test instances, of the rows that
            are clustered; None: no clusters.
        rows: ``[R]``, which these are.
        most: groups of a kind.
    """
    targets = train.targets.reshape(len(train), -1)
    same: list[Group] = []
    for members in duplicates(train):
        agree = bool((targets[list(members)] == targets[members[0]]).all())
        same.append(Group("duplicates" if agree else "duplicates with other targets", members))
    leaders = score.abs().argsort(descending=True, stable=True)[:LEADERS].tolist()
    near = [Group("near duplicates", members) for members in near_duplicates(train, leaders)]
    alike = [] if effects is None else [Group("cluster", members) for members in clusters(effects, rows)]
    found: list[Group] = []
    for group in sorted([*same, *near, *alike], key=lambda group: -abs(float(score[list(group.rows)].sum()))):
        kept = sum(other.kind == group.kind for other in found)
        known = any(other.rows == group.rows for other in found)
        if kept < most and not known and 2 * len(group.rows) <= len(train):
            found.append(group)
    return found


@dataclass(frozen=True)
class Effects:
    """Effects of G groups on the mean test loss, measured with S seeds.

    Args:
        mean, sem: ``[G]``; NaN where S is 1, for ``sem``.
        beyond, beyond_sem: ``[G]``, the same beyond the effect of as many random rows.
        q: ``[G]``, smallest false discovery rate at which the sign of ``beyond`` is known (Benjamini and
            Hochberg, of t-tests over seeds; groups of other sizes are as noisy as they are, so none borrows
            another's variance).
    """

    mean: Tensor
    sem: Tensor
    beyond: Tensor
    beyond_sem: Tensor
    q: Tensor

    def verdicts(self, rate: float, better: int = 1) -> list[str]:
        """Return ``helpful``, ``harmful`` or ``unclear`` for each group, by its sign."""
        return verdicts(self.beyond, self.q, rate, better)


def measure_groups(
    groups: Sequence[Group], final_model: FinalModel, test: Instances, removal: Removal
) -> Effects:
    """Leave each group out as a whole, and as many random rows, all in one job.

    Without any rows a run is another: under ``mask`` its steps are shorter, so that where a model still
    improves all groups would seem helpful, the more the larger they are. That is a line through 0 in the
    number of rows, fitted to random sets of each seed; its error for other sets is part of every bar.

    Args:
        removal: whose seeds should be others than those that chose clusters by measured effects.
    """
    if not groups:
        empty = torch.empty(0, dtype=torch.float64)
        return Effects(empty, empty, empty, empty, empty)
    random = _random_sets([len(group.rows) for group in groups], len(removal.train))
    asked = [*(group.rows for group in groups), *random]
    changes = removal(final_model, test, asked).change.mean(1)  # [S, G + R]
    size = torch.tensor([len(set(rows)) for rows in asked], dtype=changes.dtype)
    (of_groups, of_random), (sizes, drawn) = (
        x.split([len(groups), len(random)], -1) for x in (changes, size)
    )
    squares = drawn.square().sum()
    slope = of_random @ drawn / squares  # [S]
    missed = of_random.mean(0) - slope.mean() * drawn
    of_sets = missed.square().sum() / (len(random) - 1) / squares
    mean, sem = mean_and_error(of_groups)
    beyond, error = mean_and_error(of_groups - slope[:, None] * sizes)
    error = (error.square() + of_sets * sizes.square()).sqrt()
    statistic = torch.where(beyond == 0, 0.0, beyond.abs() / error).numpy()
    p = np.nan_to_num(2 * stats.t.sf(statistic, max(1, len(changes) - 1)), nan=1.0)
    return Effects(mean, sem, beyond, error, torch.from_numpy(stats.false_discovery_control(p)))


def _random_sets(sizes: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return sets of random ones of n rows, of sizes in the upper half of those given: they say most."""
    generator = torch.Generator().manual_seed(0)
    different = sorted(set(sizes))
    places = [(len(different) - 1) * (0.5 + 0.5 * k / (RANDOM - 1)) for k in range(RANDOM)]
    chosen = [different[math.ceil(place)] for place in places]
    return [tuple(torch.randperm(n, generator=generator)[:size].tolist()) for size in chosen]


def group_table(
    groups: Sequence[Group],
    effects: Effects,
    score: Tensor,
    origin: Origin,
    display: Callable[[int], Display],
    rate: float,
    better: int = 1,
) -> pd.DataFrame:
    """Return groups with what their members share, in the columns of :data:`~fimo.audit.result.GROUPS`.

    Args:
        display: a training row as people read it.
        rate: false discovery rate of verdicts.
        better: see :class:`~fimo.models.measured.Measured`.
    """
    ids, rows = origin.ids, origin.row.tolist()
    sample = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLE].tolist()
    read = {k: display(k) for k in sample} if groups else {}
    lines = []
    for number, (group, verdict) in enumerate(zip(groups, effects.verdicts(rate, better), strict=True)):
        members, inside = group.rows, set(group.rows)
        lines.append(
            {
                "group": number,
                "kind": group.kind,
                "size": len(members),
                "rows": " ".join(str(rows[k]) for k in members),
                "ids": " ".join(ids[k] for k in members),
                "score": float(score[list(members)].sum()),
                "effect": float(effects.mean[number]),
                "effect_sem": float(effects.sem[number]),
                "beyond_random": float(effects.beyond[number]),
                "beyond_random_sem": float(effects.beyond_sem[number]),
                "q": float(effects.q[number]),
                "verdict": verdict,
                "shared": shared(
                    [display(k) for k in members[:SAMPLE]],
                    [read[k] for k in sample if k not in inside],
                ),
            }
        )
    return pd.DataFrame(lines, columns=list(GROUPS))
