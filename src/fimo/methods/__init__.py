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
        """Return what methods there are: what they are, need and cost, and when to use them.

        Returns:
            ``summary, access, needs, cost, use`` by name.

        Example:
            >>> fimo.methods().loc["graddot", "access"]
            'FiMO'
        """
        from fimo.methods.catalogue import table

        return table()


sys.modules[__name__].__class__ = _Methods
