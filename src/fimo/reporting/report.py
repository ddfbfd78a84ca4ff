"""The report: one HTML file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fimo.reporting.curves import drawn_tasks, figure_of_task
from fimo.reporting.explorer import explorer_data
from fimo.reporting.findings import (
    above_ceiling,
    at_last_point,
    highlighted,
    label,
    method_order,
    same_scores,
    same_seeds,
)
from fimo.reporting.flat import flat
from fimo.reporting.html_page import decimals, write_page
from fimo.reporting.interactive import all_figures
from fimo.reporting.measured_rows import measured_rows
from fimo.reporting.naming import differences
from fimo.reporting.panels import MOST_POINTS, Palette
from fimo.reporting.results import Results, plain
from fimo.reporting.study_answer import best_method, follows, study_answer, within_class
from fimo.reporting.tables import Column, effects, instance_columns, table
from fimo.reporting.trust import coverage, departures, trusted_methods

EFFECT = "change of the {} when it is left out, ± standard error over {}; positive: it {}"


def write_report(results: Results | Sequence[Results], path: str | Path) -> Path:
    """Write one self-contained page about one run, or several side by side with their curves overlaid.

    The page holds plotly.js once and every number it shows; it asks nothing of a network.

    Returns:
        its path.
    """
    runs = [results] if isinstance(results, Results) else list(results)
    comparison = figures(runs) if len(runs) > 1 else None
    measured = [measured_rows(run) for run in runs]
    return write_page(
        "report.html",
        Path(path),
        {
            "runs": [
                {
                    "figures": figures([run]),
                    "explorer": plain(explorer_data(run)),
                    "rows": rows_table(run, rows),
                    "methods": methods_table(run),
                }
                for run, rows in zip(runs, measured, strict=True)
            ],
            "comparison": comparison,
        },
        ["figures.js"],
        title=f"fimo: {' | '.join(run.name for run in runs)}",
        runs=[run_context(run, rows) for run, rows in zip(runs, measured, strict=True)],
        comparison=comparison,
        differing=differences(runs),
        most_points=MOST_POINTS,
    )


def figures(runs: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """Return figures as plotly's JSON by name, then by metric (``""`` where there is none)."""
    return {
        name: {metric: json.loads(figure.to_json()) for metric, figure in by_metric.items()}
        for name, by_metric in all_figures(runs).items()
    }


def rows_table(run: Results, rows: pd.DataFrame, over: str = "seeds") -> dict[str, Any]:
    """Return the table of measured rows, the largest effects first; with the best method's mean score.

    Args:
        over: what effects are means over, and their errors.
    """
    best = best_method(run)["method"]
    order = rows["effect"].abs().argsort(kind="stable")[::-1]
    ordered = rows.iloc[order]
    displays = [run.show("train", int(i)) for i in ordered["index"]]
    within = within_class(run, rows)
    scores: Sequence[Any] = [None] * len(rows)
    if best in run.scores:
        judged = run.judged_scores(best)
        scores = (judged[-1] if judged.ndim == 3 else judged).double().mean(0)[order.tolist()].tolist()
    count = run.seeds if over == "seeds" else len(run.sensitivity.seeds)
    agreeing = ordered["agreeing"] if count > 1 and run.has_raw else [None] * len(rows)
    in_class: Sequence[Any] = [None] * len(rows)
    if within is not None:
        in_class = effects([within[k] for k in order], ordered["error"])
    said = EFFECT.format(run.measured.mean, over, run.measured.positive)
    columns = [
        Column(f"training {run.noun}", "name", list(ordered["name"])),
        Column("effect", "effect", effects(ordered["effect"], ordered["error"]), said),
        Column("within its class", "effect", in_class, "effect minus the mean effect of its class"),
        Column("verdict", "verdict", list(ordered["verdict"])),
        Column("q", "q", list(ordered["q"]), "smallest false discovery rate at which the verdict holds"),
        Column(over, "number", list(agreeing), f"of {count}, in which the effect has this sign"),
        Column(f"score by {best}", "number", scores, "mean over test instances"),
        Column("target", "text", list(ordered["target"])),
        Column("model says", "text", [d.prediction if d else None for d in displays]),
        *instance_columns(displays),
    ]
    return table(columns, "measured_rows.csv", shown=15)


