"""Instances as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def figures(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits, large ones as whole numbers: 0.01235, 497831."""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e12 else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Display:
    """One instance for a report or a dashboard.

    Args:
        target: its target in words or original units, e.g. ``'151.0'`` or ``'malignant'``.
        row: of a table: column to value in original units; else what a text's or picture's table says of it.
        text: of a text data set.
        image: of an image data set, a ``data:image/png;base64,...`` address.
        data_row: the 0-based data row of the user's file or source, where it is known.
        id: the user's own identifier.
    """

    target: float | int | str
    row: Mapping[str, float | int | str] | None = None
    text: str | None = None
    image: str | None = None
    data_row: int | None = None
    id: str | None = None
