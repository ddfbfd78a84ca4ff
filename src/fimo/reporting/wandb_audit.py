"""What an audit found, for its loggers: a summary, and tables of rows and the page for W&B."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fimo.live.log import Log
from fimo.reporting.audit_run import AuditRun
from fimo.reporting.results import plain
from fimo.reporting.wandb import cells, content

MOST_ROWS = 2000
"""Of a table: measured rows first, then by size of their score."""

KEYS = ("n", "verified", "helpful", "harmful", "unclear", "seeds", "q", "method", "minutes")
"""Of an audit's summary, those that runs are sorted by."""


def tell_audit(log: Log, run: AuditRun, report: Path | None = None) -> None:
    """Log an audit's findings.

    Summary: ``audit/…`` of its counts, recall and number of suspects, ``final_model/…``. Media: the tables
    ``rows`` and ``pairs``, with the instances' texts, pictures or values, and the page.
    """
    log.summarise(audit_summary(run))
    log.show(partial(audit_media, run, report))


def audit_summary(run: AuditRun) -> dict[str, Any]:
    """Return what a table of runs is sorted by."""
    summary = run.audit.summary
    found = {f"final_model/{k}": v for k, v in run.final_model.items()}
    for key in KEYS:
        value = summary.get(key)
        if value is not None:
            found[f"audit/{key}"] = len(value) if isinstance(value, list | tuple) else value
    for key, part in (("recall", "estimate"), ("suspects", "count")):
        value = (summary.get(key) or {}).get(part)
        if isinstance(value, int | float):
            found[f"audit/{key}"] = value
    return {name: plain(value) for name, value in found.items()}


def audit_media(run: AuditRun, report: Path | None = None) -> dict[str, Any]:
    """Return W&B's media."""
    import wandb

    found: dict[str, Any] = {}
    for name, frame in (("rows", run.audit.rows), ("pairs", run.audit.pairs)):
        if len(frame):
            columns, data = audit_rows(run, frame)
            found[name] = wandb.Table(columns=[*columns], data=[*cells(data)], allow_mixed_types=True)
    if report is not None and report.exists():
        found["report"] = wandb.Html(report.read_text(), inject=False)
    return found


def audit_rows(run: AuditRun, frame: pd.DataFrame) -> tuple[list[str], list[list[Any]]]:
    """Return an audit's table with what is shown of its training rows beside, the foremost rows first."""
    shown = run.shown.get("train", {})
    order = frame.assign(_measured=frame["effect"].notna(), _size=frame["score"].abs())
    chosen = order.sort_values(["_measured", "_size"], ascending=False, kind="stable").index[:MOST_ROWS]
    columns, beside = content(shown.values())
    rows = []
    for record in frame.loc[chosen].to_dict("records"):
        display = shown.get(int(record["row"]))
        own = [None if pd.isna(value) else plain(value) for value in record.values()]
        rows.append([*own, *(beside(display) if display else [None] * len(columns))])
    return [*map(str, frame.columns), *columns], rows
