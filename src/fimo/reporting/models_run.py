"""What a study of several final models found, and its folder as its form on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fimo.data.reading import EXACT
from fimo.errors import InputError
from fimo.evaluation.several_models import SeveralModels
from fimo.further_training.sensitivity import Sensitivity
from fimo.reporting.results import SEVERAL, Results, read_config, task_file
from fimo.store.files import written_aside

FOLDER = "final_models"
"""Of a run's folder: a folder for each final model, by its seed; of those given, by their position."""

EACH = "evaluation_models.csv"

VALUES = ("mean", "sem", "ceiling", "ceiling_lower", "chance", "final_models", "sem_models")
"""Columns of further evaluations' tables that are no part of what tells rows apart."""


@dataclass(frozen=True)
class ModelsRun:
    """A study of K final models.

    Args:
        combined: all of them as one run: standard errors are over final models throughout, of agreements
            and of effects, whose "seeds" are the final models'; no method's scores.
        evaluation, pairs, variance: tables of :class:`~fimo.evaluation.several_models.SeveralModels`.
        each: ``method,metric,final_model,mean,ceiling`` after all further training.
        models: by final model (its seed; of given ones the position), ``train_loss, test_loss`` and so on.
        seeds: of further training.
    """

    combined: Results
    evaluation: pd.DataFrame
    pairs: pd.DataFrame
    variance: pd.DataFrame
    each: pd.DataFrame
    models: Mapping[int, Mapping[str, float]]
    seeds: int

    @classmethod
    def of(
        cls,
        results: Mapping[int, Results],
        several: SeveralModels,
        cost: pd.DataFrame,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> ModelsRun:
        """Put studies of single final models together.

        Args:
            results: by final model, see :func:`only_means`.
            several: their evaluations, in the same order.
            cost: of all together.
        """
        runs, order = list(results.values()), list(results)
        first = runs[0]
        table = several.table.assign(sem=several.table["sem_models"])
        skipped = {name: why for run in runs for name, why in run.skipped.items()}
        combined = dataclasses.replace(
            first,
            name=f"{first.name}, {len(runs)} final models",
            sensitivity=_as_replicas([run.sensitivity for run in runs], order),
            evaluation=table,
            cost=cost,
            final_model=_means([run.final_model for run in runs]),
            config=config,
            versions=versions,
            shown=_without_predictions(first),
            skipped=skipped,
            warnings=several.notes,
            bootstrap=None,
            slopes=None,
            distance=_distances(runs, order),
            tasks=(tasks := _tasks(runs)),
            curves={task: curve for task, curve in first.curves.items() if task in tasks},
            folder=None,
        )
        each = several.each.assign(final_model=several.each["model"].map(dict(enumerate(order))))
        return cls(
            combined,
            several.table,
            several.pairs,
            several.variance,
            each[["method", "metric", "final_model", "mean", "ceiling"]],
            {name: dict(run.final_model) for name, run in results.items()},
            int(several.table["seeds"].max()),
        )

    def save(self, folder: Path) -> None:
        """Write what a run's folder holds besides the evaluation's tables and the single final models."""
        with written_aside(folder / EACH) as path:
            self.each.to_csv(path, index=False)
        for task, table in self.combined.tasks.items():
            with written_aside(task_file(folder, task)) as path:
                table.to_csv(path, index=False)
        about = {
            "final_models": [{"final_model": name, **facts} for name, facts in self.models.items()],
            "notes": list(self.combined.warnings),
            "versions": dict(self.combined.versions),
        }
        with written_aside(folder / SEVERAL) as path:
            path.write_text(json.dumps(about, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> ModelsRun:
        """Read the folder of a run with ``model.seeds`` above 1.

        Raises:
            InputError: it is none, or did not finish.
        """
        folder = Path(folder)
        if not (folder / SEVERAL).exists():
            raise InputError(
                str(folder), f"{SEVERAL} is missing: no folder of several final models' finished run"
            )
        about = json.loads((folder / SEVERAL).read_text())
        names = [int(facts["final_model"]) for facts in about["final_models"]]
        tables = {
            name: pd.read_csv(folder / file, **EXACT)
            for name, file in (
                ("table", "evaluation.csv"),
                ("pairs", "evaluation_pairs.csv"),
                ("variance", "evaluation_variance.csv"),
                ("each", EACH),
            )
        }
        each = tables.pop("each")
        each["model"] = each["final_model"].map({name: k for k, name in enumerate(names)})
        return cls.of(
            {name: only_means(Results.load(folder / FOLDER / str(name))) for name in names},
            SeveralModels(**tables, each=each, notes=tuple(about["notes"])),
            pd.read_csv(folder / "cost.csv", **EXACT),
            read_config(folder / ".hydra" / "config.yaml"),
            about["versions"],
        )


def only_means(run: Results) -> Results:
    """Return a run without what several at once have no room for: single seeds and scores."""
    one = run.sensitivity
    losses = None if one.full_losses is None else one.full_losses.mean(0, keepdim=True)
    means = dataclasses.replace(
        one,
        raw=one.sensitivity[None],
        seeds=one.seeds[:1],
        distance_full=None,
        distance=None,
        full_losses=losses,
    )
    return dataclasses.replace(run, sensitivity=means, scores={}, retraining=None, has_raw=True)


def _as_replicas(means: Sequence[Sensitivity], seeds: Sequence[int]) -> Sensitivity:
    """Return sensitivities of single final models as one, in which a final model is what a seed was."""
    losses = [one.full_losses for one in means if one.full_losses is not None]
    return dataclasses.replace(
        means[0],
        raw=torch.cat([one.raw for one in means]),
        seeds=torch.tensor(list(seeds)),
        full_losses=torch.cat(losses) if len(losses) == len(means) else None,
    )


def _means(facts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over final models of the numbers that all of them have."""
    names = [name for name in facts[0] if all(name in one for one in facts)]
    return {name: math.fsum(one[name] for one in facts) / len(facts) for name in names}


def _without_predictions(run: Results) -> Any:
    """Return the instances that the report shows, without what one of the final models makes of them."""
    return {
        split: {i: dataclasses.replace(d, prediction=None, loss=None) for i, d in shown.items()}
        for split, shown in run.shown.items()
    }


def _tasks(runs: Sequence[Results]) -> dict[str, pd.DataFrame]:
    """Return further evaluations of final models as means, ``sem`` over final models.

    Tables whose rows are not the same with every final model are in the single final models' folders only.
    """
    found = {}
    for task in runs[0].tasks:
        tables = [run.tasks[task] for run in runs if task in run.tasks]
        table = pd.concat(tables)
        keys = [column for column in tables[0] if column not in VALUES]
        rows = table.groupby(keys, sort=False, dropna=False)
        if len(tables) < len(runs) or (rows.size() != len(runs)).any():
            continue
        values = [column for column in tables[0] if column in VALUES]
        means = rows[values].mean().assign(sem=rows["mean"].sem(), final_models=len(runs))
        found[task] = means.reset_index()[
            [*tables[0], *([] if "final_models" in values else ["final_models"])]
        ]
    return found


def _distances(runs: Sequence[Results], seeds: Sequence[int]) -> pd.DataFrame | None:
    """Return how far each final model's full runs moved, on average over their seeds."""
    tables = [
        run.distance.drop(columns="seed").groupby(["step", "epoch"]).mean().reset_index().assign(seed=seed)
        for run, seed in zip(runs, seeds, strict=True)
        if run.distance is not None
    ]
    return pd.concat(tables, ignore_index=True) if tables else None
