"""The report's figures as plotly figures: hover, toggle methods in the legend, runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import pandas as pd
import plotly.graph_objects as go

from fimo.models.measured import Measured
from fimo.reporting.curves import (
    agreement_table,
    cost_table,
    distance_table,
    drawn_tasks,
    figure_of_task,
    last_table,
    loss_table,
    mean_effect_table,
    mislabelled_table,
    retraining_table,
    seeds_table,
    task_table,
)
from fimo.reporting.findings import all_methods, compared, highlighted, label
from fimo.reporting.panels import EPOCHS, Palette, axes, band, grid, lines, panels, thinned
from fimo.reporting.results import Results
from fimo.reporting.style import CEILING, DASHES, OTHER, PALETTE, log_ticks
from fimo.reporting.task_curves import Curve
from fimo.reporting.trust import share_of_ceiling_table, trusted_methods

Table = pd.DataFrame


def all_figures(runs: Sequence[Results]) -> dict[str, dict[str, go.Figure]]:
    """Return every figure that the runs have data for, by name, then by metric (``""``: none)."""
    metrics = [m for m in runs[0].metrics if all(m in run.metrics for run in runs)]
    by_metric = {
        "agreement": agreement_figure,
        "by_method": by_method_figure,
        "last": last_figure,
        "seeds": seeds_figure,
        "cost": cost_figure,
        "mean": mean_effect_figure,
        "retraining": retraining_figure,
        "trust": trust_figure,
    }
    made = {name: {m: make(runs, m) for m in metrics} for name, make in by_metric.items()}
    made["distance"] = {"": distance_figure(runs)}
    made["loss"] = {"": loss_figure(runs)}
    for task, curve in drawn_tasks(runs).items():
        made[figure_of_task(task)] = {"": task_figure(runs, task, curve)}
    made["mislabelled"] = {"": mislabelled_figure(runs)}
    return {name: by for name, by in made.items() if any(figure.data for figure in by.values())}


def agreement_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement against the amount of further training, with SEM bands and the noise ceiling."""
    return lines(runs, lambda run: agreement_table(run, metric), "epoch", EPOCHS, metric)


def by_method_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """The same, a panel for each method, in which runs are laid over one another with their ceilings."""
    methods = compared(runs)
    if not methods:
        return go.Figure()
    figure, cells = grid(methods, rows=math.ceil(len(methods) / 4))
    named: set[str] = set()
    for run, color in zip(runs, _run_colors(runs), strict=True):
        table = agreement_table(run, metric)
        for method, cell in zip(methods, cells, strict=True):
            rows = thinned(table[table["method"] == method])
            if rows.empty:
                continue
            band(figure, rows, "epoch", color, run.name, cell=cell, showlegend=run.name not in named)
            named.add(run.name)
            if len(rows) > 1 and rows["ceiling"].notna().any():
                figure.add_scatter(
                    x=rows["epoch"],
                    y=rows["ceiling"],
                    mode="lines",
                    line={"color": color, "dash": "dash", "width": 1},
                    name=f"ceiling, {run.name}",
                    legendgroup=run.name,
                    showlegend=False,
                    hovertemplate="%{y:.3f}<extra>noise ceiling, " + run.name + "</extra>",
                    **cell,
                )
    axes(figure, EPOCHS, metric)
    return figure


def last_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement at the last evaluation point: a row for each method, a colour for each run."""
    figure = go.Figure()
    if len(runs) == 1:
        return figure  # the table of methods says it
    order = all_methods(runs)[::-1]  # plotly's first category is at the bottom
    for run, color in zip(runs, _run_colors(runs), strict=True):
        table = last_table(run, metric)
        figure.add_scatter(
            x=table["mean"],
            y=table["method"],
            error_x={"type": "data", "array": table["sem"], "thickness": 1.5, "width": 0},
            mode="markers",
            marker={"size": 9, "color": color, "symbol": runs.index(run)},
            name=run.name,
            legendgroup=run.name,
            hovertemplate="%{y}: %{x:.3f}<extra>" + run.name + "</extra>",
        )
        if table["ceiling"].notna().any():
            figure.add_scatter(
                x=[table["ceiling"].iloc[0]] * 2,
                y=[order[0], order[-1]],
                mode="lines",
                line={"color": color, "dash": "dash", "width": 1.5},
                name=f"ceiling, {run.name}",
                legendgroup=run.name,
                hovertemplate="%{x:.3f}<extra>noise ceiling, " + run.name + "</extra>",
            )
    axes(figure, metric, "")
    figure.update_yaxes(categoryorder="array", categoryarray=order, zeroline=False, dtick=1)
    figure.update_xaxes(zeroline=True)
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, meta={"rows": len(order)}
    )
    return figure


def trust_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement as a share of the noise ceiling, for methods that follow further training."""

    def shares(run: Results) -> Table:
        table = share_of_ceiling_table(run, metric)
        return table[table["method"].isin(trusted_methods(run))]

    figure = lines(runs, shares, "epoch", EPOCHS, f"{metric} / ceiling")
    if figure.data:
        figure.add_hline(y=0.95, line={"color": CEILING, "dash": "dot", "width": 1})
    return figure


