"""The report's figures as plotly figures: hover, toggle methods in the legend, overlay runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from fimo.evaluation.removal import CHANCE
from fimo.reporting.curves import (
    agreement_table,
    cost_table,
    datamodeling_table,
    distance_table,
    loss_table,
    mean_effect_table,
    mislabelled_table,
    removal_table,
    retraining_table,
    seeds_table,
)
from fimo.reporting.findings import method_order, same_scores
from fimo.reporting.results import Results
from fimo.reporting.style import CEILING, DASHES, colors, translucent
from fimo.reporting.trust import share_of_ceiling_table, trusted_methods

Table = pd.DataFrame
EPOCHS = "epochs of further training"


def all_figures(runs: Sequence[Results]) -> dict[str, dict[str, go.Figure]]:
    """Return every figure that the runs have data for, by name, then by metric (``""``: none)."""
    metrics = [m for m in runs[0].metrics if all(m in run.metrics for run in runs)]
    by_metric = {
        "agreement": agreement_figure,
        "seeds": seeds_figure,
        "cost": cost_figure,
        "mean": mean_effect_figure,
        "retraining": retraining_figure,
        "trust": trust_figure,
    }
    made = {name: {m: make(runs, m) for m in metrics} for name, make in by_metric.items()}
    made["distance"] = {"": distance_figure(runs)}
    made["loss"] = {"": loss_figure(runs)}
    made["datamodeling"] = {"": datamodeling_figure(runs)}
    made["removal"] = {"": removal_figure(runs)}
    made["mislabelled"] = {"": mislabelled_figure(runs)}
    return {name: by for name, by in made.items() if any(figure.data for figure in by.values())}


def agreement_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement against the amount of further training, with SEM bands and the noise ceiling."""
    return _lines(runs, lambda run: agreement_table(run, metric), "epoch", EPOCHS, metric)


def trust_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement as a share of the noise ceiling, for methods that follow further training."""

    def shares(run: Results) -> Table:
        table = share_of_ceiling_table(run, metric)
        return table[table["method"].isin(trusted_methods(run))]

    figure = _lines(runs, shares, "epoch", EPOCHS, f"{metric} / ceiling")
    if figure.data:
        figure.add_hline(y=0.95, line={"color": CEILING, "dash": "dot", "width": 1})
    return figure


def seeds_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement at the last evaluation point against the number of seeds averaged."""
    figure = _lines(runs, lambda run: seeds_table(run, metric), "seeds", "seeds averaged", metric)
    counts = sorted({int(k) for run in runs for k in run.evaluation["seeds"].unique()})
    figure.update_xaxes(type="log", tickvals=counts, ticktext=[str(k) for k in counts])
    return figure


