"""The audit: which of all training rows matter, surely, and what to do about them.

Called, ``fimo.audit(model, train, test, further_training)`` is :func:`fimo.api.audit`.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from fimo.audit.result import Audit

__all__ = ["Audit"]


class _Audit(types.ModuleType):
    """The package as a function too, so that ``fimo.audit(...)`` and ``fimo.audit.result`` both work."""

    def __call__(self, *arguments: Any, **settings: Any) -> Audit:
        """See :func:`fimo.api.audit`."""
        from fimo import api

        return api.audit(*arguments, **settings)


sys.modules[__name__].__class__ = _Audit
