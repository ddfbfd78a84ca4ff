"""Colours and dashes that interactive and static figures share."""

from __future__ import annotations

from collections.abc import Sequence

PALETTE = (
    "#3366cc", "#e07b00", "#109618", "#c2306b", "#8a56c9", "#0099a8", "#b8860b", "#d64550",
    "#5f8f00", "#7a5c47", "#2f8fe0", "#a63fb0", "#4b8b76", "#e0619e", "#66749a", "#9c8f00",
)  # fmt: skip
BASELINE = "#9a9a9a"
CEILING = "#808080"
DASHES = ("solid", "dot", "dashdot", "longdash", "dash", "longdashdot")
"""plotly's names, one per overlaid run."""

BASELINES = ("random", "chance")
"""Methods that are drawn in grey."""


def colors(methods: Sequence[str]) -> dict[str, str]:
    """Return each method's colour; distinct for up to 16 methods, grey for a baseline that knows nothing."""
    chosen: dict[str, str] = {}
    for method in methods:
        used = sum(color != BASELINE for color in chosen.values())
        chosen[method] = BASELINE if method in BASELINES else PALETTE[used % len(PALETTE)]
    return chosen


def translucent(color: str, opacity: float = 0.16) -> str:
    """Return ``#rrggbb`` as ``rgba(…)``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
