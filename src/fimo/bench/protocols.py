"""Other ways to judge methods from the same final models: tasks that run the engine again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fimo.app.run import Run
from fimo.bench.gold_standard import GoldStandard, Measured
from fimo.bench.making import check_same
from fimo.bench.scoring import Candidate, Judge
from fimo.bench.settings import Setting, identity
from fimo.bench.trained import Trained
from fimo.bench.verification import Verdict, together
from fimo.errors import InputError
from fimo.evaluation.assessment import assess
from fimo.evaluation.metrics import DEFAULT
from fimo.further_training.sensitivity import Sensitivity
from fimo.tasks import (
    ClassDetection,
    Datamodeling,
    Mislabelled,
    MixedDatasets,
    RandomisedModel,
    Retraining,
    ShortcutDetection,
    SubclassDetection,
)
from fimo.tasks.base import Task
from fimo.tasks.controls import Control

SEEDS = 5
"""Of training from scratch, where the gold standard has more."""

Found = pd.DataFrame | Sensitivity
Protocol = Callable[[Measured, Run], tuple[Task, Callable[[Found], pd.DataFrame]]]


def lds(one: Measured, run: Run) -> tuple[Task, Callable[[Found], pd.DataFrame]]:
    """Return the linear datamodeling score by further training, of 50 random halves."""

    def judged(found: Found) -> pd.DataFrame:
        assert isinstance(found, pd.DataFrame)
        return found

    return Datamodeling(), judged


def retraining(one: Measured, run: Run) -> tuple[Task, Callable[[Found], pd.DataFrame]]:
    """Return agreement with training from scratch leaving one out, on the same instances."""

    def judged(found: Found) -> pd.DataFrame:
        assert isinstance(found, Sensitivity)
        scores = {name: one.at_end() for name, one in run.scores(run.left_out).items()}
        table = assess(scores, found, DEFAULT, [len(found.seeds)], resamples=0).table
        return table.assign(metric="retraining_" + table["metric"])

    return Retraining(min(SEEDS, len(run.seeds))), judged


def mislabelled(one: Measured, run: Run) -> tuple[Task, Callable[[Found], pd.DataFrame]]:
    """Return the average precision of finding flipped labels among 100 instances, by self-influence."""

    def judged(found: Found) -> pd.DataFrame:
        assert isinstance(found, pd.DataFrame)
        unknown = {"ceiling": float("nan"), "ceiling_lower": float("nan")}
        return found.assign(metric="mislabelled", step=0, epoch=0, **unknown)

    return Mislabelled(repeats=1, seeds=0, seed=one.about["seed"]), judged


def control(task: type[Control]) -> Protocol:
    """Return one of quanda's controls, with its own settings."""

    def asked(one: Measured, run: Run) -> tuple[Task, Callable[[Found], pd.DataFrame]]:
        def judged(found: Found) -> pd.DataFrame:
            assert isinstance(found, pd.DataFrame)
            unknown = {"ceiling": float("nan"), "ceiling_lower": float("nan")}
            return found.assign(metric=task.name, step=0, epoch=0, **unknown)

        return task(seed=one.about["seed"]), judged

    return asked


CONTROLS: tuple[type[Control], ...] = (
    ClassDetection, SubclassDetection, ShortcutDetection, MixedDatasets, RandomisedModel,
)  # fmt: skip
PROTOCOLS: dict[str, Protocol] = {
    "lds": lds, "retraining": retraining, "mislabelled": mislabelled,
    **{task.name: control(task) for task in CONTROLS},
}  # fmt: skip
"""By name; each returns a task of one final model, and how its finding becomes rows."""


def judge_of(protocol: str, gold: GoldStandard, setting: Setting, store: Path) -> Judge:
    """Return what judges a method by a protocol; what it trains is kept in a store, for other methods.

    Args:
        setting: of the gold standard, as it is configured here: its data are needed.

    Raises:
        InputError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise InputError("--protocol", f"expected one of {', '.join(PROTOCOLS)} but got {protocol!r}")

    def judge(one: Measured, candidate: Candidate) -> pd.DataFrame:
        run = run_of(one, candidate, setting, store)
        task, rows = PROTOCOLS[protocol](one, run)
        task.check(run)
        found = rows(task(run))
        found = found[found["method"] == candidate.name].rename(columns={"ceiling": "ceiling_upper"})
        found = found if "chance" in found else found.assign(chance=0.0)
        columns = ["metric", "epoch", "step", "mean", "ceiling_lower", "ceiling_upper", "chance"]
        return found[columns].assign(
            final_model=one.about["seed"], seconds=float("nan"), memory_mb=float("nan")
        )

    return judge


def run_of(one: Measured, candidate: Candidate, setting: Setting, store: Path) -> Run:
    """Return a run of a final model, with a method, as tasks need it.

    Raises:
        InputError: the data are not here, or the final model that is trained here is another one.
    """
    config = setting.config(one.about["seed"], store, one.about["config"]["scale"])
    check_same(one.folder, identity(config))
    trained = Trained.of(config)
    same = together("final model", one.parameters, trained.run.final_model.state())
    if same.found == Verdict.DIFFERENT:
        raise InputError("setting", f"the {same.what} trained here is not {one.folder}'s: {same.details}")
    methods = {candidate.name: candidate.method}
    return dataclasses.replace(trained.whole, methods=methods, settings={candidate.name: candidate.settings})
