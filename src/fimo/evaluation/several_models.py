"""The evaluations of several final models as one: means with their error over final models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from fimo.errors import InputError
from fimo.evaluation.assessment import COLUMNS, Evaluation, undefined
from fimo.evaluation.ceiling import not_enough_seeds
from fimo.evaluation.metrics import mean_and_sem
from fimo.evaluation.over_models import probability_better, variance_components
from fimo.store.files import written_aside

ROW = ["method", "metric", "step", "seeds"]
"""What tells rows of ``evaluation.csv`` apart."""

PAIRS = [
    "metric", "step", "epoch", "method", "other", "difference", "sem_models", "probability",
    "probability_another", "final_models",
]  # fmt: skip
VARIANCE = [
    "metric", "step", "epoch", "method", "mean", "final_models", "seeds", "tests",
    "variance_models", "variance_seeds", "variance_tests", "variance_models_tests", "variance_seeds_tests",
    "part_models", "part_seeds", "part_tests",
]  # fmt: skip


@dataclass(frozen=True)
class SeveralModels:
    """How well methods agree with the sensitivities of K final models.

    Args:
        table: ``evaluation.csv``, columns :data:`COLUMNS`: means over final models, ``sem_models`` their
            standard error over final models, ``sem`` that over test instances (of agreements averaged over
            final models), ceilings averaged over final models.
        pairs: ``evaluation_pairs.csv``, columns :data:`PAIRS`, with all seeds averaged: each two methods, the
            better one first; ``probability`` that it is better on average over final models,
            ``probability_another`` that it is on one more final model
            (:func:`~fimo.evaluation.over_models.probability_better`).
        variance: ``evaluation_variance.csv``, columns :data:`VARIANCE`: components of the variance of an
            agreement (:class:`~fimo.evaluation.over_models.VarianceComponents`), then the parts of the
            variance of the mean that each makes; empty where the seeds' spread was not measured.
        each: agreement of each final model, ``method,metric,model,mean,ceiling``, after all further training
            with all seeds averaged.
        notes: what a reader must know.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    variance: pd.DataFrame
    each: pd.DataFrame
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Write ``evaluation.csv``, ``evaluation_pairs.csv`` and ``evaluation_variance.csv``."""
        frames = {"": self.table, "_pairs": self.pairs, "_variance": self.variance}
        for suffix, frame in frames.items():
            with written_aside(folder / f"evaluation{suffix}.csv") as path:
                frame.to_csv(path, index=False)


def over_models(evaluations: Sequence[Evaluation]) -> SeveralModels:
    """Put the evaluations of K final models together, of the methods that all of them have.

    Args:
        evaluations: by the same metrics at the same points, with the same seeds and test instances.

    Raises:
        InputError: fewer than two, or they have no method in common.
    """
    if len(evaluations) < 2:
        raise InputError("model.seeds", f"expected at least 2 evaluations but got {len(evaluations)}")
    ran = [list(e.table["method"].unique()) for e in evaluations]
    methods = [m for m in ran[0] if all(m in names for names in ran)]
    if not methods:
        raise InputError("method", "no method has scores with every final model")
    missing = sorted({m for names in ran for m in names} - set(methods))
    tables = [e.table[e.table["method"].isin(methods)] for e in evaluations]
    table = _means(evaluations, tables)
    pairs, variances = [], []
    for metric, rows in table.groupby("metric", sort=False):
        points = rows.drop_duplicates("step")[["step", "epoch"]]
        pairs += list(_pairs(evaluations, methods, str(metric), points))
        variances += list(_variance(evaluations, methods, str(metric), points))
    notes = _notes(evaluations, table, methods)
    notes += [f"{name}: has no scores with some final models and is left out" for name in missing]
    return SeveralModels(
        table,
        pd.concat(pairs, ignore_index=True)[PAIRS] if pairs else pd.DataFrame(columns=PAIRS),
        pd.concat(variances, ignore_index=True)[VARIANCE] if variances else pd.DataFrame(columns=VARIANCE),
        _each(tables),
        tuple(notes),
    )


def _means(evaluations: Sequence[Evaluation], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return ``evaluation.csv`` over final models, rows in the order of the first one's."""
    means = (
        pd.concat(tables)
        .groupby(ROW, sort=False)
        .agg(
            access=("access", "first"),
            epoch=("epoch", "first"),
            mean=("mean", "mean"),
            ceiling=("ceiling", "mean"),
            ceiling_lower=("ceiling_lower", "mean"),
            followed_seeds=("followed_seeds", "first"),
            final_models=("mean", "count"),
            sem_models=("mean", "sem"),
        )
        .reset_index()
    )
    sems = []
    for (method, metric, seeds), rows in means.groupby(["method", "metric", "seeds"], sort=False):
        each = torch.stack([e.instances[str(method), str(metric), int(str(seeds))] for e in evaluations])
        sems.append(pd.Series(mean_and_sem(each.nanmean(0))[1].tolist(), index=rows.index))
    return means.assign(sem=pd.concat(sems))[COLUMNS]


