"""What a run found, for people: the report, figures, the W&B view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fimo.extras import FIGURES, STATIC_FIGURES, require
from fimo.reporting.instance_table import InstanceDisplay, Show, collect
from fimo.reporting.results import Results

if TYPE_CHECKING:
    from fimo.reporting.report import write_report
    from fimo.reporting.static import write_figures

__all__ = ["InstanceDisplay", "Results", "Show", "collect", "write_figures", "write_report"]


def __getattr__(name: str) -> Any:
    # plotly, jinja2 and matplotlib are imported when a report or figures are written
    if name == "write_report":
        require("report", FIGURES)
        from fimo.reporting.report import write_report

        return write_report
    if name == "write_figures":
        require("figures", STATIC_FIGURES)
        from fimo.reporting.static import write_figures

        return write_figures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
