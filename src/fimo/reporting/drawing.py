"""Parts that static figures share: panels per run and metric, bands, the ceiling, one legend, colours."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fimo.reporting.findings import all_methods, highlighted
from fimo.reporting.findings import label as legend_label
from fimo.reporting.results import Results
from fimo.reporting.style import CEILING, OTHER, colors, log_ticks, logarithmic

PANEL = (3.6, 2.8)
"""Inches of one panel."""

CEILING_NAME = "noise ceiling"

Runs = Sequence[Results]


def task_figure(
    runs: Runs, make: Callable[[Results], pd.DataFrame | None], x: str, x_title: str, y_title: str
) -> Figure | None:
    """Draw one panel per run of a further evaluation."""
    tables = [(run, table) for run in runs if (table := make(run)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=(PANEL[0] + 1, PANEL[1] * len(tables)), layout="constrained")
    palette = palette_of([run for run, _ in tables], (m for _, table in tables for m in table["method"]))
    for axes, (run, table) in zip(stacked_axes(figure, len(tables), 1), tables, strict=True):
        for method, rows in table.groupby("method", sort=False):
            band(axes, rows, x, palette[str(method)], str(method))
        if x == "epoch":
            epochs_axis(axes)
        if "ceiling" in table and table["ceiling"].notna().any():
            ceiling = table.drop_duplicates(x)
            ceiling_line(axes, ceiling, x)
        axes.set(xlabel=x_title, ylabel=y_title, title=run.name if len(tables) > 1 else None)
    legend(figure)
    return figure


def curve_panels(
    runs: Runs, make: Callable[[Results, str], pd.DataFrame], x: str, x_title: str
) -> Figure | None:
    """Draw each run's table of agreement as lines with bands, and its ceiling."""
    palette = palette_of(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        table = make(run, metric)
        for method, rows in table.groupby("method", sort=False):
            band(axes, rows, x, palette[str(method)], legend_label(str(method), runs))
        ceiling = table.drop_duplicates(x)
        if ceiling["ceiling"].notna().any():
            ceiling_line(axes, ceiling, x)
        if x == "epoch":
            epochs_axis(axes)

    return grid(runs, draw, x_title)


def grid(runs: Runs, draw: Callable[[Axes, Results, str], None], x_title: str) -> Figure:
    """Draw a row of panels per run, a column per metric, with one legend."""
    metrics = [m for m in runs[0].metrics if all(m in run.metrics for run in runs)]
    size = (PANEL[0] * len(metrics) + 1, PANEL[1] * len(runs))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(len(runs), len(metrics), squeeze=False, sharex=True, sharey=True).flat)
    for i, axes in enumerate(panels):
        run, metric = runs[i // len(metrics)], metrics[i % len(metrics)]
        draw(axes, run, metric)
        axes.set_ylabel(metric)
        if i // len(metrics) == len(runs) - 1:
            axes.set_xlabel(x_title)
        if len(runs) > 1 and i % len(metrics) == 0:
            axes.set_title(run.name, loc="left", fontsize=9)
    legend(figure)
    return figure


def stacked_axes(figure: Figure, rows: int, columns: int) -> list[Axes]:
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def palette_of(runs: Runs, more: Iterable[str] = ()) -> dict[str, str]:
    """Return each method's colour: a handful have their own, names that are no methods too."""
    methods = all_methods(runs)
    names = [*dict.fromkeys([*methods, *more])]
    return colors(names, [*highlighted(runs), *(name for name in names if name not in methods)])


def epochs_axis(axes: Axes) -> None:
    """Make the amount of further training logarithmic where it spans much, with round numbers as ticks."""
    first, last = (float(end) for end in axes.dataLim.intervalx)
    if logarithmic(first, last):
        axes.set_xscale("log")
        axes.set_xticks(log_ticks(first, last), [f"{t:g}" for t in log_ticks(first, last)])
        axes.minorticks_off()


def band(axes: Axes, rows: pd.DataFrame, x: str, color: str, label: str) -> None:
    """Draw a line with its band of ± SEM; methods for context are thin, behind the others, without a band."""
    if color == OTHER:
        marker = "." if len(rows) == 1 else None
        axes.plot(rows[x], rows["mean"], color=color, label=label, marker=marker, lw=0.7, zorder=1)
        return
    marker = "o" if len(rows) < 15 else None
    axes.plot(rows[x], rows["mean"], color=color, label=label, marker=marker, ms=3, lw=1.5)
    low, high = rows["mean"] - rows["sem"], rows["mean"] + rows["sem"]
    axes.fill_between(rows[x], low, high, color=color, alpha=0.18, lw=0)


def ceiling_line(axes: Axes, rows: pd.DataFrame, x: str) -> None:
    """Draw the noise ceiling dashed, down to the lower one shaded; at a single point as a stroke."""
    style = "--" if len(rows) > 1 else "_"
    axes.plot(rows[x], rows["ceiling"], style, color=CEILING, label=CEILING_NAME, ms=14, zorder=3)
    if "ceiling_lower" in rows and rows["ceiling_lower"].notna().any():
        shade = axes.fill_between if len(rows) > 1 else axes.vlines
        shade(
            rows[x],
            rows["ceiling_lower"],
            rows["ceiling"],
            color=CEILING,
            alpha=0.12,
            lw=0 if len(rows) > 1 else 8,
        )


def legend(figure: Figure) -> None:
    """Put one legend to the right of all panels, each label once; methods for context share an entry."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if (ceiling := found.pop(CEILING_NAME, None)) is not None:
        found = {CEILING_NAME: ceiling, **found}
    context = [label for label, handle in found.items() if _color(handle) == OTHER]
    if context:
        last = found[context[0]]
        found = {label: handle for label, handle in found.items() if label not in context}
        found[textwrap.fill("others: " + ", ".join(context), 24)] = last
    figure.legend(list(found.values()), list(found), loc="outside right upper")


def _color(handle: Any) -> Any:
    """Return the colour of a legend's handle: a line, or a container whose first artist is one."""
    return getattr(handle[0] if isinstance(handle, tuple) else handle, "get_color", lambda: None)()