def _pairs(
    evaluations: Sequence[Evaluation], methods: Sequence[str], metric: str, points: pd.DataFrame
) -> Iterator[pd.DataFrame]:
    """Yield, for each two methods, their differences by evaluation point, the better one first."""
    values = torch.stack(
        [
            torch.stack([_with_all_seeds(e, m, metric).nanmean(-1).double() for e in evaluations])
            for m in methods
        ]
    ).movedim(-1, 0)  # [E, M, K]
    better, another = (probability_better(values, on_another) for on_another in (False, True))
    for a, one in enumerate(methods):
        for b in range(a + 1, len(methods)):
            mean, sem = mean_and_sem(values[:, a] - values[:, b])
            first = mean >= 0
            sign = torch.where(first, 1.0, -1.0)
            yield pd.DataFrame(
                {
                    "metric": metric,
                    "step": points["step"].to_list(),
                    "epoch": points["epoch"].to_list(),
                    "method": [one if ahead else methods[b] for ahead in first.tolist()],
                    "other": [methods[b] if ahead else one for ahead in first.tolist()],
                    "difference": (sign * mean).tolist(),
                    "sem_models": sem.tolist(),
                    "probability": torch.where(first, better[:, a, b], better[:, b, a]).tolist(),
                    "probability_another": torch.where(first, another[:, a, b], another[:, b, a]).tolist(),
                    "final_models": (values[:, a] - values[:, b]).isfinite().sum(-1).tolist(),
                }
            )


def _variance(
    evaluations: Sequence[Evaluation], methods: Sequence[str], metric: str, points: pd.DataFrame
) -> Iterator[pd.DataFrame]:
    """Yield each method's components of variance by evaluation point."""
    for method in methods:
        spreads = [e.spreads[method, metric] for e in evaluations if (method, metric) in e.spreads]
        if len(spreads) < len(evaluations):
            continue
        found = variance_components(spreads)
        parts = found.of_mean()
        yield pd.DataFrame(
            {
                "metric": metric,
                "step": points["step"].to_list(),
                "epoch": points["epoch"].to_list(),
                "method": method,
                "mean": found.mean.tolist(),
                "final_models": found.counts[0],
                "seeds": found.counts[1],
                "tests": found.defined.tolist(),
                "variance_models": found.models.tolist(),
                "variance_seeds": found.seeds.tolist(),
                "variance_tests": found.tests.tolist(),
                "variance_models_tests": found.models_tests.tolist(),
                "variance_seeds_tests": found.seeds_tests.tolist(),
                **{f"part_{name}": part.tolist() for name, part in parts.items()},
            }
        )


def _with_all_seeds(evaluation: Evaluation, method: str, metric: str) -> torch.Tensor:
    """Return a method's agreement ``[E, J]`` with the mean over all seeds."""
    most = max(k for name, by, k in evaluation.instances if (name, by) == (method, metric))
    return evaluation.instances[method, metric, most]


def _notes(evaluations: Sequence[Evaluation], table: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    """Return what a reader must know: too few seeds by the mean ceiling, undefined values in all."""
    first, total = str(table["metric"].iloc[0]), int(table["seeds"].max())
    last = table[(table["step"] == table["step"].max()) & (table["seeds"] == total)]
    few = not_enough_seeds(float(last[last["metric"] == first]["ceiling"].iloc[0]), total, first)
    together = {
        key: torch.cat([e.instances[key] for e in evaluations])
        for key in evaluations[0].instances
        if key[0] in methods
    }
    return [*([few] if few else []), *undefined(together, total)]


def _each(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the agreement of each final model at the last point."""
    last = [
        t[(t["step"] == t["step"].max()) & (t["seeds"] == t["seeds"].max())].assign(model=k)
        for k, t in enumerate(tables)
    ]
    table: pd.DataFrame = pd.concat(last, ignore_index=True)[["method", "metric", "model", "mean", "ceiling"]]
    return table
