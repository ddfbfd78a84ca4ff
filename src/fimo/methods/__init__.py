"""Attribution methods, one module each; called, ``fimo.methods()``, the table of them."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


class _Methods(types.ModuleType):
    """The package as a function too, so that ``fimo.methods()`` and ``fimo.methods.tracin`` both work."""

    def __call__(self) -> pd.DataFrame:
        from fimo.api import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
