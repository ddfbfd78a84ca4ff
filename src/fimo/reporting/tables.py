"""Tables that a page's reader sorts, searches and downloads, as the page's script takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fimo.data.display import Display
from fimo.reporting.instance_lines import folded
from fimo.reporting.results import plain

Kind = Literal["name", "method", "effect", "agreement", "number", "value", "q", "text", "verdict", "instance"]
MOST_COLUMNS = 60
"""Of a table's own values; the rest is in the user's file."""


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        label: its head.
        kind: how a value is shown: a ``number`` is rounded, a ``value`` of the user's own table is not; ``q``
            is a false discovery rate, an ``effect`` and an ``agreement`` are ``[value, standard error]``, an
            ``instance`` is ``{"text": …}`` or ``{"image": …}``, a ``method`` ``{"text": …, "color": …}``.
        values: ``[n]``; None where there is none.
        hint: what it means, in a sentence.
    """

    label: str
    kind: Kind
    values: Sequence[Any]
    hint: str = ""


def table(columns: Iterable[Column], file: str, **about: Any) -> dict[str, Any]:
    """Return a table for the page's script; columns without any value are left out.

    Args:
        file: name of the CSV file that a reader downloads.
        about: ``sort`` and ``descending``, at first; ``shown``, rows at first.
    """
    kept = [c for c in columns if any(_known(value) for value in c.values)]
    cells = [
        [plain(_short(value, 9 if c.kind in ("value", "text") else 6)) for value in c.values] for c in kept
    ]
    return {
        "file": file,
        "columns": [{"label": c.label, "kind": c.kind, "hint": c.hint} for c in kept],
        "rows": [list(row) for row in zip(*cells, strict=True)],
        **about,
    }


def effects(values: Iterable[float], errors: Iterable[float]) -> list[list[float] | None]:
    """Return an effect column's values; None where nothing was measured."""
    return [None if v != v else [v, e] for v, e in zip(map(float, values), map(float, errors), strict=True)]


def instance_columns(displays: Sequence[Display | None]) -> list[Column]:
    """Return the columns that show instances: text or picture, then values (one-hot columns put together)."""
    parts = [content(d) or None for d in displays]
    rows: list[Mapping[str, Any]] = [folded(d.row) if d and d.row else {} for d in displays]
    names = list(dict.fromkeys(name for row in rows for name in row))[:MOST_COLUMNS]
    values = [Column(name, _kind(rows, name), [row.get(name) for row in rows]) for name in names]
    return [Column("instance", "instance", parts), *values]


def content(display: Display | None) -> dict[str, Any]:
    """Return what an instance is besides values, as the page's script shows it."""
    names = ("image", "text", "tokens", "token_losses")
    return {name: value for name in names if (value := getattr(display, name, None))}


def _kind(rows: Sequence[Mapping[str, Any]], name: str) -> Kind:
    return "text" if any(isinstance(row.get(name), str) for row in rows) else "value"


def _known(value: Any) -> bool:
    return value is not None and value == value and value != ""  # NaN differs from itself


def _short(value: Any, digits: int) -> Any:
    """Return a number with so many significant digits, so that a page stays small."""
    if isinstance(value, list):
        return [_short(v, digits) for v in value]
    if isinstance(value, float | np.floating) and value == value:
        return float(f"{value:.{digits}g}")
    return value
