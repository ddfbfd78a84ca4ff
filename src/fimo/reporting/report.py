"""The report: one HTML file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline

from fimo.reporting.curves import drawn_tasks, figure_of_task
from fimo.reporting.explorer import explorer_data
from fimo.reporting.findings import (
    ABSENT,
    MINUS,
    Unit,
    above_ceiling,
    all_warnings,
    at_last_point,
    duration,
    highlighted,
    influences,
    mean_test_loss,
    method_order,
    number,
    same_scores,
    same_seeds,
)
from fimo.reporting.flat import flat
from fimo.reporting.instance_table import InstanceDisplay
from fimo.reporting.interactive import all_figures
from fimo.reporting.naming import differences
from fimo.reporting.panels import MOST_POINTS, Palette
from fimo.reporting.results import Results, plain
from fimo.reporting.trust import coverage, departures, trusted_methods
from fimo.store.files import written_aside


def write_report(results: Results | Sequence[Results], path: str | Path) -> Path:
    """Write one self-contained page about one run, or several side by side with their curves overlaid.

    The page holds plotly.js once and every number it shows; it asks nothing of a network.

    Returns:
        its path.
    """
    runs = [results] if isinstance(results, Results) else list(results)
    page = files("fimo.reporting") / "page"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (page / name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # columns keep their order
    environment.filters |= {"number": number, "duration": duration, "decimals": decimals}
    comparison = figures(runs) if len(runs) > 1 else None
    html = environment.get_template("report.html").render(
        runs=[run_context(run) for run in runs],
        comparison=comparison,
        differing=differences(runs),
        most_points=MOST_POINTS,
        data={
            "runs": [{"figures": figures([run]), "explorer": plain(explorer_data(run))} for run in runs],
            "comparison": comparison,
        },
        plotly=plotly.offline.get_plotlyjs(),
        style=(page / "report.css").read_text("utf-8"),
        script=(page / "report.js").read_text("utf-8"),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(html, encoding="utf-8")
    path.chmod(0o644)
    return path


def figures(runs: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """Return figures as plotly's JSON by name, then by metric (``""`` where there is none)."""
    return {
        name: {metric: json.loads(figure.to_json()) for metric, figure in by_metric.items()}
        for name, by_metric in all_figures(runs).items()
    }


def run_context(run: Results) -> dict[str, Any]:
    """Return what the template says about one run."""
    helpful, harmful = influences(run)
    metric = run.metrics[0]
    ranking = at_last_point(run, metric)
    further = run.config.get("further_training")
    return {
        "run": run,
        "metric": metric,
        "ranking": ranking.to_dict("records"),
        "best": ranking.iloc[0].to_dict(),
        "helpful": [(row, run.show("train", row.index)) for row in helpful],
        "harmful": [(row, run.show("train", row.index)) for row in harmful],
        "noun": noun(run),
        "same": same_scores(run),
        "above": above_ceiling(run),
        "same_seeds": same_seeds([run]),
        "predicting": trusted_methods(run),
        "trust": trust_rows(run),
        "columns": columns([run.show("train", row.index) for row in [*helpful, *harmful]]),
        "unit": Unit.of([row.effect for row in [*helpful, *harmful]]),
        "test_loss": mean_test_loss(run),
        "warnings": all_warnings(run),
        "methods": method_rows(run),
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


def method_rows(run: Results) -> list[dict[str, Any]]:
    """Return one row per method: what it is, how well it agrees with each metric, its slope and cost."""
    last = {m: at_last_point(run, m).set_index("method") for m in run.metrics}
    slope: dict[str, float] = {}
    if run.slopes is not None and len(run.slopes):
        final = run.slopes[run.slopes["step"] == run.slopes["step"].max()]
        slope = dict(zip(final["method"], final["slope"], strict=True))
    seconds = dict(zip(run.cost["stage"], run.cost["seconds"], strict=True))
    reused = dict(zip(run.cost["stage"], run.cost["reused"], strict=True))
    intervals: dict[str, tuple[float, float]] = {}
    if (bounds := run.bootstrap) is not None and len(bounds):
        final = bounds[(bounds["step"] == bounds["step"].max()) & (bounds["metric"] == run.metrics[0])]
        ends = zip(final["low"], final["high"], strict=True)
        intervals = {m: e for m, e in zip(final["method"], ends, strict=True) if e[0] == e[0]}
    palette = Palette([run]).color
    access = dict(zip(run.evaluation["method"], run.evaluation["access"], strict=True))
    return [
        {
            "name": method,
            "color": palette[method],
            "access": access[method],
            "description": run.descriptions.get(method, ""),
            "agreement": {m: (last[m].loc[method, "mean"], last[m].loc[method, "sem"]) for m in run.metrics},
            "interval": intervals.get(method),
            "slope": slope.get(method),
            "seconds": seconds.get(method),
            "reused": reused.get(method, 0.0),
        }
        for method in method_order(run)
    ]


def noun(run: Results) -> str:
    """Return what an instance of this data set is called."""
    displays = [d for instances in run.shown.values() for d in instances.values()]
    for kind, name in (("image", "picture"), ("text", "text")):
        if any(getattr(display, kind) for display in displays):
            return name
    return "row"


def decimals(value: float | None, digits: int = 3) -> str:
    """Return an agreement with fixed decimals, so that a column lines up."""
    return ABSENT if value is None or value != value else f"{value:.{digits}f}".replace("-", MINUS)


def columns(displays: Sequence[InstanceDisplay | None]) -> list[str]:
    """Return the columns of tabular displays, in their order."""
    return list(
        dict.fromkeys(name for display in displays if display and display.row for name in display.row)
    )


def final_model_facts(numbers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return rows of the final model's quality: training, test, and what knowing nothing would give."""
    rows = [("training set", "train"), ("test set", "test"), ("always predicting the average", "baseline")]
    return [
        {"name": name, "loss": numbers.get(f"{key}_loss"), "accuracy": numbers.get(f"{key}_accuracy")}
        for name, key in rows
        if numbers.get(f"{key}_loss") is not None or numbers.get(f"{key}_accuracy") is not None
    ]
