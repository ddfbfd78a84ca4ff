"""fimo: which training instances a trained model is sensitive to, and how well attribution methods tell.

Names are imported when first used, so that ``import fimo`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.checking.check import check as check
    from fimo.checking.verdict import Check as Check

__version__ = "0.1.0"

_HOMES = {"check": "fimo.checking.check", "Check": "fimo.checking.verdict"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
