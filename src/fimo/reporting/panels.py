"""How interactive figures are drawn: lines with bands, a panel for each run, axes, one legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fimo.reporting.findings import all_methods, highlighted, label, same_scores
from fimo.reporting.results import Results
from fimo.reporting.style import CEILING, OTHER, colors, log_ticks, logarithmic, translucent

Table = pd.DataFrame
Cell = Mapping[str, int]
"""Where a trace goes: plotly's ``row`` and ``col``."""

LOWER = "lower noise ceiling"
EPOCHS = "epochs of further training"
MOST_POINTS = 100
"""Evaluation points drawn of a curve; the tables and W&B hold all."""


def thinned(rows: Table, x: str = "epoch") -> Table:
    """Return at most about :data:`MOST_POINTS` rows, evenly spaced on the axis they are drawn on."""
    if len(rows) <= MOST_POINTS:
        return rows
    at = rows[x].to_numpy(float)
    spaced = np.geomspace if logarithmic(at[0], at[-1]) else np.linspace
    wanted = spaced(at[0], at[-1], MOST_POINTS)
    return rows.iloc[np.unique(np.searchsorted(at, wanted * (1 - 1e-9)).clip(max=len(rows) - 1))]


def panels(runs: Sequence[Results]) -> tuple[go.Figure, list[Cell]]:
    """Return an empty figure and each run's cell: one panel, or one beside the other with a shared y-axis."""
    if len(runs) == 1:
        return go.Figure(), [{}]
    return grid([run.name for run in runs], rows=1)


