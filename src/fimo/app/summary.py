"""A run's findings as one value, for the report and the loggers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fimo.app.displayed import displayed
from fimo.app.effects import ids_of
from fimo.app.environment import versions
from fimo.cost import Cost, cost_table
from fimo.data.datamodule import InstancesModule, Split
from fimo.evaluation import Evaluation
from fimo.further_training.sensitivity import Sensitivity
from fimo.methods.base import AttributionMethod
from fimo.methods.catalogue import first_sentence
from fimo.models.final_model import FinalModel
from fimo.models.measured import Measured
from fimo.models.training import Quality
from fimo.reporting.instance_table import InstanceDisplay, collect
from fimo.reporting.results import TASKS, Results, task_file
from fimo.scores import Scores
from fimo.store.files import written_aside
from fimo.tasks.base import Task

SPLITS: tuple[Split, ...] = ("train", "test")

log = logging.getLogger(__name__)


def summarise(
    config: Mapping[str, Any],
    data: InstancesModule,
    final_model: FinalModel,
    quality: Quality,
    sensitivity: Sensitivity,
    methods: Mapping[str, AttributionMethod],
    scores: Mapping[str, Scores],
    evaluation: Evaluation,
    costs: Sequence[Cost],
    skipped: Mapping[str, str],
) -> Results:
    """Gather what a run found."""

    def show(split: Split, index: int) -> InstanceDisplay:
        return next(displayed(data, final_model, split, [index]))

    measured = Measured.supposed(final_model)
    return Results(
        name=f"{data.name}: {', '.join(methods)}"
        if len(methods) <= 3
        else f"{data.name}: {len(methods)} methods",
        sensitivity=sensitivity,
        scores=scores,
        evaluation=evaluation.table,
        cost=cost_table(costs),
        final_model=quality_facts(quality),
        config=config,
        versions=versions(),
        dataset=dataset_facts(data),
        ids={
            split: ids_of(sensitivity, data, split) for split in SPLITS if data.origin(split).id is not None
        },
        shown=collect(sensitivity, show, config["evaluation"]["shown"]),
        descriptions={name: first_sentence(type(method)) for name, method in methods.items()},
        skipped=skipped,
        warnings=(*evaluation.notes, *([] if measured.known else [measured.unknown])),
        bootstrap=evaluation.bootstrap,
        slopes=evaluation.slopes,
        distance=distance_table(sensitivity, final_model),
        measured=measured,
    )


def dataset_facts(data: InstancesModule) -> dict[str, Any]:
    """Return what reports say of a data set as a whole."""
    return {
        "name": data.name,
        "task": data.task,
        "train": len(data.train),
        "test": len(data.test),
        "classes": list(data.class_names),
        "decisions": list(data.decisions),
    }


def quality_facts(quality: Quality) -> dict[str, Any]:
    """Return what is known of a final model's quality."""
    return {k: v for k, v in asdict(quality).items() if v is not None}


def distance_table(sensitivity: Sensitivity, final_model: FinalModel) -> pd.DataFrame | None:
    """Return how far each seed's full run moved from the final model, at each evaluation point."""
    if sensitivity.distance_full is None:
        return None
    norm = torch.cat([p.double().flatten() for p in final_model.parameters().values()]).norm()
    rows = [
        (int(sensitivity.step[e]), int(sensitivity.epoch[e]), int(seed), float(d), float(d / norm))
        for seed, distances in zip(sensitivity.seeds, sensitivity.distance_full, strict=True)
        for e, d in enumerate(distances)
    ]
    return pd.DataFrame(rows, columns=["step", "epoch", "seed", "distance", "relative"])


def with_findings(
    results: Results,
    findings: Mapping[str, pd.DataFrame | Sensitivity],
    folder: Path,
    tasks: Mapping[str, Task] | None = None,
) -> Results:
    """Add what tasks found to a run's results; tables that nothing draws are only written.

    Args:
        tasks: by name, those that say as what their tables are drawn.
    """
    tables = {n: found for n, found in findings.items() if isinstance(found, pd.DataFrame)}
    curves = {}
    for name, table in tables.items():
        curve = tasks[name].curve if tasks and name in tasks else None
        if curve is not None and (missing := curve.missing(table.columns)):
            log.warning("%s is not drawn: its table has no column %s", name, ", ".join(missing))
        elif curve is not None:
            curves[name] = curve
    drawn = {name: table for name, table in tables.items() if name in curves or name in TASKS}
    for name in tables.keys() - drawn.keys():
        with written_aside(task_file(folder, name)) as path:
            tables[name].to_csv(path, index=False)
    again = next((f for f in findings.values() if isinstance(f, Sensitivity)), None)
    results = replace(results, tasks=drawn, retraining=again)
    return replace(results, curves=curves) if curves else results