def run_context(run: Results, rows: pd.DataFrame) -> dict[str, Any]:
    """Return what the template says about one run.

    Args:
        rows: of :func:`~fimo.reporting.measured_rows.measured_rows`.
    """
    metric = run.metrics[0]
    ranking = at_last_point(run, metric)
    further = run.config.get("further_training")
    return {
        "run": run,
        "metric": metric,
        "ranking": ranking.to_dict("records"),
        "best": ranking.iloc[0].to_dict(),
        "answer": study_answer(run, rows),
        "follows": follows(run, rows),
        "noun": run.noun,
        "same": same_scores(run),
        "above": above_ceiling(run),
        "same_seeds": same_seeds([run]),
        "predicting": trusted_methods(run),
        "trust": trust_rows(run),
        "others": len(method_order(run)) - len(highlighted([run])),
        "points": len(run.sensitivity.step),
        "further": dict.fromkeys(["optimizer", "lr", "batch_size", "leave_out"])
        | (dict(further) if isinstance(further, Mapping) else {}),
        "dataset": dict.fromkeys(["name", "description", "train", "test"]) | dict(run.dataset),
        "model": dict.fromkeys(["test_accuracy", "baseline_loss"]) | dict(run.final_model),
        "left_out": len(run.sensitivity.left_out),
        "tests": len(run.sensitivity.test),
        "seeds": run.seeds,
        "steps": int(run.sensitivity.step[-1]),
        "epochs": int(run.sensitivity.epoch[-1]),
        "ceiling": float(ranking["ceiling"].iloc[0]),
        "ceiling_lower": float(ranking["ceiling_lower"].iloc[0]),
        "config": flat(run.config),
        "cost": run.cost.to_dict("records"),
        "curves": {figure_of_task(task): curve.caption for task, curve in drawn_tasks([run]).items()},
        "total_seconds": float(run.cost["seconds"].sum()),
        "facts": final_model_facts(run.final_model),
    }


def trust_rows(run: Results) -> list[dict[str, Any]]:
    """Return, for each method that predicts loss changes, its size, its errors, where it fails."""
    slopes = {} if run.slopes is None else dict(iter(run.slopes.groupby("method")))
    rows = []
    for method in trusted_methods(run):
        slope = slopes[method].sort_values("step")["slope"].tolist()
        rows.append(
            {
                "name": method,
                "slope": (slope[0], slope[-1]),
                "coverage": coverage(run, method),
                "without_bars": run.scores[method].withheld,
                "departures": departures(run, method),
            }
        )
    return rows


def methods_table(run: Results) -> dict[str, Any]:
    """Return the table of methods, best first: agreement with each metric, slope, cost, what each is."""
    order = method_order(run)
    last = {m: at_last_point(run, m).set_index("method").loc[order] for m in run.metrics}
    slope: dict[str, float] = {}
    if run.slopes is not None and len(run.slopes):
        final = run.slopes[run.slopes["step"] == run.slopes["step"].max()]
        slope = dict(zip(final["method"], final["slope"], strict=True))
    intervals: dict[str, str] = {}
    if (bounds := run.bootstrap) is not None and len(bounds):
        final = bounds[(bounds["step"] == bounds["step"].max()) & (bounds["metric"] == run.metrics[0])]
        ends = zip(final["low"], final["high"], strict=True)
        intervals = {
            m: f"{decimals(low, 2)} to {decimals(high, 2)}"
            for m, (low, high) in zip(final["method"], ends, strict=True)
            if low == low
        }
    seconds = dict(zip(run.cost["stage"], run.cost["seconds"], strict=True))
    access = dict(zip(run.evaluation["method"], run.evaluation["access"], strict=True))
    palette = Palette([run]).color
    names = [{"text": label(m, [run]), "color": palette[m]} for m in order]
    columns = [
        Column("method", "method", names),
        *(
            Column(m, "agreement", [list(pair) for pair in zip(t["mean"], t["sem"], strict=True)])
            for m, t in last.items()
        ),
        Column("interval", "text", [intervals.get(m) for m in order], "of the first measure, 95 %"),
        Column("slope", "number", [slope.get(m) for m in order], "of measured on predicted effects"),
        Column("seconds", "number", [seconds.get(m) for m in order]),
        Column("needs", "text", [access[m] for m in order], "the final model only: FiMO"),
        Column("what it is", "text", [run.descriptions.get(m, "") for m in order]),
    ]
    return table(columns, "methods.csv", shown=30)


def final_model_facts(numbers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return rows of the final model's quality: training, test, and what knowing nothing would give."""
    rows = [("training set", "train"), ("test set", "test"), ("always predicting the average", "baseline")]
    return [
        {"name": name, "loss": numbers.get(f"{key}_loss"), "accuracy": numbers.get(f"{key}_accuracy")}
        for name, key in rows
        if numbers.get(f"{key}_loss") is not None or numbers.get(f"{key}_accuracy") is not None
    ]
