"""Several runs in one report: those of a sweep, or those named on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd

from fimo.errors import InputError
from fimo.reporting.naming import differences, named_apart
from fimo.reporting.results import FILES, Results

Value = TypeVar("Value")

MOST_RUNS = 6
"""Runs side by side that a reader can take in: what a sweep's own report holds at most."""


def load_runs(folders: Sequence[Path]) -> list[Results]:
    """Read runs, put together those that differ in their methods alone, and name the others apart.

    Args:
        folders: of runs; a sweep's stands for its finished jobs.

    Raises:
        InputError: a folder is none of a finished run.
    """
    found = [folder for given in folders for folder in run_folders(given)]
    groups: list[list[tuple[Path, Results]]] = []
    for folder, run in ((folder, Results.load(folder)) for folder in found):
        for group in groups:
            if _same_gold_standard(group[0][1], run):
                group.append((folder, run))
                break
        else:
            groups.append([(folder, run)])
    runs = [merged([run for _, run in group]) for group in groups]
    return named_apart(runs, [group[0][0] for group in groups])


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of a sweep's finished jobs, in their order; of any other, itself.

    Raises:
        InputError: no job of the sweep has finished.
    """
    if not (folder / "sweep.json").exists():
        return [folder]
    jobs = [path.parent for path in folder.glob("*/report.json")]
    done = [job for job in jobs if all((job / file).exists() for file in FILES)]
    if not done:
        raise InputError(str(folder), "no job of this sweep has finished")
    return sorted(done, key=lambda job: (len(job.name), job.name))  # 2 before 10


def sweep_report(folder: Path) -> Path | None:
    """Write ``report.html`` of a sweep's finished jobs into its folder.

    Returns:
        its path; None with fewer than two finished jobs, or more than :data:`MOST_RUNS` that differ in more
        than their methods.
    """
    from fimo.reporting import write_report

    try:
        folders = run_folders(folder)
    except InputError:
        return None
    if len(folders) < 2 or len(runs := load_runs(folders)) > MOST_RUNS:
        return None
    return write_report(runs, folder / "report.html")


def merged(runs: Sequence[Results]) -> Results:
    """Return one run with the methods of several that share a gold standard; of each its first result."""
    if len(runs) == 1:
        return runs[0]
    first = runs[0]
    scores = _mapping([run.scores for run in runs])
    skipped = _mapping([run.skipped for run in runs])
    at = ("method", "metric", "step", "seeds")
    return dataclasses.replace(
        first,
        name=f"{first.dataset.get('name') or first.name}: {len(scores)} methods",
        scores=scores,
        evaluation=_table([run.evaluation for run in runs], *at),
        bootstrap=_table([run.bootstrap for run in runs if run.bootstrap is not None], *at),
        slopes=_table([run.slopes for run in runs if run.slopes is not None], "method", "step"),
        cost=_table([run.cost for run in runs], "stage"),
        descriptions=_mapping([run.descriptions for run in runs]),
        skipped={name: reason for name, reason in skipped.items() if name not in scores},
        warnings=tuple(dict.fromkeys(warning for run in runs for warning in run.warnings)),
    )


def _mapping(parts: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    return {name: value for part in reversed(parts) for name, value in part.items()}


def _table(tables: Sequence[pd.DataFrame], *keys: str) -> pd.DataFrame:
    filled = [table for table in tables if len(table)] or [pd.DataFrame(columns=[*keys])]
    return pd.concat(filled, ignore_index=True).drop_duplicates([*keys], ignore_index=True)


def _same_gold_standard(one: Results, other: Results) -> bool:
    """Return whether runs differ in nothing but methods, and hold different ones."""
    if (
        differences([one, other])
        or one.final_model != other.final_model
        or set(one.scores) & set(other.scores)
    ):
        return False
    if one.tasks or other.tasks or one.metrics != other.metrics or one.seeds != other.seeds:
        return False
    u, v = one.sensitivity, other.sensitivity
    axes = ("step", "left_out", "test", "seeds")
    return all(getattr(u, axis).equal(getattr(v, axis)) for axis in axes)