def cost_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement at the last evaluation point against what a method costs."""
    figure = go.Figure()
    palette = colors(_methods(runs))
    for position, run in enumerate(runs):
        table = cost_table(run, metric)
        for row, place in zip(table.to_dict("records"), label_places(table), strict=True):
            method = row["method"]
            figure.add_scatter(
                x=[row["seconds"]],
                y=[row["mean"]],
                error_y={"type": "data", "array": [row["sem"]], "thickness": 1.5, "width": 0},
                mode="markers+text",
                marker={"size": 12, "color": palette[method], "symbol": position},
                text=[method] if position == 0 else None,  # one label for all runs: colours tell the rest
                textposition=place,
                cliponaxis=False,
                name=_label(method, run, runs),
                legendgroup=method,
                customdata=[[row["gradient_evaluations"], row["peak_memory_mb"]]],
                hovertemplate="%{y:.3f}, %{x:.3g} s<br>%{customdata[0]:,.0f} gradient evaluations<br>"
                "%{customdata[1]:,.0f} MB at peak<extra>" + _label(method, run, runs) + "</extra>",
            )
    _axes(figure, "seconds (one-off precomputation and scores)", metric)
    seconds = [float(trace.x[0]) for trace in figure.data] or [1.0]
    few = math.log10(max(seconds) / min(seconds)) < 2
    ends = [math.log10(min(seconds)) - 0.4, math.log10(max(seconds)) + 0.4]
    figure.update_xaxes(type="log", dtick="D2" if few else 1, range=ends)
    figure.update_layout(showlegend=False)
    return figure


def label_places(table: Table) -> list[str]:
    """Return where each point's label goes: below or beside it where one above would cover another's."""
    x = table["seconds"].map(math.log10)
    width, height = (
        max(float(x.max() - x.min()), 0.8),
        max(float(table["mean"].max() - table["mean"].min()), 0.2),
    )
    taken: list[tuple[float, float, str]] = []
    for here, value in zip(x, table["mean"], strict=True):
        near = {
            place
            for x0, y0, place in taken
            if abs(here - x0) < 0.17 * width and abs(value - y0) < 0.1 * height
        }
        free = [p for p in ("top center", "bottom center", "middle right", "middle left") if p not in near]
        taken.append((here, value, free[0] if free else "top center"))
    return [place for _, _, place in taken]


def mean_effect_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement with (solid) and without (dotted) subtracting the mean over left-out instances."""
    figure = go.Figure()
    palette = colors(_methods(runs))
    for run in runs:
        table = mean_effect_table(run, metric)
        for (method, subtracted), rows in table.groupby(["method", "subtract_mean"], sort=False):
            figure.add_scatter(
                x=rows["epoch"],
                y=rows["mean"],
                mode="lines",
                name=_label(method, run, runs),
                legendgroup=method,
                showlegend=bool(subtracted),
                line={"color": palette[str(method)], "dash": "solid" if subtracted else "dot", "width": 2},
                hovertemplate="%{y:.3f}<extra>"
                + _label(method, run, runs)
                + (", mean subtracted" if subtracted else ", raw change")
                + "</extra>",
            )
    _axes(figure, EPOCHS, metric)
    return figure


def distance_figure(runs: Sequence[Results]) -> go.Figure:
    """How far further training moved from the final model, as a share of its norm."""
    figure = _by_run(runs, distance_table, "distance / norm of the final model")
    figure.update_yaxes(rangemode="tozero")
    return figure


def loss_figure(runs: Sequence[Results]) -> go.Figure:
    """Test loss of the full runs, beside the final model's."""
    figure = _by_run(runs, loss_table, "mean test loss")
    for run in runs:
        whole = len(run.sensitivity.test) == run.dataset.get("test")  # or the two are of different instances
        loss = run.final_model.get("test_loss")
        if run.sensitivity.full_losses is not None and whole and loss:
            figure.add_hline(y=loss, line={"color": CEILING, "dash": "dash", "width": 1.5})
    return figure


def _by_run(runs: Sequence[Results], make: Callable[[Results], Table | None], y_title: str) -> go.Figure:
    figure = go.Figure()
    palette = list(colors([str(i) for i in range(len(runs))]).values())
    for position, (run, color) in enumerate(zip(runs, palette, strict=True)):
        if (table := make(run)) is not None:
            _band(figure, table, "epoch", color, run.name, DASHES[position % len(DASHES)], run.name)
    _axes(figure, EPOCHS, y_title)
    figure.update_layout(showlegend=len(runs) > 1)
    return figure


def datamodeling_figure(runs: Sequence[Results]) -> go.Figure:
    """Linear datamodeling score against the amount of further training."""
    kept = [run for run in runs if datamodeling_table(run) is not None]
    if not kept:
        return go.Figure()
    return _lines(kept, lambda run: _certain(datamodeling_table(run)), "epoch", EPOCHS, "LDS (spearman)")


def removal_figure(runs: Sequence[Results]) -> go.Figure:
    """Change of the test loss against the number of instances left out together."""
    kept = [run for run in runs if removal_table(run) is not None]
    if not kept:
        return go.Figure()

    def table(run: Results) -> Table:
        return _certain(removal_table(run)).assign(ceiling=math.nan)

    figure = _lines(kept, table, "removed", "training instances left out", "change of the mean test loss")
    figure.update_yaxes(exponentformat="power")
    return figure


