"""The paper's figures as vector and PNG files, drawn by matplotlib from the report's own tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fimo.reporting.curves import (
    agreement_table,
    cost_table,
    datamodeling_table,
    distance_table,
    mean_effect_table,
    mislabelled_table,
    removal_table,
    retraining_table,
    seeds_table,
)
from fimo.reporting.display import chosen_tests
from fimo.reporting.findings import all_methods, highlighted
from fimo.reporting.results import Results
from fimo.reporting.style import CEILING, OTHER, PALETTE, colors, log_ticks, logarithmic

PANEL = (3.6, 2.8)
"""Inches of one panel."""

CEILING_NAME = "noise ceiling"
EPOCHS = "epochs of further training"

SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}

Runs = Sequence[Results]


def agreement_figure(runs: Runs) -> Figure | None:
    """Agreement against the amount of further training: a row per run, a column per metric."""
    return _panels(runs, agreement_table, "epoch", EPOCHS)


def seeds_figure(runs: Runs) -> Figure | None:
    """Agreement at the last evaluation point against the number of seeds averaged."""
    figure = _panels(runs, seeds_table, "seeds", "seeds averaged")
    for axes in figure.axes if figure else ():
        axes.set_xscale("log")
        counts = sorted({int(k) for run in runs for k in run.evaluation["seeds"].unique()})
        axes.set_xticks(counts, [str(k) for k in counts], minor=False)
        axes.minorticks_off()
    return figure


def mean_figure(runs: Runs) -> Figure | None:
    """Agreement with adjusted changes (solid) and with raw ones (dotted)."""

    palette = _palette(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        table = mean_effect_table(run, metric)
        for (method, subtracted), rows in table.groupby(["method", "subtract_mean"], sort=False):
            color = palette[str(method)]
            width = 0.7 if color == OTHER else 1.5
            label = str(method) if subtracted else None
            axes.plot(
                rows["epoch"], rows["mean"], "-" if subtracted else ":", color=color, lw=width, label=label,
                zorder=1 if color == OTHER else 2,
            )  # fmt: skip
        axes.plot([], [], ":", color=CEILING, label="raw changes")
        epochs_axis(axes)

    kept = [run for run in runs if run.has_raw]
    return _grid(kept, draw, EPOCHS) if kept else None


def sorted_figure(runs: Runs, tests: int = 4) -> Figure | None:
    """Sensitivities of single test instances, sorted, with three methods' scores; a row for each run."""
    columns = min(len(chosen_tests(run.sensitivity, tests)) for run in runs)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), columns, squeeze=False)
    palette = _palette(runs)
    for row, run in zip(panels, runs, strict=True):
        for axes, j in zip(row, chosen_tests(run.sensitivity, columns), strict=True):
            _sorted_panel(axes, run, j, palette)
            name = f"{run.name}, " if len(runs) > 1 else ""
            axes.set_title(f"{name}test instance {int(run.sensitivity.test[j])}", fontsize=9)
        row[0].set_ylabel("change of the test loss")
    for axes in panels[-1]:
        axes.set_xlabel("left-out instances, sorted")
    _legend(figure)
    return figure


