"""The page of several final models: one HTML file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from fimo.reporting.curves import drawn_tasks, figure_of_task
from fimo.reporting.findings import at_last_point, label
from fimo.reporting.flat import flat
from fimo.reporting.html_page import decimals, write_page
from fimo.reporting.interactive import all_figures
from fimo.reporting.measured_rows import measured_rows
from fimo.reporting.models_answer import (
    PARTS,
    SAME,
    between_models,
    given,
    models_answer,
    parts,
    probabilities,
    ranked,
)
from fimo.reporting.models_run import FOLDER, ModelsRun
from fimo.reporting.panels import Palette, axes
from fimo.reporting.report import rows_table
from fimo.reporting.style import PALETTE
from fimo.reporting.tables import Column, table

FACTS = {
    "train_loss": "training loss", "test_loss": "test loss", "baseline_loss": "loss of the average",
    "train_accuracy": "training accuracy", "test_accuracy": "test accuracy",
}  # fmt: skip

MOST_METHODS = 20
"""Methods that a matrix of pairs shows, the best ones."""


def write_models_report(run: ModelsRun, path: str | Path) -> Path:
    """Write one self-contained page about several final models; it asks nothing of a network.

    Returns:
        its path.
    """
    combined, rows = run.combined, measured_rows(run.combined)
    page = {
        "figures": figures(run),
        "rows": rows_table(combined, rows, "final models"),
        "methods": methods_table(run),
    }
    known = [name for name in FACTS if all(name in facts for facts in run.models.values())]
    return write_page(
        "models.html",
        Path(path),
        {"runs": [page]},
        ["figures.js"],
        title=f"fimo: {combined.name}",
        answer=models_answer(run, rows),
        run=combined,
        noun=combined.noun,
        count=len(run.models),
        given=bool(given(run)),
        seeds=run.seeds,
        tests=len(combined.sensitivity.test),
        epochs=int(combined.sensitivity.epoch[-1]),
        curves={figure_of_task(task): curve.caption for task, curve in drawn_tasks([combined]).items()},
        facts=[FACTS[name] for name in known],
        models=[model_line(run, name, known) for name in run.models],
        cost=combined.cost.to_dict("records"),
        config=flat(combined.config),
    )


def figures(run: ModelsRun) -> dict[str, dict[str, Any]]:
    """Return figures as plotly's JSON by name, then by metric (``""`` where there is none)."""
    made = all_figures([run.combined]) | models_figures(run)
    return {
        name: {metric: json.loads(figure.to_json()) for metric, figure in by_metric.items()}
        for name, by_metric in made.items()
    }


def models_figures(run: ModelsRun) -> dict[str, dict[str, go.Figure]]:
    """Return the figures that several final models have beside those of a run, by name and metric."""
    draw: dict[str, Callable[[ModelsRun, str], go.Figure]] = {
        "each": each_figure,
        "beats": beats_figure,
        "parts": parts_figure,
    }
    made = {name: {m: make(run, m) for m in run.combined.metrics} for name, make in draw.items()}
    return {name: by for name, by in made.items() if any(figure.data for figure in by.values())}


def methods_of(run: ModelsRun, metric: str) -> list[str]:
    """Return methods by their mean agreement after all further training, best first."""
    return list(at_last_point(run.combined, metric)["method"])


def each_figure(run: ModelsRun, metric: str) -> go.Figure:
    """Agreement of each final model after all further training: a row for each method."""
    figure, palette = go.Figure(), Palette([run.combined]).color
    last = at_last_point(run.combined, metric).set_index("method")
    for method in methods_of(run, metric):
        each = run.each[(run.each["metric"] == metric) & (run.each["method"] == method)]
        color = palette[method]
        figure.add_scatter(
            x=each["mean"],
            y=[method] * len(each),
            mode="markers",
            marker={"size": 7, "color": color, "opacity": 0.55},
            text=[f"final model {name}" for name in each["final_model"]],
            hovertemplate="%{text}: %{x:.3f}<extra>" + method + "</extra>",
        )
        figure.add_scatter(
            x=[last.loc[method, "mean"]],
            y=[method],
            error_x={"type": "data", "array": [last.loc[method, "sem"]], "thickness": 2, "width": 0},
            mode="markers",
            marker={"size": 14, "color": color, "symbol": "line-ns-open", "line": {"width": 3}},
            hovertemplate="%{x:.3f}<extra>" + f"{method}, mean</extra>",
        )
    axes(figure, metric, "")
    figure.update_yaxes(autorange="reversed", zeroline=False, dtick=1)
    figure.update_xaxes(zeroline=True)
    figure.update_layout(showlegend=False, meta={"rows": len(last)})
    return figure


