"""Training rows that act together: duplicates and clusters, each verified by leaving it out as a whole."""

from __future__ import annotations

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
from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.models.final_model import FinalModel

Kind = Literal["duplicates", "duplicates with other targets", "near duplicates", "cluster"]

MOST = 10
"""Groups of each kind."""

LEADERS = 300
"""Rows around which near duplicates are looked for."""

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
        q: ``[G]``, smallest false discovery rate at which the effect's sign is known (Benjamini and Hochberg,
            of t-tests over seeds; groups of other sizes are as noisy as they are, so none borrows another's
            variance).
    """

    mean: Tensor
    sem: Tensor
    q: Tensor

    def verdicts(self, rate: float) -> list[str]:
        """Return ``helpful``, ``harmful`` or ``unclear`` for each group."""
        signs = torch.where(self.q <= rate, self.mean.sign(), 0.0).tolist()
        return [{1.0: "helpful", -1.0: "harmful"}.get(sign, "unclear") for sign in signs]


def measure_groups(
    groups: Sequence[Group], final_model: FinalModel, test: Instances, removal: Removal
) -> Effects:
    """Leave each group out as a whole, all in one job.

    Args:
        removal: whose seeds should be others than those that chose clusters by measured effects.
    """
    if not groups:
        empty = torch.empty(0, dtype=torch.float64)
        return Effects(empty, empty, empty)
    changes = removal(final_model, test, [group.rows for group in groups]).change.mean(1)  # [S, G]
    mean, sem = mean_and_error(changes)
    statistic = torch.where(mean == 0, 0.0, mean.abs() / sem).numpy()
    p = np.nan_to_num(2 * stats.t.sf(statistic, max(1, len(changes) - 1)), nan=1.0)
    return Effects(mean, sem, torch.from_numpy(stats.false_discovery_control(p)))


def group_table(
    groups: Sequence[Group],
    effects: Effects,
    score: Tensor,
    origin: Origin,
    display: Callable[[int], Display],
    rate: float,
) -> pd.DataFrame:
    """Return groups with what their members share, in the columns of :data:`~fimo.audit.result.GROUPS`.

    Args:
        display: a training row as people read it.
        rate: false discovery rate of verdicts.
    """
    ids, rows = origin.ids, origin.row.tolist()
    sample = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLE].tolist()
    read = {k: display(k) for k in sample} if groups else {}
    lines = []
    for number, (group, verdict) in enumerate(zip(groups, effects.verdicts(rate), strict=True)):
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
                "q": float(effects.q[number]),
                "verdict": verdict,
                "shared": shared(
                    [display(k) for k in members[:SAMPLE]],
                    [read[k] for k in sample if k not in inside],
                ),
            }
        )
    return pd.DataFrame(lines, columns=list(GROUPS))