def _sorted_panel(axes: Axes, run: Results, position: int, palette: Mapping[str, str]) -> None:
    """Draw one test instance's last sensitivities as bars, and methods' scores, scaled, as dots."""
    sensitivity = run.sensitivity.sensitivity[-1, position].double()
    order = sensitivity.argsort(descending=True)
    rank = range(1, len(order) + 1)
    axes.bar(rank, sensitivity[order].tolist(), width=1.0, color="#c9d3e4", label="sensitivity")
    shown = [method for method in highlighted([run]) if method in run.scores]
    for method in [*dict.fromkeys([*shown[:2], *(m for m in shown if m == "graddot"), *shown])][:3]:
        scores = run.judged_scores(method)
        scores = (scores[-1] if scores.ndim == 3 else scores)[position].double()
        scaled = scores * (sensitivity.norm() / scores.norm().clamp(min=1e-300))
        color = palette[method] if palette[method] != OTHER else CEILING
        axes.plot(rank, scaled[order].tolist(), ".", ms=3, color=color, label=f"{method}, scaled")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def cost_figure(runs: Runs) -> Figure | None:
    """Agreement at the last evaluation point against seconds; the highlighted methods are named."""
    palette, shown = _palette(runs), highlighted(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        for row in cost_table(run, metric).to_dict("records"):
            name = row["method"]
            axes.errorbar(
                row["seconds"], row["mean"], row["sem"], fmt="o", ms=5 if name in shown else 3,
                color=palette[name], label=name, zorder=2 if name in shown else 1,
            )  # fmt: skip
        axes.set_xscale("log")

    return _grid(runs, draw, "seconds")


def distance_figure(runs: Runs) -> Figure | None:
    """Distance of the full runs from the final model, as a share of its norm."""
    tables = [(run.name, table) for run in runs if (table := distance_table(run)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    for k, (name, table) in enumerate(tables):
        _band(axes, table, "epoch", PALETTE[k % len(PALETTE)], name)
    epochs_axis(axes)
    axes.set(xlabel=EPOCHS, ylabel="distance / norm of the final model", ylim=(0, None))
    if len(tables) > 1:
        axes.legend()
    return figure


def retraining_figure(runs: Runs) -> Figure | None:
    """Agreement with re-training from scratch leaving one out."""

    palette = {"further training": CEILING} | _palette(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        table = retraining_table(run, metric)
        assert table is not None
        for method, rows in table.groupby("method", sort=False):
            _band(axes, rows, "epoch", palette[str(method)], str(method))
        epochs_axis(axes)

    kept = [run for run in runs if run.retraining is not None]
    return _grid(kept, draw, EPOCHS) if kept else None


def datamodeling_figure(runs: Runs) -> Figure | None:
    """Linear datamodeling score against the amount of further training."""
    return _task(runs, datamodeling_table, "epoch", EPOCHS, "LDS (spearman)")


def removal_figure(runs: Runs) -> Figure | None:
    """Change of the test loss against the number of instances left out together."""
    return _task(runs, removal_table, "removed", "training instances left out", "change of the test loss")


def mislabelled_figure(runs: Runs) -> Figure | None:
    """Average precision of finding flipped labels, beside chance."""
    tables = [(run, table) for run in runs if (table := mislabelled_table(run)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=(PANEL[0], PANEL[1] * len(tables)), layout="constrained")
    palette = _palette([run for run, _ in tables])
    for axes, (run, table) in zip(_axes(figure, len(tables), 1), tables, strict=True):
        shades = [palette.get(method, CEILING) for method in table["method"]]
        axes.barh(table["method"], table["mean"], xerr=table["sem"], color=shades)
        axes.axvline(table["chance"].iloc[0], ls="--", color=CEILING)
        axes.invert_yaxis()
        axes.set(xlabel="average precision", title=run.name if len(tables) > 1 else None)
    return figure


FIGURES: dict[str, Callable[[Runs], Figure | None]] = {
    "agreement": agreement_figure,
    "seeds": seeds_figure,
    "sorted": sorted_figure,
    "mean": mean_figure,
    "distance": distance_figure,
    "retraining": retraining_figure,
    "cost": cost_figure,
    "datamodeling": datamodeling_figure,
    "removal": removal_figure,
    "mislabelled": mislabelled_figure,
}
"""By the name that the command takes; each returns None where the runs hold nothing to draw."""


def write_figures(
    runs: Results | Sequence[Results],
    folder: str | Path,
    names: Iterable[str] = FIGURES,
    formats: Sequence[str] = ("pdf", "png"),
    dpi: int = 200,
) -> list[Path]:
    """Write figures to ``FOLDER/NAME.pdf`` and ``.png``; those that the runs have no data for are left out.

    Returns:
        the files written.
    """
    runs = [runs] if isinstance(runs, Results) else list(runs)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(SETTINGS):
        for name in names:
            if (figure := FIGURES[name](runs)) is None:
                continue
            for suffix in formats:
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=dpi, metadata={"CreationDate": None} if suffix == "pdf" else None)
                written.append(path)
    return written


def _task(
    runs: Runs, make: Callable[[Results], pd.DataFrame | None], x: str, x_title: str, y_title: str
) -> Figure | None:
    """Draw one panel per run of a further evaluation."""
    tables = [(run, table) for run in runs if (table := make(run)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=(PANEL[0] + 1, PANEL[1] * len(tables)), layout="constrained")
    palette = _palette([run for run, _ in tables], (m for _, table in tables for m in table["method"]))
    for axes, (run, table) in zip(_axes(figure, len(tables), 1), tables, strict=True):
        for method, rows in table.groupby("method", sort=False):
            _band(axes, rows, x, palette[str(method)], str(method))
        if x == "epoch":
            epochs_axis(axes)
        if "ceiling" in table and table["ceiling"].notna().any():
            ceiling = table.drop_duplicates(x)
            _ceiling(axes, ceiling, x)
        axes.set(xlabel=x_title, ylabel=y_title, title=run.name if len(tables) > 1 else None)
    _legend(figure)
    return figure


def _panels(runs: Runs, make: Callable[[Results, str], pd.DataFrame], x: str, x_title: str) -> Figure | None:
    palette = _palette(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        table = make(run, metric)
        for method, rows in table.groupby("method", sort=False):
            _band(axes, rows, x, palette[str(method)], str(method))
        ceiling = table.drop_duplicates(x)
        if ceiling["ceiling"].notna().any():
            _ceiling(axes, ceiling, x)
        if x == "epoch":
            epochs_axis(axes)

    return _grid(runs, draw, x_title)


def _grid(runs: Runs, draw: Callable[[Axes, Results, str], None], x_title: str) -> Figure:
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
    _legend(figure)
    return figure


def _axes(figure: Figure, rows: int, columns: int) -> list[Axes]:
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def _palette(runs: Runs, more: Iterable[str] = ()) -> dict[str, str]:
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


def _band(axes: Axes, rows: pd.DataFrame, x: str, color: str, label: str) -> None:
    """Draw a line with its band of ± SEM; methods for context are thin, behind the others, without a band."""
    if color == OTHER:
        marker = "." if len(rows) == 1 else None
        axes.plot(rows[x], rows["mean"], color=color, label=label, marker=marker, lw=0.7, zorder=1)
        return
    marker = "o" if len(rows) < 15 else None
    axes.plot(rows[x], rows["mean"], color=color, label=label, marker=marker, ms=3, lw=1.5)
    low, high = rows["mean"] - rows["sem"], rows["mean"] + rows["sem"]
    axes.fill_between(rows[x], low, high, color=color, alpha=0.18, lw=0)


def _ceiling(axes: Axes, rows: pd.DataFrame, x: str) -> None:
    """Draw the noise ceiling dashed; at a single point as a stroke."""
    style = "--" if len(rows) > 1 else "_"
    axes.plot(rows[x], rows["ceiling"], style, color=CEILING, label=CEILING_NAME, ms=14, zorder=3)


def _legend(figure: Figure) -> None:
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
