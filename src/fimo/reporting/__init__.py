"""What a run found, for people: the report, figures, the text of a terminal, the W&B view.

Names are imported when first used: torch, plotly, jinja2 and matplotlib take seconds, and what is printed of
a finished run needs none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fimo.extras import FIGURES, STATIC_FIGURES, require

if TYPE_CHECKING:
    from fimo.reporting.audit_report import write_audit_report
    from fimo.reporting.audit_run import AuditRun
    from fimo.reporting.instance_table import InstanceDisplay, Show, collect
    from fimo.reporting.models_report import write_models_report
    from fimo.reporting.models_run import ModelsRun
    from fimo.reporting.report import write_report
    from fimo.reporting.results import Results
    from fimo.reporting.static import write_figures

__all__ = [
    "AuditRun",
    "InstanceDisplay",
    "ModelsRun",
    "Results",
    "Show",
    "collect",
    "write_audit_report",
    "write_figures",
    "write_models_report",
    "write_report",
]

_HOMES = {
    "AuditRun": "audit_run",
    "InstanceDisplay": "instance_table",
    "ModelsRun": "models_run",
    "Results": "results",
    "Show": "instance_table",
    "collect": "instance_table",
    "write_audit_report": "audit_report",
    "write_figures": "static",
    "write_models_report": "models_report",
    "write_report": "report",
}
_NEEDS: dict[str, Mapping[str, Sequence[str]]] = {
    "write_audit_report": FIGURES,
    "write_models_report": FIGURES,
    "write_report": FIGURES,
    "write_figures": STATIC_FIGURES,
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEEDS:
        require(name.removeprefix("write_"), _NEEDS[name])
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
