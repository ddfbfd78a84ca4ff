"""Instances as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Display:
    """One instance for a report or a dashboard.

    Args:
        target: its target in words or original units, e.g. ``'151.0'`` or ``'malignant'``.
        row: of a table: column to value in original units.
        text: of a text data set.
        image: of an image data set, a ``data:image/png;base64,...`` address.
    """

    target: float | int | str
    row: Mapping[str, float | int | str] | None = None
    text: str | None = None
    image: str | None = None
