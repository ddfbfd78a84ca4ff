"""Judging methods by gold standards that are there: seconds instead of hours."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from fimo.api import attribute
from fimo.app.arguments import imported
from fimo.bench.gold_standard import GoldStandard, Measured
from fimo.cost import held_memory_mb, measured
from fimo.errors import InputError
from fimo.evaluation.assessment import adjusted_scores, aligned
from fimo.evaluation.metrics import DEFAULT, agreement
from fimo.methods.base import AttributionMethod
from fimo.methods.catalogue import method_of
from fimo.scores import Scores
from fimo.store.files import written_aside

log = logging.getLogger(__name__)

RESULTS, FINAL_MODELS = "results.csv", "final_models.csv"

COLUMNS = [
    "setting", "method", "metric", "epoch", "mean", "sem_models", "ceiling_lower", "ceiling_upper", "seconds",
    "share_of_cost", "step", "final_models", "gold_standard", "memory_mb", "chance",
]  # fmt: skip
"""Of ``results.csv``."""

BY_FINAL_MODEL = [
    "setting", "method", "metric", "epoch", "final_model", "mean", "ceiling_lower", "ceiling_upper",
    "seconds", "step", "gold_standard", "memory_mb", "chance",
]  # fmt: skip
"""Of ``final_models.csv``."""

AMOUNT = ["setting", "method", "metric", "epoch", "step"]


@dataclass(frozen=True)
class Candidate:
    """A method to be judged.

    Args:
        name: under which it stands in tables.
        method: the method.
        settings: arguments that it was given.
    """

    name: str
    method: AttributionMethod
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Any]) -> Candidate:
        """Return a method by its name, or the class that a dotted path names.

        Args:
            settings: arguments of it.

        Raises:
            InputError: there is no such method, or no such setting.
        """
        chosen: Any = name
        if "." in name:
            chosen = imported(name, "--method")
            if not (isinstance(chosen, type) and issubclass(chosen, AttributionMethod)):
                raise InputError("--method", f"{name} is no subclass of fimo.AttributionMethod")
        label = f"{name}({', '.join(f'{k}={v}' for k, v in settings.items())})" if settings else name
        return cls(label, method_of(chosen, settings)[1], settings)


Judge = Callable[[Measured, Candidate], pd.DataFrame]
"""Judges a method by one final model; see :func:`by_agreement`."""


def score(gold: GoldStandard, candidate: Candidate, folder: Path, judge: Judge | None = None) -> pd.DataFrame:
    """Judge a method by a setting's gold standards, and write what is found among the results.

    Args:
        folder: of ``results.csv`` and ``final_models.csv``.
        judge: :func:`by_agreement` when None.

    Returns:
        the rows of ``results.csv``, :data:`COLUMNS`.

    Raises:
        InputError: the method does not apply to this setting.
    """
    rows = pd.concat([(judge or by_agreement)(one, candidate) for one in gold], ignore_index=True)
    rows = rows.assign(setting=gold.name, method=candidate.name, gold_standard=gold.identity)
    results = over_final_models(rows, gold)
    replace_rows(folder, RESULTS, results)
    replace_rows(folder, FINAL_MODELS, rows[BY_FINAL_MODEL])
    return results


def by_agreement(one: Measured, candidate: Candidate) -> pd.DataFrame:
    """Return a method's agreement with one final model's sensitivities, the mean over test instances.

    Methods that follow seeds follow others than those of the gold standard.

    Returns:
        ``metric,epoch,step,final_model,mean,ceiling_lower,ceiling_upper,seconds,memory_mb,chance``.
    """
    truth = one.truth
    candidate.method.load()
    before = held_memory_mb()
    with measured(candidate.name) as cost:
        found = scores_of(one, candidate.method)
    memory = max(0.0, cost.peak_memory_mb - before)
    scores = aligned(found, truth, candidate.name)
    values = adjusted_scores(scores.values, scores.predicts_loss_change, truth.subtract_mean)
    fixed = {"epoch": truth.epoch.tolist(), "step": truth.step.tolist(), "final_model": one.about["seed"]}
    tables = []
    for metric in DEFAULT:
        ceilings = one.about["ceilings"][metric]
        agreed = {
            "mean": agreement(values, truth.sensitivity, metric).nanmean(-1).tolist(),
            "ceiling_lower": ceilings["lower"],
            "ceiling_upper": ceilings["upper"],
        }
        spent = {"seconds": scores.seconds, "memory_mb": memory, "chance": 0.0}
        tables.append(pd.DataFrame({"metric": metric, **fixed, **agreed, **spent}))
    return pd.concat(tables, ignore_index=True)


def scores_of(one: Measured, method: AttributionMethod) -> Scores:
    """Return a method's scores of what the gold standard left out."""
    truth = one.truth
    members = truth.left_out if truth.groups is None else truth.groups.flatten()
    with torch.random.fork_rng():
        torch.manual_seed(one.about["seed"])
        return attribute(
            one.final_model(), one.train, one.test, method, members[members >= 0].unique(),
            further_training=one.protocol, seeds=one.followed_seeds,
        )  # fmt: skip


