"""The benchmark: gold standards in a fixed list of settings, and methods judged by them.

    fimo bench make|verify|score|table       # or python -m fimo.bench

:func:`load` gives the gold standards of a setting as tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.bench.gold_standard import GoldStandard, Measured, load

__all__ = ["GoldStandard", "Measured", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fimo.bench.gold_standard"), name)
