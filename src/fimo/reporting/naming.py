"""What tells runs apart: the settings that differ, and names made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fimo.reporting.flat import flat
from fimo.reporting.results import Results

SILENT = ("store", "threads", "logger", "report", "until", "methods", "hydra", "trainer.accelerator")
"""Keys, and groups of keys, that change no number of a run (``methods``: its figures name them)."""

FIRST = ("dataset.name", "further_training.optimizer", "model.name", "further_training.leave_out")
"""Keys that say most; where one tells runs apart, those that go along with it are not named."""


def differences(runs: Sequence[Results]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, the most telling first: by dotted key, each run's value."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys([*FIRST, *(key for config in configs for key in config)])
    values = {key: [config.get(key) for config in configs] for key in keys if not _silent(key)}
    return {key: v for key, v in values.items() if any(value != v[0] for value in v)}


def named_apart(runs: Sequence[Results], folders: Sequence[Path]) -> list[Results]:
    """Return runs with names that differ: by the fewest settings that tell them apart, else by folder.

    Runs of different names keep them, unless they are of one data set and differ in their settings too.
    """
    if len(runs) < 2:
        return list(runs)
    chosen: list[list[Any]] = []
    labels = [()] * len(runs)
    for key, values in differences(runs).items():
        named = [(*label, _named(key, value)) for label, value in zip(labels, values, strict=True)]
        if len(set(named)) > len(set(labels)):
            labels = named  # type: ignore[assignment]
            chosen.append(values)
        if len(set(labels)) == len(runs):
            break
    if len(set(labels)) == len(runs):
        names = [", ".join(label) for label in labels]
    elif len({run.name for run in runs}) == len(runs):
        names = [run.name for run in runs]
    else:
        names = [
            ", ".join([*(label or (run.name,)), path.resolve().name])
            for run, label, path in zip(runs, labels, folders, strict=True)
        ]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _silent(key: str) -> bool:
    return any(key == silent or key.startswith(f"{silent}.") for silent in SILENT)


def _named(key: str, value: Any) -> str:
    """Return a setting as people say it: a word alone, a number after its key."""
    return value if isinstance(value, str) else f"{key.rpartition('.')[2]} {value}"