def mislabelled_figure(runs: Sequence[Results]) -> go.Figure:
    """Average precision of finding flipped labels, beside chance."""
    figure = go.Figure()
    palette = colors(_methods(runs))
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
    _axes(figure, "", "average precision")
    figure.update_layout(showlegend=False)
    return figure


def retraining_figure(runs: Sequence[Results], metric: str) -> go.Figure:
    """Agreement with retraining from scratch leaving one out: of further training, and of the methods."""
    figure = go.Figure()
    palette = {"further training": CEILING} | colors(_methods(runs))
    for position, run in enumerate(runs):
        table = retraining_table(run, metric)
        if table is None:
            continue
        dash = DASHES[position % len(DASHES)]
        for method, rows in table.groupby("method", sort=False):
            _band(figure, rows, "epoch", palette[str(method)], _label(method, run, runs), dash, method)
    _axes(figure, EPOCHS, f"{metric} with retraining")
    return figure


def _certain(table: Table | None) -> Table:
    assert table is not None
    return table


def _lines(
    runs: Sequence[Results], make: Callable[[Results], Table], x: str, x_title: str, y_title: str
) -> go.Figure:
    figure = go.Figure()
    tables = [make(run) for run in runs]
    palette = colors([*dict.fromkeys([*_methods(runs), *(m for table in tables for m in table["method"])])])
    for position, (run, table) in enumerate(zip(runs, tables, strict=True)):
        dash = DASHES[position % len(DASHES)]
        covering = {method for group in same_scores(run) for method in group[1:]}
        for method, rows in table.groupby("method", sort=False):
            # dashed over its twin's solid line, so that both colours are seen
            own = "dash" if method in (*covering, CHANCE) and len(runs) == 1 else dash
            _band(figure, rows, x, palette[str(method)], _label(method, run, runs), own, method)
        ceiling = table.drop_duplicates(x)
        if ceiling["ceiling"].notna().any():
            name = _label("noise ceiling", run, runs)
            figure.add_scatter(
                x=ceiling[x],
                y=ceiling["ceiling"],
                mode="lines" if len(ceiling) > 1 else "markers",
                name=name,
                line={"color": CEILING, "dash": dash if len(runs) > 1 else "dash", "width": 2},
                hovertemplate="%{y:.3f}<extra>" + name + "</extra>",
            )
    _axes(figure, x_title, y_title)
    return figure


def _band(figure: go.Figure, rows: Table, x: str, color: str, name: str, dash: str, group: Any) -> None:
    """Add a line with a band of ± SEM that its legend entry toggles too."""
    upper, lower = rows["mean"] + rows["sem"], rows["mean"] - rows["sem"]
    if rows["sem"].notna().any() and len(rows) > 1:
        figure.add_scatter(
            x=[*rows[x], *rows[x][::-1]],
            y=[*upper, *lower[::-1]],
            mode="lines",
            fill="toself",
            fillcolor=translucent(color),
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=group,
            showlegend=False,
        )
    figure.add_scatter(
        x=rows[x],
        y=rows["mean"],
        customdata=rows[["sem"]],
        mode="lines+markers" if len(rows) < 15 else "lines",
        name=name,
        legendgroup=group,
        line={"color": color, "width": 2, "dash": dash},
        marker={"size": 6},
        hovertemplate="%{y:.3f} ± %{customdata[0]:.3f}<extra>" + name + "</extra>",
    )


def _axes(figure: go.Figure, x_title: str, y_title: str) -> None:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 12, "t": 16, "b": 52},
        hovermode="closest",
        legend={"groupclick": "togglegroup", "itemsizing": "constant"},
    )
    if x_title == EPOCHS:
        last = max((float(max(trace.x)) for trace in figure.data if len(trace.x)), default=0.0)
        if last <= 10:
            figure.update_xaxes(dtick=1)
    figure.update_xaxes(title=x_title, zeroline=False, automargin=True)
    figure.update_yaxes(title=y_title, zeroline=True, automargin=True)


def _methods(runs: Sequence[Results]) -> list[str]:
    return list(dict.fromkeys(method for run in runs for method in method_order(run)))


def _label(method: Any, run: Results, runs: Sequence[Results]) -> str:
    return str(method) if len(runs) == 1 else f"{method} · {run.name}"