def seeds_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement at the last evaluation point against the number of seeds averaged."""
    figure = lines(runs, lambda run: seeds_table(run, metric), "seeds", "seeds averaged", metric)
    counts = sorted({int(k) for run in runs for k in run.evaluation["seeds"].unique()})
    figure.update_xaxes(type="log", tickvals=counts, ticktext=[str(k) for k in counts])
    return figure


def cost_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement at the last evaluation point against what a method costs."""
    figure = go.Figure()
    palette, first = Palette(runs).color, highlighted(runs)
    for position, run in enumerate(runs):
        table = cost_table(run, metric)
        for row, place in zip(table.to_dict("records"), label_places(table, first), strict=True):
            method = row["method"]
            figure.add_scatter(
                x=[row["seconds"]],
                y=[row["mean"]],
                error_y={"type": "data", "array": [row["sem"]], "thickness": 1.5, "width": 0},
                mode="markers+text",
                marker={"size": 12, "color": palette[method], "symbol": position},
                text=[method] if place and position == 0 else None,  # one for all runs: colours tell the rest
                textposition=place or "top center",
                cliponaxis=False,
                name=_label(method, run, runs),
                legendgroup=method,
                customdata=[[row["gradient_evaluations"], row["peak_memory_mb"]]],
                hovertemplate="%{y:.3f}, %{x:.3g} s<br>%{customdata[0]:,.0f} gradient evaluations<br>"
                "%{customdata[1]:,.0f} MB at peak<extra>" + _label(method, run, runs) + "</extra>",
            )
    axes(figure, "seconds", metric)
    seconds = [float(trace.x[0]) for trace in figure.data] or [1.0]
    ends = [math.log10(min(seconds)) - 0.4, math.log10(max(seconds)) + 0.4]
    figure.update_xaxes(type="log", range=ends)
    if max(seconds) / min(seconds) < 100:  # plotly's own labels lack their decades: 0.1, 2, 5, 1
        ticks = log_ticks(10 ** ends[0], 10 ** ends[1])
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    else:
        figure.update_xaxes(dtick=1)
    figure.update_layout(showlegend=False)
    return figure


def label_places(table: Table, first: Collection[str]) -> list[str | None]:
    """Return where each point's label goes so that none covers another's; None where there is no room.

    Args:
        first: methods that are given room before the others.
    """
    x = table["seconds"].map(math.log10)
    width = max(float(x.max() - x.min()), 0.8)
    height = max(float(table["mean"].max() - table["mean"].min()), 0.2)
    points = list(zip(table["method"], x, table["mean"], strict=True))
    taken: list[tuple[float, float, str]] = []
    places: dict[str, str | None] = {}
    for method, here, value in sorted(points, key=lambda point: point[0] not in first):
        near = [p for x0, y0, p in taken if abs(here - x0) < 0.17 * width and abs(value - y0) < 0.1 * height]
        free = [p for p in ("top center", "bottom center", "middle right", "middle left") if p not in near]
        places[method] = free[0] if free and (method in first or len(near) < 2) else None
        if (place := places[method]) is not None:
            taken.append((here, value, place))
    return [places[method] for method in table["method"]]


