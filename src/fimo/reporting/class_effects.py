"""Effects that all follow one class, and what is left of them within the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fimo.reporting.answer import listed

MOST_CLASSES = 50
FEWEST_ROWS = 10
"""Of rows, below which no share is told."""

FOLLOWS = 0.5
"""Share of the effects' variance that classes explain, from which effects are said to follow them."""

NOTABLE = 0.2
"""The same where moreover the ends of the ranking are of one class each."""

LISTED = 10
"""Rows of a list whose classes are compared."""

CHANCE = 1e-3
"""Of lists of one class each, below which that is no accident."""


@dataclass(frozen=True)
class ClassEffects:
    """How far the effects of training instances are those of their classes.

    Args:
        share: of the effects' variance that classes explain (adjusted R²; at least 0).
        means: by class, the mean effect.
        helpful, harmful: the only class among the most helpful and the most harmful ones, where there is
            one for each, they differ, and that is no accident; else empty.
    """

    share: float
    means: pd.Series[float]
    helpful: str = ""
    harmful: str = ""

    @property
    def follow(self) -> bool:
        """Whether the ranking is to a large part one of classes."""
        return self.share >= (NOTABLE if self.helpful else FOLLOWS)

    def within(self, effects: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Return effects ``[n]`` minus the mean effect of their class."""
        own = pd.Series(list(classes)).map(self.means).to_numpy(float)
        return np.asarray(effects, float) - own

    def leading(
        self, effects: np.ndarray, classes: Sequence[str], names: Sequence[str], most: int = 3
    ) -> str:
        """Return as a sentence which rows help and harm most within their classes."""
        order = np.argsort(-self.within(effects, classes), kind="stable").tolist()
        help_, harm = ([names[k] for k in side] for side in (order[:most], order[::-1][:most]))
        return f"Within their class, {listed(help_)} help most and {listed(harm)} harm most."

    def __str__(self) -> str:
        """Return it as a sentence."""
        if self.helpful:
            said = (
                f"The most helpful rows are all of class {self.helpful}, the most harmful ones all of class "
                f"{self.harmful}"
            )
        else:
            said = f"Effects follow the rows' class, which explains {self.share:.0%} of their variance"
        return (
            f"{said}: removing one mostly shifts the balance of classes. The ranking within the class "
            "(effect minus the class's mean) says more about a single row."
        )


def class_effects(effects: np.ndarray, classes: Sequence[str]) -> ClassEffects | None:
    """Return how far effects ``[n]`` follow classes ``[n]``; None where that can't be told.

    That is with few rows, one class, as many classes as rows, or effects without variance.
    """
    table = pd.DataFrame({"effect": np.asarray(effects, float), "kind": [str(c) for c in classes]}).dropna()
    groups = table.groupby("kind")["effect"]
    n, k = len(table), groups.ngroups
    if n < FEWEST_ROWS or not 2 <= k <= min(MOST_CLASSES, n // 2):
        return None
    total = float(table["effect"].var()) * (n - 1)
    if not total > 0:
        return None
    inside = float(((table["effect"] - groups.transform("mean")) ** 2).sum())
    share = max(0.0, 1 - (inside / (n - k)) / (total / (n - 1)))
    sides = _one_class_each(table)
    return ClassEffects(share, groups.mean(), *sides)


def _one_class_each(table: pd.DataFrame) -> tuple[str, str]:
    """Return the single classes of the two ends of the ranking, where they differ and not by chance."""
    ordered = table.sort_values("effect")["kind"]
    listed = min(LISTED, len(table) // 4)
    harmful, helpful = ordered.iloc[:listed], ordered.iloc[len(ordered) - listed :]
    if harmful.nunique() != 1 or helpful.nunique() != 1 or helpful.iloc[0] == harmful.iloc[0]:
        return "", ""
    frequency = table["kind"].value_counts(normalize=True)
    chance = float((frequency[helpful.iloc[0]] * frequency[harmful.iloc[0]]) ** listed)
    return (str(helpful.iloc[0]), str(harmful.iloc[0])) if chance < CHANCE else ("", "")