def grid(titles: Sequence[str], rows: int) -> tuple[go.Figure, list[Cell]]:
    """Return an empty figure with a panel for each title, in rows of like length, and their cells.

    All panels share the scale of their y-axes.
    """
    columns = math.ceil(len(titles) / rows)
    cells = [{"row": 1 + k // columns, "col": 1 + k % columns} for k in range(len(titles))]
    specs: list[list[Any]] = [[None] * columns for _ in range(rows)]
    for cell in cells:
        specs[cell["row"] - 1][cell["col"] - 1] = {}
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes="all", subplot_titles=titles, specs=specs,
        vertical_spacing=0.35 / rows,
    )  # fmt: skip
    figure.update_layout(meta={"panels": len(titles), "rowsOfPanels": rows})
    return figure, [*cells]


def lines(
    runs: Sequence[Results], make: Callable[[Results], Table], x: str, x_title: str, y_title: str
) -> go.Figure:
    """Draw a table's lines, methods in one colour in every run's panel, and the noise ceiling.

    Args:
        make: gives a run's rows ``method,mean,sem`` and ``x``, and ``ceiling`` and ``ceiling_lower`` where
            there are.
    """
    figure, cells = panels(runs)
    tables = [make(run) for run in runs]
    palette = Palette(runs, (method for table in tables for method in table["method"]))
    for run, table, cell in zip(runs, tables, cells, strict=True):
        covering = {method for group in same_scores(run) for method in group[1:]}
        for method, rows in table.groupby("method", sort=False):
            # dashed over its twin's solid line, so that both colours are seen
            palette.add(figure, cell, thinned(rows, x), x, str(method), dashed=method in covering)
        ceiling = thinned(table.drop_duplicates(x), x)
        if "ceiling" in table and ceiling["ceiling"].notna().any():
            figure.add_scatter(
                x=ceiling[x],
                y=ceiling["ceiling"],
                mode="lines" if len(ceiling) > 1 else "markers",
                name="noise ceiling",
                legendgroup="noise ceiling",
                legendrank=1,
                showlegend=cell.get("col", 1) == 1,
                line={"color": CEILING, "dash": "dash", "width": 2},
                hovertemplate="%{y:.3f}<extra>noise ceiling</extra>",
                **cell,
            )
            lower = ceiling.dropna(subset=["ceiling_lower"]) if "ceiling_lower" in ceiling else ceiling[:0]
            if len(lower):
                figure.add_scatter(
                    x=lower[x],
                    y=lower["ceiling_lower"],
                    mode="lines" if len(lower) > 1 else "markers",
                    fill="tonexty" if len(lower) == len(ceiling) > 1 else None,
                    fillcolor=translucent(CEILING, 0.12),
                    name=LOWER,
                    legendgroup="noise ceiling",
                    showlegend=False,
                    line={"color": CEILING, "dash": "dot", "width": 1},
                    hovertemplate="%{y:.3f}<extra>" + LOWER + "</extra>",
                    **cell,
                )
    axes(figure, x_title, y_title)
    return figure


class Palette:
    """Colours of methods over several runs, and which were named in the legend.

    Args:
        more: names that are no method of the runs, such as ``chance``.
    """

    def __init__(self, runs: Sequence[Results], more: Any = ()) -> None:
        names = [*dict.fromkeys([*all_methods(runs), *more])]
        known = all_methods(runs)
        shown = [*highlighted(runs), *(name for name in names if name not in known)]
        self.color = colors(names, shown)
        self.label = {name: label(name, runs) for name in names}
        self.rank = {name: 10 + k for k, name in enumerate(names)}
        self.named: set[str] = set()

    def add(
        self, figure: go.Figure, cell: Cell, rows: Table, x: str, method: str, dashed: bool = False
    ) -> None:
        """Add a method's line; where it has a colour of its own, with a band of ± SEM."""
        color = self.color[method]
        context = color == OTHER
        band(
            figure, rows, x, color, self.label.get(method, method), "dash" if dashed else "solid", cell,
            width=1 if context else 2, with_band=not context,
            legendrank=self.rank[method], showlegend=method not in self.named,
        )  # fmt: skip
        self.named.add(method)


def band(
    figure: go.Figure,
    rows: Table,
    x: str,
    color: str,
    name: str,
    dash: str = "solid",
    cell: Cell | None = None,
    width: float = 2,
    with_band: bool = True,
    **legend: Any,
) -> None:
    """Add a line, and a band of ± SEM that its legend entry toggles too."""
    cell = cell or {}
    mean, sem, at = (rows[column].to_numpy(float) for column in ("mean", "sem", x))
    if with_band and len(rows) > 1 and np.isfinite(sem).any():
        figure.add_scatter(
            x=np.concatenate([at, at[::-1]]),
            y=np.concatenate([mean + sem, (mean - sem)[::-1]]),
            mode="lines",
            fill="toself",
            fillcolor=translucent(color),
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
            **cell,
        )
    figure.add_scatter(
        x=at,
        y=mean,
        customdata=sem[:, None],
        mode="lines+markers" if len(rows) < (15 if with_band else 2) else "lines",
        name=name,
        legendgroup=name,
        line={"color": color, "width": width, "dash": dash},
        marker={"size": 6},
        hovertemplate="%{y:.3f} ± %{customdata[0]:.3f} at %{x:.4~g}<extra>" + name + "</extra>",
        **{**legend, **cell},
    )


def axes(figure: go.Figure, x_title: str, y_title: str) -> None:
    """Give a figure its margins, titles and, where amounts of further training ask for it, a log axis."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 12, "t": 30 if figure.layout.annotations else 16, "b": 52},
        hovermode="closest",
        legend={
            "groupclick": "togglegroup",
            "itemsizing": "constant",
            "tracegroupgap": 0,
            "font": {"size": 12},
        },
    )
    figure.update_xaxes(title=x_title, zeroline=False, automargin=True)
    figure.update_yaxes(title=y_title, zeroline=True, automargin=True)
    if figure.layout.annotations:  # rows of panels: one title for a row's shared y-axis
        figure.update_yaxes(title="")
        figure.update_yaxes(title=y_title, col=1)
        if x_title == EPOCHS and figure.layout.meta["panels"] > 4 * figure.layout.meta["rowsOfPanels"]:
            figure.update_xaxes(title="epochs")  # in narrow panels the whole title runs into the next one's
    if x_title == EPOCHS:
        epochs_axis(figure)


def epochs_axis(figure: go.Figure) -> None:
    """Make the amount of further training logarithmic where it spans much, with round numbers as ticks."""
    ends = [(float(min(t.x)), float(max(t.x))) for t in figure.data if t.x is not None and len(t.x)]
    if not ends:
        return
    first, last = min(e[0] for e in ends), max(e[1] for e in ends)
    if logarithmic(first, last):
        ticks = log_ticks(first, last)
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    elif last <= 10:
        figure.update_xaxes(dtick=1)
