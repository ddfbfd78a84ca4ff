"""What the members of a group have in common, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fimo.data.display import Display

STRIKING = 1.0
"""Standard deviations of the others between the members' mean of a column and theirs."""

MOST = 3
"""Columns that are named."""

WORDS = 5


def shared(members: Sequence[Display], others: Sequence[Display]) -> str:
    """Return in words what distinguishes some instances from others; empty where nothing does.

    Their target where all have the same, columns of tables whose values are far from the others' or one
    value that few others have, and words of texts that most members and few others have.

    Args:
        others: a sample of all instances that are no members.
    """
    parts = [*_target(members, others), *_columns(members, others), *_words(members, others)]
    return "; ".join(parts)


def _target(members: Sequence[Display], others: Sequence[Display]) -> list[str]:
    values = {str(member.target) for member in members}
    share = _share([str(other.target) for other in others], values)
    return [f"all {values.pop()}"] if len(values) == 1 and share < 0.9 else []


def _columns(members: Sequence[Display], others: Sequence[Display]) -> list[str]:
    inside, outside = (pd.DataFrame([dict(d.row or {}) for d in part]) for part in (members, others))
    found: list[tuple[float, str]] = []
    for column in [c for c in inside if c in outside]:
        a, b = inside[column].dropna(), outside[column].dropna()
        if a.empty or b.empty:
            continue
        numeric = pd.api.types.is_numeric_dtype(a) and pd.api.types.is_numeric_dtype(b)
        said = _range(str(column), a, b) if numeric and b.nunique() > 2 else _value(str(column), a, b)
        if said is not None:
            found.append(said)
    found.sort(key=lambda pair: -pair[0])
    return [text for _, text in found[:MOST]]


def _range(name: str, inside: pd.Series, outside: pd.Series) -> tuple[float, str] | None:
    """Return how striking a column of numbers is, and its values in words; None where it is not."""
    deviation = float(outside.std())
    if not deviation > 0:
        return None
    distance = abs(float(inside.mean() - outside.mean())) / deviation
    if distance < STRIKING or distance * len(inside) ** 0.5 < 3:
        return None
    low, high = np.quantile(outside.to_numpy(dtype=float), [0.1, 0.9])
    values = f"{inside.min():.4g} to {inside.max():.4g}"
    if inside.min() == inside.max():
        values = f"{inside.min():.4g}"
    return distance, f"{name} {values} (others mostly {low:.4g} to {high:.4g})"


def _value(name: str, inside: pd.Series, outside: pd.Series) -> tuple[float, str] | None:
    """Return the same for a column of categories: one value of all members, of at most half of the others."""
    values = {str(value) for value in inside}
    share = _share([str(value) for value in outside], values)
    if len(values) > 1 or share > 0.5:
        return None
    return 1 / max(share, 0.05), f"{name} {_plain(values.pop())} ({share:.0%} of the others)"


def _plain(value: str) -> str:
    return value.removesuffix(".0")


def _share(values: Sequence[str], of: set[str]) -> float:
    return sum(value in of for value in values) / len(values) if values else 1.0


def _words(members: Sequence[Display], others: Sequence[Display]) -> list[str]:
    inside, outside = (
        [set(re.findall(r"[^\W\d_]{3,}", (d.text or "").lower())) for d in part] for part in (members, others)
    )
    count, rest = (Counter(word for words in part for word in words) for part in (inside, outside))
    least = max(2, 0.6 * len(inside))
    lifts = {}
    for word, times in count.items():
        usual = (rest[word] + 1) / (len(outside) + 2)
        if times >= least and (lift := times / len(inside) / usual) >= 3:
            lifts[word] = (lift, times)
    best = sorted(lifts, key=lambda word: (-lifts[word][0], word))[:WORDS]
    return [f"words {', '.join(best)}"] if best else []
