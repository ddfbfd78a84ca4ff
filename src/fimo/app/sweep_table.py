"""A sweep as one table: a row for each job, its settings and what its summary says."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fimo.app.jobs import JobRecord
from fimo.live.files import SUMMARY

TABLE = "jobs.csv"


def write_table(sweep: Path, jobs: Sequence[tuple[Path, JobRecord]]) -> Path | None:
    """Write ``jobs.csv``: ``job,status,error``, the settings in which jobs differ, and their summaries.

    Args:
        sweep: its folder.
        jobs: the folder of each, and its record.

    Returns:
        the file; None where no job has a summary.
    """
    summaries = [_summary(folder) for folder, _ in jobs]
    if not any(summaries):
        return None
    chosen = [_settings(record.overrides) for _, record in jobs]
    differing = [name for name in _names(chosen) if len({settings.get(name) for settings in chosen}) > 1]
    aside = sweep / f".{TABLE}"
    with aside.open("w", newline="") as file:
        columns = ["job", "status", "error", *differing, *_names(summaries)]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for (_, record), settings, summary in zip(jobs, chosen, summaries, strict=True):
            about = {"job": record.number, "status": record.status, "error": record.error}
            writer.writerow(summary | settings | about)
    return aside.replace(sweep / TABLE)


def _summary(folder: Path) -> dict[str, Any]:
    """Return the numbers and names of a job's summary."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in summary.items() if isinstance(v, str | int | float) and k != "error"}


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    parts = [override.lstrip("+~").partition("=") for override in overrides]
    return {name: value for name, _, value in parts}


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
