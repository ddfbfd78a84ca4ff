"""The paper's figures as vector and PNG files, drawn by matplotlib from the report's own tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fimo.reporting.curves import (
    agreement_table,
    cost_table,
    distance_table,
    drawn_tasks,
    figure_of_task,
    mean_effect_table,
    mislabelled_table,
    retraining_table,
    seeds_table,
    task_table,
)
from fimo.reporting.drawing import (
    PANEL,
    Runs,
    band,
    curve_panels,
    epochs_axis,
    grid,
    legend,
    palette_of,
    stacked_axes,
    task_figure,
)
from fimo.reporting.findings import highlighted
from fimo.reporting.instance_table import chosen_tests
from fimo.reporting.results import Results
from fimo.reporting.style import CEILING, OTHER, PALETTE

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


def agreement_figure(runs: Runs) -> Figure | None:
    """Agreement against the amount of further training: a row per run, a column per metric."""
    return curve_panels(runs, agreement_table, "epoch", EPOCHS)


def seeds_figure(runs: Runs) -> Figure | None:
    """Agreement at the last evaluation point against the number of seeds averaged."""
    figure = curve_panels(runs, seeds_table, "seeds", "seeds averaged")
    for axes in figure.axes if figure else ():
        axes.set_xscale("log")
        counts = sorted({int(k) for run in runs for k in run.evaluation["seeds"].unique()})
        axes.set_xticks(counts, [str(k) for k in counts], minor=False)
        axes.minorticks_off()
    return figure


def mean_figure(runs: Runs) -> Figure | None:
    """Agreement with adjusted changes (solid) and with raw ones (dotted)."""

    palette = palette_of(runs)

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
    return grid(kept, draw, EPOCHS) if kept else None


def sorted_figure(runs: Runs, tests: int = 4) -> Figure | None:
    """Sensitivities of single test instances, sorted, with three methods' scores; a row for each run."""
    columns = min(len(chosen_tests(run.sensitivity, tests)) for run in runs)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), columns, squeeze=False)
    palette = palette_of(runs)
    for row, run in zip(panels, runs, strict=True):
        for axes, j in zip(row, chosen_tests(run.sensitivity, columns), strict=True):
            _sorted_panel(axes, run, j, palette)
            name = f"{run.name}, " if len(runs) > 1 else ""
            instance = run.called("test", int(run.sensitivity.test[j]))
            axes.set_title(f"{name}test instance {instance}", fontsize=9)
        row[0].set_ylabel(f"change of the test {run.measured.name}")
    for axes in panels[-1]:
        axes.set_xlabel("left-out instances, sorted")
    legend(figure)
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
    palette, shown = palette_of(runs), highlighted(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        for row in cost_table(run, metric).to_dict("records"):
            name = row["method"]
            axes.errorbar(
                row["seconds"], row["mean"], row["sem"], fmt="o", ms=5 if name in shown else 3,
                color=palette[name], label=name, zorder=2 if name in shown else 1,
            )  # fmt: skip
        axes.set_xscale("log")

    return grid(runs, draw, "seconds")


def distance_figure(runs: Runs) -> Figure | None:
    """Distance of the full runs from the final model, as a share of its norm."""
    tables = [(run.name, table) for run in runs if (table := distance_table(run)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    for k, (name, table) in enumerate(tables):
        band(axes, table, "epoch", PALETTE[k % len(PALETTE)], name)
    epochs_axis(axes)
    axes.set(xlabel=EPOCHS, ylabel="distance / norm of the final model", ylim=(0, None))
    if len(tables) > 1:
        axes.legend()
    return figure


def retraining_figure(runs: Runs) -> Figure | None:
    """Agreement with re-training from scratch leaving one out."""

    palette = {"further training": CEILING} | palette_of(runs)

    def draw(axes: Axes, run: Results, metric: str) -> None:
        table = retraining_table(run, metric)
        assert table is not None
        for method, rows in table.groupby("method", sort=False):
            band(axes, rows, "epoch", palette[str(method)], str(method))
        epochs_axis(axes)

    kept = [run for run in runs if run.retraining is not None]
    return grid(kept, draw, EPOCHS) if kept else None


def curve_of_task(task: str, runs: Runs) -> Figure | None:
    """A task's table, one line for each method."""
    if (curve := drawn_tasks(runs).get(task)) is None:
        return None
    return task_figure(runs, lambda run: task_table(run, task), curve.x, curve.x_title, curve.y_title)


def mislabelled_figure(runs: Runs) -> Figure | None:
    """Average precision of finding flipped labels, beside chance."""
    tables = [(run, table) for run in runs if (table := mislabelled_table(run)) is not None]
    if not tables:
        return None
    figure = Figure(figsize=(PANEL[0], PANEL[1] * len(tables)), layout="constrained")
    palette = palette_of([run for run, _ in tables])
    for axes, (run, table) in zip(stacked_axes(figure, len(tables), 1), tables, strict=True):
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
    "datamodeling": partial(curve_of_task, "datamodeling"),
    "removal": partial(curve_of_task, "removal"),
    "mislabelled": mislabelled_figure,
}
"""By the name that the command takes; each returns None where the runs hold nothing to draw."""


def write_figures(
    runs: Results | Sequence[Results],
    folder: str | Path,
    names: Iterable[str] | None = None,
    formats: Sequence[str] = ("pdf", "png"),
    dpi: int = 200,
) -> list[Path]:
    """Write figures to ``FOLDER/NAME.pdf`` and ``.png``; those that the runs have no data for are left out.

    Args:
        names: of :data:`FIGURES`; all of these and every other task's curve when None.

    Returns:
        the files written.
    """
    runs = [runs] if isinstance(runs, Results) else list(runs)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = FIGURES | {figure_of_task(task): partial(curve_of_task, task) for task in drawn_tasks(runs)}
    written = []
    with matplotlib.rc_context(SETTINGS):
        for name in known if names is None else names:
            if (figure := known[name](runs)) is None:
                continue
            for suffix in formats:
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=dpi, metadata={"CreationDate": None} if suffix == "pdf" else None)
                written.append(path)
    return written