def beats_figure(run: ModelsRun, metric: str) -> go.Figure:
    """Probability that a row's method beats a column's."""
    figure = go.Figure()
    names = methods_of(run, metric)[:MOST_METHODS]
    found = probabilities(run, metric)
    if not found:
        return figure
    values = [[found.get((a, b)) for b in names] for a in names]
    figure.add_heatmap(
        x=names,
        y=names,
        z=values,
        zmin=0,
        zmax=1,
        colorscale=[[0, PALETTE[1]], [0.5, "#f4f4f4"], [1, PALETTE[0]]],
        text=[["" if v is None or v != v else f"{100 * v:.0f}" for v in row] for row in values],
        texttemplate="%{text}",
        colorbar={"title": {"text": "probability"}, "thickness": 12},
        xgap=1,
        ygap=1,
        hovertemplate="%{y} beats %{x}: %{z:.3f}<extra></extra>",
    )
    axes(figure, "", "")
    figure.update_yaxes(autorange="reversed", zeroline=False, dtick=1)
    figure.update_xaxes(dtick=1, tickangle=-45)
    figure.update_layout(meta={"rows": len(names) + 3})
    return figure


def parts_figure(run: ModelsRun, metric: str) -> go.Figure:
    """The variance of each method's mean agreement, by what it comes from."""
    figure, shown = go.Figure(), parts(run, metric)
    for position, (column, name) in enumerate(PARTS.items()):
        if len(shown) and shown[column].notna().any():
            figure.add_bar(
                y=list(shown.index),
                x=shown[column].fillna(0.0),
                orientation="h",
                name=name,
                marker={"color": PALETTE[position]},
                hovertemplate="%{x:.2g}<extra>%{y}, " + name + "</extra>",
            )
    axes(figure, f"variance of the mean {metric}", "")
    figure.update_yaxes(autorange="reversed", zeroline=False, dtick=1)
    figure.update_xaxes(exponentformat="power")
    figure.update_layout(
        barmode="stack",
        meta={"rows": len(shown) + 1},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    return figure


def methods_table(run: ModelsRun) -> dict[str, Any]:
    """Return the table of methods, best first: agreement, its range and how surely it beats the next."""
    combined, first = run.combined, ranked(run)
    order = list(first["method"])
    last = {m: at_last_point(combined, m).set_index("method").loc[order] for m in combined.metrics}
    spread = between_models(parts(run, combined.metrics[0]))
    seconds = dict(zip(combined.cost["stage"], combined.cost["seconds"], strict=True))
    access = dict(zip(combined.evaluation["method"], combined.evaluation["access"], strict=True))
    palette = Palette([combined]).color
    names = [{"text": label(m, [combined]), "color": palette[m]} for m in order]
    ends = [
        f"{decimals(a, 2)} to {decimals(b, 2)}"
        for a, b in zip(first["lowest"], first["highest"], strict=True)
    ]
    columns = [
        Column("method", "method", names),
        *(
            Column(m, "agreement", [list(pair) for pair in zip(t["mean"], t["sem"], strict=True)])
            for m, t in last.items()
        ),
        Column("final models", "text", ends, "lowest and highest agreement of one, by the first measure"),
        Column(
            "between them", "number", [_known(spread.get(m)) for m in order],
            "standard deviation between final models on these test instances, without the noise of seeds",
        ),
        Column("beats the next", "text", [_percent(p) for p in first["beats_next"]], "on average"),
        Column("on another", "text", [_percent(p) for p in first["another"]], "on one more final model"),
        Column("seconds", "number", [seconds.get(m) for m in order], "of all final models together"),
        Column("needs", "text", [access[m] for m in order], "the final model only: FiMO"),
        Column("what it is", "text", [combined.descriptions.get(m, "") for m in order]),
    ]  # fmt: skip
    return table(columns, "methods.csv", shown=30)


def model_line(run: ModelsRun, name: int, facts: list[str]) -> dict[str, Any]:
    """Return what the table of final models says of one."""
    each = run.each[(run.each["final_model"] == name) & (run.each["metric"] == run.combined.metrics[0])]
    best: pd.Series = each.sort_values("mean", ascending=False, na_position="last").iloc[0]
    return {
        "name": name,
        "folder": f"{FOLDER}/{name}",
        "facts": [run.models[name][fact] for fact in facts],
        "ceiling": float(best["ceiling"]),
        "best": best["method"],
        "mean": float(best["mean"]),
    }


def _percent(probability: float | None) -> str | None:
    if probability is None or probability != probability:
        return None
    return "the same" if probability == SAME else f"{probability:.0%}"


def _known(value: float | None) -> float | None:
    return None if value is None or value != value else float(value)
