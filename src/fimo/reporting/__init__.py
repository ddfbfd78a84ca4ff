"""What a run found, for people: the report, figures, the W&B view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fimo.reporting.instance_table import InstanceDisplay, Show, collect
from fimo.reporting.results import Results

if TYPE_CHECKING:
    from fimo.reporting.report import write_report

__all__ = ["InstanceDisplay", "Results", "Show", "collect", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "write_report":  # plotly and jinja2 are imported when a report is written
        from fimo.reporting.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
