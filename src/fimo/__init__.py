"""fimo: which training instances a trained model is sensitive to, and how well attribution methods tell.

Names are imported when first used, so that ``import fimo`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.api import attribute, audit, evaluate, further_train, load_run, report
    from fimo.audit.result import Audit
    from fimo.checking.check import check
    from fimo.data.instances import Instances
    from fimo.engine.protocol import Protocol
    from fimo.errors import InputError
    from fimo.further_training.seeds import other_seeds
    from fimo.further_training.sensitivity import Sensitivity
    from fimo.methods.base import AttributionMethod
    from fimo.models.final_model import FinalModel
    from fimo.scores import Scores

__version__ = "0.1.0"

__all__ = [
    "AttributionMethod",
    "Audit",
    "FinalModel",
    "InputError",
    "Instances",
    "Protocol",
    "Scores",
    "Sensitivity",
    "attribute",
    "audit",
    "check",
    "evaluate",
    "further_train",
    "load_run",
    "methods",
    "other_seeds",
    "report",
]

_HOMES = {
    "Audit": "fimo.audit.result",
    "AttributionMethod": "fimo.methods.base",
    "FinalModel": "fimo.models.final_model",
    "InputError": "fimo.errors",
    "Instances": "fimo.data.instances",
    "Protocol": "fimo.engine.protocol",
    "Scores": "fimo.scores",
    "Sensitivity": "fimo.further_training.sensitivity",
    "attribute": "fimo.api",
    "check": "fimo.checking.check",
    "evaluate": "fimo.api",
    "further_train": "fimo.api",
    "load_run": "fimo.api",
    "other_seeds": "fimo.further_training.seeds",
    "report": "fimo.api",
}


def __getattr__(name: str) -> Any:
    if name in ("audit", "bench", "methods"):
        return importlib.import_module(f"fimo.{name}")  # packages; audit and methods are called as functions
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
