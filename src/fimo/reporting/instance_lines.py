"""An instance on one line: its name, and its values or its text."""

from __future__ import annotations

from collections.abc import Mapping

from fimo.data.display import Display
from fimo.reporting.numbers import ABSENT, number

Value = float | int | str


def folded(row: Mapping[str, Value]) -> dict[str, Value]:
    """Return a table's row with one-hot columns put together: ``a=x: 0, a=y: 1`` becomes ``a: y``.

    Columns ``NAME=VALUE`` are such a group where there are at least two of a name, their values are 0 or 1,
    and at most one is 1; without a 1 (an unknown category) the value is a dash.
    """
    groups: dict[str, list[str]] = {}
    for column in row:
        name, sign, _ = column.partition("=")
        if sign and name not in row:
            groups.setdefault(name, []).append(column)
    one_hot = {
        name: [c for c in columns if row[c] == 1]
        for name, columns in groups.items()
        if len(columns) > 1 and all(row[c] in (0, 1) for c in columns)
    }
    one_hot = {name: ones for name, ones in one_hot.items() if len(ones) <= 1}
    found: dict[str, Value] = {}
    for column, value in row.items():
        name = column.partition("=")[0]
        if column in groups.get(name, []) and name in one_hot:
            found[name] = one_hot[name][0].partition("=")[2] if one_hot[name] else ABSENT
        else:
            found[column] = value
    return found


def line(display: Display | None, most: int = 240) -> str:
    """Return what an instance holds on one line of at most so many characters."""
    if display is None:
        return ""
    parts = [" ".join(display.text.split())] if display.text else []
    parts += [f"{name} {number(value)}" for name, value in folded(display.row or {}).items()]
    text = " · ".join(parts)
    return text if len(text) <= most else f"{text[: most - 1]}…"
