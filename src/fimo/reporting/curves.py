"""The numbers behind each figure as tidy tables, from which interactive and static figures are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from fimo.evaluation.metrics import MetricName, mean_and_sem
from fimo.evaluation.resampling import mean_agreements
from fimo.reporting.findings import at_last_point, method_order, scored_methods
from fimo.reporting.results import Results
from fimo.reporting.task_curves import KNOWN, Curve


def agreement_table(run: Results, metric: str) -> pd.DataFrame:
    """Return the evaluation's rows with all seeds, best method first."""
    table = run.evaluation
    rows = table[(table["metric"] == metric) & (table["seeds"] == run.seeds)]
    return _ordered(run, with_epochs(run, rows))


def last_table(run: Results, metric: str) -> pd.DataFrame:
    """Return ``method,mean,sem,ceiling`` at the last evaluation point with all seeds, best first."""
    return at_last_point(run, metric)[["method", "mean", "sem", "ceiling"]]


def seeds_table(run: Results, metric: str) -> pd.DataFrame:
    """Return ``method,seeds,mean,sem,ceiling`` at the last evaluation point."""
    table = run.evaluation
    rows = table[(table["metric"] == metric) & (table["step"] == table["step"].max())]
    return _ordered(run, rows).sort_values("seeds", kind="stable")


def cost_table(run: Results, metric: str) -> pd.DataFrame:
    """Return ``method,seconds,peak_memory_mb,gradient_evaluations,mean,sem`` at the last point."""
    rows = at_last_point(run, metric)[["method", "mean", "sem"]]
    table = rows.merge(run.cost.rename(columns={"stage": "method"}), on="method")
    return table.assign(seconds=table["seconds"].clip(lower=1e-4))


def mean_effect_table(run: Results, metric: str) -> pd.DataFrame:
    """Return ``method,subtract_mean,step,epoch,mean,sem``: agreement with raw and with adjusted changes."""
    if not run.has_raw or not scored_methods(run):
        return pd.DataFrame(columns=["method", "subtract_mean", "step", "epoch", "mean", "sem"])
    frames = []
    average = run.sensitivity.raw.mean(0, keepdim=True)
    for subtract in (True, False):
        judged = {m: run.judged_scores(m, subtract) for m in scored_methods(run)}
        found = mean_agreements(judged, average, {1: [[0]]}, _metric(metric), subtract)[1]
        frames += [_mean_frame(run, values, method=m, subtract_mean=subtract) for m, values in found.items()]
    return with_epochs(run, pd.concat(frames, ignore_index=True))


def distance_table(run: Results) -> pd.DataFrame | None:
    """Return ``step,epoch,mean,sem`` over seeds of the relative distance moved, or None."""
    if run.distance is None:
        return None
    table = run.distance.groupby(["step", "epoch"])["relative"].agg(["mean", "sem"]).reset_index()
    return with_epochs(run, table)


def loss_table(run: Results) -> pd.DataFrame | None:
    """Return ``step,epoch,mean,sem``: test loss of the full runs, mean ± SEM over seeds, or None."""
    losses = run.sensitivity.full_losses
    if losses is None:
        return None
    return with_epochs(run, _mean_frame(run, losses.mean(-1).T))


def retraining_table(run: Results, metric: str) -> pd.DataFrame | None:
    """Return ``method,step,epoch,mean,sem``: agreement with retraining from scratch, or None.

    The method named ``further training`` is the sensitivity itself.
    """
    if run.retraining is None:
        return None
    truth = run.retraining.sensitivity[-1:].expand(len(run.sensitivity.step), -1, -1)
    scores = {"further training": run.sensitivity.sensitivity} | {
        m: run.judged_scores(m) for m in scored_methods(run)
    }
    found = mean_agreements(scores, truth[None], {1: [[0]]}, _metric(metric), subtract_mean=False)[1]
    frames = [_mean_frame(run, values, method=m) for m, values in found.items()]
    return with_epochs(run, pd.concat(frames, ignore_index=True))


def task_table(run: Results, task: str) -> pd.DataFrame | None:
    """Return the rows that a task's curve is drawn from, ``method,mean,sem`` and its column, or None."""
    if (curve := run.curve(task)) is None:
        return None
    table = run.tasks[task]
    if curve.x == "epoch":
        return _ordered(run, with_epochs(run, table))
    return _ordered(run, table[table["step"] == table["step"].max()] if "step" in table else table)


def drawn_tasks(runs: Sequence[Results]) -> dict[str, Curve]:
    """Return the curves of runs' tasks, of each the first run's that has it."""
    found: dict[str, Curve] = {}
    for run in runs:
        for task in run.tasks:
            if (curve := run.curve(task)) is not None:
                found.setdefault(task, curve)
    return found


def figure_of_task(task: str) -> str:
    """Return the name of a task's figure, which may not be that of another figure of the report."""
    return task if task in KNOWN else f"task-{task}"


def mislabelled_table(run: Results) -> pd.DataFrame | None:
    """Return ``method,mean,sem,chance`` of detecting flipped labels, best first, or None."""
    table = run.tasks.get("mislabelled")
    return None if table is None else table.sort_values("mean", ascending=False)


def with_epochs(run: Results, table: pd.DataFrame) -> pd.DataFrame:
    """Make ``epoch`` fractional where evaluation points lie within epochs, so that they stand apart."""
    step, epoch = run.sensitivity.step, run.sensitivity.epoch
    if len(torch.unique(epoch)) == len(epoch):
        return table
    size = run.dataset.get("steps_per_epoch") or _steps_per_epoch(step.tolist(), epoch.tolist())
    return table.assign(epoch=table["step"] / size)


def _steps_per_epoch(step: list[int], epoch: list[int]) -> float:
    # epoch e covers steps (e - 1) n + 1 ... e n: the most steps seen within the epochs begun
    return max(s / e for s, e in zip(step, epoch, strict=True) if e > 0)


def _ordered(run: Results, rows: pd.DataFrame) -> pd.DataFrame:
    place = {method: i for i, method in enumerate(method_order(run))}
    return rows.sort_values("method", key=lambda c: c.map(place).fillna(len(place)), kind="stable")


def _mean_frame(run: Results, values: Tensor, **columns: object) -> pd.DataFrame:
    """Return ``step,epoch,mean,sem`` of values ``[E, n]``, after columns that say what they are of."""
    mean, sem = mean_and_sem(values)
    return pd.DataFrame({**columns, **_points(run), "mean": mean.tolist(), "sem": sem.tolist()})


def _points(run: Results) -> dict[str, list[int]]:
    return {"step": run.sensitivity.step.tolist(), "epoch": run.sensitivity.epoch.tolist()}


def _metric(name: str) -> MetricName:
    return name  # type: ignore[return-value]
