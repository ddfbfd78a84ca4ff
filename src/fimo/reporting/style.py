"""Colours, dashes and axes that interactive and static figures share."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b8559a", "#c78500", "#4aa3df", "#7a4b2a", "#6a51a3")
"""Told apart with every kind of colour vision (after Okabe and Ito, 2008), on a white page and a dark one."""

BASELINE = "#8a8f98"
OTHER = "#b7bec8"
"""Of methods that are drawn for context."""
CEILING = "#5f6670"
DASHES = ("solid", "dot", "dashdot", "longdash", "dash", "longdashdot")
"""plotly's names, one per overlaid run."""

BASELINES = ("random", "chance")
"""Methods that are drawn in grey."""


def colors(methods: Sequence[str], shown: Collection[str] | None = None) -> dict[str, str]:
    """Return each method's colour.

    Args:
        shown: the methods that are drawn in a colour of their own, the others in light grey; all when None
            (colours repeat after eight). A baseline that knows nothing is dark grey.
    """
    chosen: dict[str, str] = {}
    used = 0
    for method in methods:
        if method in BASELINES:
            chosen[method] = BASELINE
        elif shown is not None and method not in shown:
            chosen[method] = OTHER
        else:
            chosen[method] = PALETTE[used % len(PALETTE)]
            used += 1
    return chosen


def translucent(color: str, opacity: float = 0.16) -> str:
    """Return ``#rrggbb`` as ``rgba(…)``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def logarithmic(first: float, last: float) -> bool:
    """Return whether amounts of further training from first to last are drawn on a logarithmic axis."""
    return first > 0 and last / first > 50


def log_ticks(first: float, last: float) -> list[float]:
    """Return 1, 2, 5, 10, … within the ends, or the powers of ten alone where those are many."""
    steps = (1, 2, 5) if last / first < 2000 else (1,)
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    return [m * 10.0**p for p in powers for m in steps if first <= m * 10.0**p <= last * 1.0001]