def mean_effect_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement with (solid) and without (dotted) subtracting the mean over left-out instances."""
    figure, cells = panels(runs)
    palette = Palette(runs)
    for run, cell in zip(runs, cells, strict=True):
        table = mean_effect_table(run, metric)
        for (method, subtracted), rows in table.groupby(["method", "subtract_mean"], sort=False):
            rows, color = thinned(rows), palette.color[str(method)]
            said = "mean subtracted" if subtracted else "raw change"
            figure.add_scatter(
                x=rows["epoch"],
                y=rows["mean"],
                mode="lines",
                name=method,
                legendgroup=method,
                legendrank=palette.rank[str(method)],
                showlegend=bool(subtracted) and cell.get("col", 1) == 1,
                line={
                    "color": color,
                    "dash": "solid" if subtracted else "dot",
                    "width": 1 if color == OTHER else 2,
                },
                hovertemplate=f"%{{y:.3f}}<extra>{method}, {said}</extra>",
                **cell,
            )
    axes(figure, EPOCHS, metric)
    return figure


def distance_figure(runs: Sequence[Results]) -> go.Figure:
    """How far further training moved from the final model, as a share of its norm."""
    figure = _by_run(runs, distance_table, "distance / final norm")
    figure.update_yaxes(rangemode="tozero")
    return figure


def loss_figure(runs: Sequence[Results]) -> go.Figure:
    """Test loss (or what else was measured) of the full runs, beside the final model's loss."""
    figure = _by_run(runs, loss_table, ", ".join(dict.fromkeys(run.measured.mean for run in runs)))
    for run in runs:
        whole = len(run.sensitivity.test) == run.dataset.get("test")  # or the two are of different instances
        loss = run.final_model.get("test_loss")
        measured = run.sensitivity.full_losses is not None and run.measured == Measured()
        if measured and whole and loss:
            figure.add_hline(y=loss, line={"color": CEILING, "dash": "dash", "width": 1.5})
    return figure


def _by_run(runs: Sequence[Results], make: Callable[[Results], Table | None], y_title: str) -> go.Figure:
    figure = go.Figure()
    for position, (run, color) in enumerate(zip(runs, _run_colors(runs), strict=True)):
        if (table := make(run)) is not None:
            band(figure, thinned(table), "epoch", color, run.name, DASHES[position % len(DASHES)])
    axes(figure, EPOCHS, y_title)
    figure.update_layout(showlegend=len(runs) > 1)
    return figure


def _run_colors(runs: Sequence[Results]) -> list[str]:
    return [PALETTE[position % len(PALETTE)] for position in range(len(runs))]


def task_figure(runs: Sequence[Results], task: str, curve: Curve) -> go.Figure:
    """A task's table, one line for each method."""
    kept = [run for run in runs if task_table(run, task) is not None]
    figure = lines(kept, lambda run: _certain(task_table(run, task)), curve.x, curve.x_title, curve.y_title)
    figure.update_yaxes(exponentformat="power")
    return figure


def mislabelled_figure(runs: Sequence[Results]) -> go.Figure:
    """Average precision of finding flipped labels, beside chance."""
    figure = go.Figure()
    palette = Palette(runs).color
    for run in runs:
        if (table := mislabelled_table(run)) is None:
            continue
        figure.add_bar(
            x=table["method"],
            y=table["mean"],
            error_y={"type": "data", "array": table["sem"], "thickness": 1.5, "width": 0},
            marker={"color": [palette.get(m, CEILING) for m in table["method"]]},
            name=run.name,
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        )
        figure.add_hline(y=table["chance"].iloc[0], line={"color": CEILING, "dash": "dash", "width": 1.5})
    axes(figure, "", "average precision")
    figure.update_layout(showlegend=False)
    return figure


def retraining_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement with retraining from scratch leaving one out: of further training, and of the methods."""
    kept = [run for run in runs if run.retraining is not None]
    if not kept:
        return go.Figure()
    figure, cells = panels(kept)
    palette = Palette(kept)
    palette.color["further training"] = CEILING
    palette.rank["further training"] = 1
    for run, cell in zip(kept, cells, strict=True):
        for method, rows in _certain(retraining_table(run, metric)).groupby("method", sort=False):
            palette.add(figure, cell, thinned(rows), "epoch", str(method))
    axes(figure, EPOCHS, f"{metric} with retraining")
    return figure


def _certain(table: Table | None) -> Table:
    assert table is not None
    return table


def _label(method: str, run: Results, runs: Sequence[Results]) -> str:
    name = label(method, [run])
    return name if len(runs) == 1 else f"{name} · {run.name}"
