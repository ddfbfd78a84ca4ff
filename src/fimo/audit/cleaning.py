"""What to do about it: the table without rows that harm, and the proof that it is better without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.audit.explained import Shown
from fimo.audit.removal import Removal, mean_and_error
from fimo.audit.result import KEPT, PROOF
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.models.final_model import FinalModel
from fimo.models.quantities import CORRECT, MEASUREMENT, measuring, predicted

NOTHING, HARMFUL, RANDOM = "nothing", "harmful and suspect rows", "as many random rows"

DRAWS = 5
"""Sets of random rows."""

COMPARED = ("change", "change_sem", "change_sem_tests", "beyond_random", "beyond_random_sem")
"""Columns beside those of :data:`~fimo.audit.result.PROOF`."""


def cleaned(frame: pd.DataFrame | None, origin: Origin, removed: Sequence[int]) -> pd.DataFrame:
    """Return the user's table without some training rows; all other rows and all columns as they are.

    Args:
        frame: the source's rows, in its order; None where there is no table, and then the rows and
            identifiers of the training instances that are kept are returned.
        origin: of the training instances.
        removed: their positions.
    """
    out = np.zeros(len(origin), dtype=bool)
    out[list(removed)] = True
    if frame is None:
        kept = pd.DataFrame(dict(zip(KEPT, (origin.row, origin.ids), strict=True)))[~out]
        return kept.sort_values("row", kind="stable").reset_index(drop=True)
    keep = np.ones(len(frame), dtype=bool)
    keep[origin.row[out]] = False
    kept = frame[keep]
    kept = kept.reset_index(drop=True) if isinstance(frame.index, pd.RangeIndex) else kept
    kept.attrs |= frame.attrs  # which say whether the file names its columns
    return kept


def halves(tests: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the positions of the test instances as two random halves, each ascending."""
    order = torch.randperm(tests, generator=torch.Generator().manual_seed(seed))
    first, second = (part.sort().values for part in (order[: tests // 2], order[tests // 2 :]))
    return first, second


@dataclass(frozen=True)
class Halves:
    """Two halves of the test instances, and the rows that each chose to be left out.

    Args:
        tests: positions of test instances.
        chosen: positions of training rows, by harm to that half alone; and those that no test instance chose.
    """

    tests: tuple[Tensor, Tensor]
    chosen: tuple[tuple[int, ...], tuple[int, ...]]


def proof(
    final_model: FinalModel,
    test: Instances,
    split: Halves,
    removal: Removal,
    shown: Shown | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare further training without chosen rows, without as many random rows, and on all rows.

    The rows that one half of the test instances chose are judged on the other half; the two are put together
    by their sizes. So no test instance judges rows that it chose, and each is counted once.

    Args:
        final_model, test: as admitted; J test instances.
        removal: with S seeds.
        shown: units of a regression's target.
        draws: random sets for each half.
        seed: of their draw.

    Returns:
        A line for each metric (``test loss``; ``accuracy``, or ``error``, the mean absolute one in the
        target's own units) and each set of rows, in the columns of :data:`~fimo.audit.result.PROOF`: ``mean``
        is the level, and ``sem`` its standard error over seeds (of random rows over draws too). Then
        :data:`COMPARED`: the change against further training on all rows of the same seeds, with its
        standard errors over seeds (of random rows over draws too) and over test instances, and the change
        beyond that by random rows. Without lines where no rows were chosen.
    """
    if not any(split.chosen):
        return pd.DataFrame(columns=[*PROOF, *COMPARED])
    n = len(removal.train)
    generator = torch.Generator().manual_seed(seed)
    groups: list[tuple[int, ...]] = []
    for rows in split.chosen:
        orders = [torch.randperm(n, generator=generator) for _ in range(draws)]
        groups += [tuple(rows), *(tuple(order[: len(rows)].tolist()) for order in orders)]
    values = _measured(final_model, test, [g for g in groups if g], removal, shown or Shown())
    lines = []
    for metric, (full, without) in values.items():
        change = torch.zeros(*full.shape, len(groups), dtype=torch.float64)
        change[..., [k for k, g in enumerate(groups) if g]] = without - full[..., None]
        # of each test instance, by what the other half chose: [S, J, 1 + draws]
        crossed = torch.empty(*full.shape, 1 + draws, dtype=torch.float64)
        by_half = change.unflatten(2, (2, 1 + draws))
        for half, other in ((0, 1), (1, 0)):
            judges = split.tests[other]
            crossed[:, judges] = by_half[:, judges, half]
        lines += _lines(metric, full, crossed, split, len(removal.seeds))
    return pd.DataFrame(lines, columns=[*PROOF, *COMPARED])


def _measured(
    final_model: FinalModel,
    test: Instances,
    groups: Sequence[Sequence[int]],
    removal: Removal,
    shown: Shown,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each test instance's value by metric: ``[S, J]`` on all rows, ``[S, J, L]`` without groups."""
    by_loss = FinalModel(final_model.network, final_model.loss, None, final_model.trainable, accept_poor=True)
    link, values = predicted(by_loss, test[:1])
    parts: list[tuple[Instances, int]] = [(test, MEASUREMENT)]
    if link == "softmax":
        parts.append((test, CORRECT))
    elif link != "tokens" and values.shape[1] == 1:
        parts.append((test, 0))
    model, instances = measuring(by_loss, parts)
    removed = removal(model, instances, groups)
    j = len(test)
    found = {"test loss": (removed.full[:, :j], removed.without[:, :j])}
    if len(parts) == 1:
        return found
    full, without = removed.full[:, j:], removed.without[:, j:]
    if link == "softmax":
        return found | {"accuracy": (full, without)}
    targets = test.targets.reshape(j).double().cpu()
    if link == "sigmoid":
        labels = targets >= 0.5
        right = (((full >= 0.5) == labels).double(), ((without >= 0.5) == labels[:, None]).double())
        return found | {"accuracy": right}
    target = shown.values(targets)
    errors = ((shown.values(full) - target).abs(), (shown.values(without) - target[:, None]).abs())
    return found | {"error": errors}


def _lines(
    metric: str, full: Tensor, change: Tensor, split: Halves, seeds: int
) -> list[dict[str, float | int | str]]:
    """Return the lines of a metric.

    Args:
        full: ``[S, J]``.
        change: ``[S, J, 1 + D]``, by the chosen rows and by each random set.
    """
    level, chosen, draws = full.mean(1), change[..., 0].mean(1), change[..., 1:].mean(1)
    random = draws.mean(1)
    of_draws = draws.mean(0).var() / draws.shape[1]  # NaN of a single one
    rows = round(sum(map(len, split.chosen)) / 2)
    none = torch.zeros(len(full[0]), dtype=torch.float64)
    lines: list[dict[str, float | int | str]] = []
    for removed, moved, per_test, more in (
        (NOTHING, torch.zeros_like(level), none, torch.zeros(())),
        (HARMFUL, chosen, change[..., 0].mean(0), torch.zeros(())),
        (RANDOM, random, change[..., 1:].mean((0, 2)), of_draws),
    ):
        numbers = {
            "mean": level.mean() + moved.mean(),
            "sem": (mean_and_error(level + moved)[1] ** 2 + more).sqrt(),
            "change": moved.mean(),
            "change_sem": (mean_and_error(moved)[1] ** 2 + more).sqrt(),
            "change_sem_tests": per_test.std() / len(per_test) ** 0.5,
        }
        if removed == HARMFUL:
            beyond, sem = mean_and_error(chosen - random)
            numbers |= {"beyond_random": beyond, "beyond_random_sem": (sem**2 + of_draws).sqrt()}
        line: dict[str, float | int | str] = {"removed": removed, "metric": metric, "seeds": seeds}
        line["rows"] = 0 if removed == NOTHING else rows
        lines.append(line | {name: float(value) for name, value in numbers.items()})
    return lines
