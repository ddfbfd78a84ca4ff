"""Instances as people read them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Display:
    """One instance for a report or a dashboard.

    Args:
        target: its target in words or original units, e.g. ``'151.0'`` or ``'malignant'``.
        row: of a table: column to value in original units.
        text: of a text data set.
        image: of an image data set, a ``data:image/png;base64,...`` address.
    """

    target: str
    row: dict[str, float | str] = field(default_factory=dict)
    text: str | None = None
    image: str | None = None