def over_final_models(rows: pd.DataFrame, gold: GoldStandard) -> pd.DataFrame:
    """Return the rows of ``results.csv``: means and standard errors over final models.

    Args:
        rows: of each final model, :data:`BY_FINAL_MODEL`.
    """
    found = rows.groupby([*AMOUNT, "gold_standard"], sort=False).agg(
        mean=("mean", "mean"), sem_models=("mean", "sem"), ceiling_lower=("ceiling_lower", "mean"),
        ceiling_upper=("ceiling_upper", "mean"), seconds=("seconds", "mean"),
        final_models=("final_model", "nunique"), memory_mb=("memory_mb", "max"),
        chance=("chance", "mean"),
    ).reset_index()  # fmt: skip
    return found.assign(share_of_cost=found["seconds"] / cost_of(gold))[COLUMNS]


def cost_of(gold: GoldStandard) -> float:
    """Return the seconds that the gold standard of one final model took, where it was made."""
    each: list[float] = [one["cost"]["seconds"]["further_training"] for one in gold.card["final_models"]]
    return sum(each) / len(each)


def replace_rows(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Add rows to a table, in the place of those of the same setting, method and metrics."""
    path = folder / name
    with FileLock(folder / f".{name}.lock"):
        if path.exists():
            before = pd.read_csv(path)
            named = ["setting", "method", "metric"]
            new = set(rows[named].itertuples(index=False, name=None))
            stays = [one not in new for one in before[named].itertuples(index=False, name=None)]
            rows = pd.concat([before[stays], rows], ignore_index=True) if any(stays) else rows
        with written_aside(path) as aside:
            rows.to_csv(aside, index=False, float_format="%.6g")


def told(rows: pd.DataFrame) -> str:
    """Return in one line how a method did after all further training, by the first metric."""
    last = rows[rows["metric"] == rows["metric"].iloc[0]].iloc[-1]
    line = f"{last['setting']}, {last['method']}: {last['metric']} "
    line += with_error(last["mean"], last["sem_models"])
    if last["chance"]:
        line += f" (chance {last['chance']:.3f})"
    if not math.isnan(last["ceiling_upper"]):
        line += f" (ceiling {last['ceiling_lower']:.3f} to {last['ceiling_upper']:.3f})"
    if math.isnan(last["seconds"]):
        return line
    return f"{line}, {last['seconds']:.2f} s, {percent(last['share_of_cost'])} of the gold standard's"


def with_error(mean: float, sem: float) -> str:
    """Return a mean and, where there is one, its standard error."""
    mean = round(mean, 3) + 0.0  # no negative zero
    return f"{mean:.3f}" if math.isnan(sem) else f"{mean:.3f} ± {sem:.3f}"


def percent(share: float) -> str:
    """Return a share with two figures."""
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def applicable_names(names: Sequence[str]) -> list[str]:
    """Return method names, ``all`` standing for every one that there is."""
    from fimo.methods import catalogue

    return [one for name in names for one in (list(catalogue.table().index) if name == "all" else [name])]
