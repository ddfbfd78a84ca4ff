"""Why this prediction? The rows that hold it where it is, and what becomes of it without them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.audit.explained import Explained, Shown
from fimo.audit.removal import Removal, Removed, mean_and_error
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.quantities import CLASS, MEASUREMENT, measuring

COUNTS = (1, 2, 5, 10, 20)
"""Numbers of rows that are left out together."""

Side = Literal["lowers", "raises"]
"""What leaving the rows out is predicted to do to the explained number."""


@dataclass(frozen=True)
class Step:
    """Further training without k rows together, over S seeds.

    Args:
        side: what leaving them out was predicted to do.
        rows: ``k`` positions of training rows.
        loss, loss_sem: change of the test instance's loss.
        change, change_sem: of its prediction: a class's probability, or in the target's own units.
        without: the prediction without them.
        turned: share of seeds in which another class is predicted than in the full run; NaN of a regression.
        label: the class that is predicted most often without them; -1 of a regression.
    """

    side: Side
    rows: tuple[int, ...]
    loss: float
    loss_sem: float
    change: float
    change_sem: float
    without: float
    turned: float
    label: int


@dataclass(frozen=True)
class Answer:
    """Why a test instance is predicted as it is.

    Args:
        full: the explained number after further training on all rows, mean over seeds.
        kept: share of seeds whose full run still predicts the final model's class; 1 of a regression.
        steps: by side, with growing numbers of rows.
        seeds: S.
    """

    explained: Explained
    full: float
    kept: float
    steps: tuple[Step, ...]
    seeds: int

    @property
    def turned_by(self) -> Step | None:
        """The first step that turns the prediction in most seeds."""
        return next((step for step in self.steps if step.turned > 0.5), None)


def why(
    final_model: FinalModel,
    test: Instances,
    numbers: Sequence[Explained],
    scores: Tensor,
    removal: Removal,
    shown: Shown,
    counts: Sequence[int] = COUNTS,
) -> list[Answer]:
    """Leave the rows that hold each prediction out together, and see where it goes.

    Of a class's probability, the rows whose removal lowers it; of a regression, those whose removal lowers
    the value, and those whose removal raises it. All groups of all test instances are one job.

    Args:
        numbers: M of them, see :func:`explained`.
        scores: ``[M, N]``, predicted (where it was measured, the measured) change of each measured
            prediction, in any unit, when a row is left out.
        counts: of rows left out together.
    """
    wanted = [
        (m, side, rows)
        for m, number in enumerate(numbers)
        for side in sides(number)
        for rows in foremost(number.sign * scores[m], side, counts)
    ]
    if not wanted:
        return [Answer(number, float("nan"), float("nan"), (), len(removal.seeds)) for number in numbers]
    index = torch.tensor([number.position for number in numbers])
    parts: list[tuple[Instances, int | Sequence[int]]]
    parts = [(test[index], MEASUREMENT), (test[index], [number.which for number in numbers])]
    if numbers[0].link == "softmax":
        parts.append((test[index], CLASS))
    model, instances = measuring(final_model, parts)
    removed = removal(model, instances, [rows for _, _, rows in wanted])
    found = []
    for m, number in enumerate(numbers):
        steps = [(column, side, rows) for column, (k, side, rows) in enumerate(wanted) if k == m]
        found.append(_answer(number, removed, m, len(numbers), steps, shown))
    return found


def sides(number: Explained) -> tuple[Side, ...]:
    """Return which rows are of interest: what is a class's support, or both directions of a value."""
    return ("lowers", "raises") if number.link == "identity" else ("lowers",)


def foremost(score: Tensor, side: Side, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the k rows whose removal moves a number furthest to a side, for each k that is there.

    Args:
        score: ``[N]``, of the change by removal.
    """
    change = score if side == "lowers" else -score
    order = change.argsort(stable=True).tolist()
    most = min(int((change < 0).sum()), len(order) // 2)
    return [tuple(order[:k]) for k in sorted(set(counts)) if k <= most]


def _answer(
    number: Explained,
    removed: Removed,
    m: int,
    count: int,
    steps: Sequence[tuple[int, Side, tuple[int, ...]]],
    shown: Shown,
) -> Answer:
    """Read one test instance's values: its loss at m, its number at M + m, its class at 2M + m."""

    def labels(values: Tensor) -> Tensor | None:  # [S, J] -> [S]
        if number.link == "softmax":
            return values[:, 2 * count + m].round().long()
        return (values[:, count + m] >= 0.5).long() if number.link == "sigmoid" else None

    full, before = number.read(removed.full[:, count + m], shown), labels(removed.full)
    kept = torch.ones(len(full), dtype=torch.bool) if before is None else before == number.label
    found = []
    for column, side, rows in steps:
        without = number.read(removed.without[:, count + m, column], shown)
        loss, loss_sem = mean_and_error(removed.change[:, m, column])
        change, change_sem = mean_and_error(without - full)
        turned, label = float("nan"), -1
        if (now := labels(removed.without[..., column])) is not None:
            turned, label = float(((now != before) & kept).double().mean()), int(now.mode().values)
        values = {"loss": loss, "loss_sem": loss_sem, "change": change, "change_sem": change_sem}
        found.append(
            Step(
                side,
                rows,
                **{name: float(value) for name, value in values.items()},
                without=float(without.mean()),
                turned=turned,
                label=label,
            )
        )
    return Answer(number, float(full.mean()), float(kept.double().mean()), tuple(found), len(full))
