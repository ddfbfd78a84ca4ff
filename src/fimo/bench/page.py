"""The leader board as a page of the documentation, with its figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from fimo.bench.card import facts, markdown
from fimo.bench.leader_board import Board, ranking_rows, setting_rows
from fimo.extras import STATIC_FIGURES, require
from fimo.reporting.style import CEILING, colors
from fimo.store.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

COLOURED = 6
"""The best methods have colours of their own in figures."""

BASELINES = ("random", "graddot")
"""So have these."""

ABOUT = ("data", "network", "final models", "further training", "left out", "seeds", "cost", "made")
"""What the page says of a setting, of its card."""

INTRODUCTION = """\
How well attribution methods agree with further training, in settings whose gold standards anybody can
make again and check. {metric} across left-out training instances for each test instance, averaged over
test instances; then mean ± standard error over final models. Methods that follow seeds of further
training follow others than the gold standard's.

This page is written by `fimo bench table --page`; {{doc}}`how_to/benchmark` says how to add a method or
a setting, and what the columns of [the same results at all evaluation points]({results}) are."""

OVERALL = """\
As a share of the upper noise ceiling, which a perfect prediction reaches: the mean over evaluation
points and then over settings, and the same at the first and the last evaluation point. The cost is the
median over settings of the method's seconds as a share of the seconds that the gold standard took, full
runs that the method follows included. MB is the memory that it took at most above what the process held.
Methods that do not apply everywhere come last."""

EACH = """\
*Beats the next* is the probability that the method's agreement, averaged over evaluation points, is
higher than that of the method below it, paired over final models; seconds are those of one final model."""


def write_page(board: Board, path: Path) -> list[Path]:
    """Write a page in Markdown, and its figures and results beside it; return the files.

    Raises:
        InputError: the extra for figures is not installed.
    """
    agreement, cost = (path.with_name(f"{path.stem}_{name}.png") for name in ("agreement", "cost"))
    results = path.with_name(f"{path.stem}_results.csv")
    draw(board, agreement, cost)
    header = ["method", "settings", "of the ceiling", "first", "last", "cost", "MB"]
    parts = [
        "# Leader board",
        INTRODUCTION.format(metric=board.metric.capitalize(), results=results.name),
        "## Over all settings\n" + OVERALL,
        markdown(header, [[f"`{row[0]}`", *row[1:]] for row in ranking_rows(board)]),
        f"![Agreement as a share of the ceiling, against cost]({cost.name})",
        f"![Agreement against the amount of further training]({agreement.name})",
        "## In each setting\n" + EACH,
    ]
    for name in board.settings:
        card = board.golds[name].card
        said = facts(card)
        steps = [f"after {step:,} steps" for step in board.points(name)]
        parts += [
            f"### {name}\n{card['about']}.",
            "\n".join(f"- {subject}: {said[subject]}" for subject in ABOUT),
            markdown(
                ["method", *steps, "beats the next", "seconds", "cost", "MB"], list(setting_rows(board, name))
            ),
        ]
    with written_aside(path) as aside:
        aside.write_text("\n\n".join(parts) + "\n")
    with written_aside(results) as aside:
        board.results.sort_values(["setting", "method", "step"]).to_csv(
            aside, index=False, float_format="%.4g"
        )
    return [path, agreement, cost, results]


def draw(board: Board, agreement: Path, cost: Path) -> None:
    """Draw the two figures of the page."""
    require("--page", STATIC_FIGURES)
    import matplotlib

    from fimo.reporting.static import SETTINGS

    with matplotlib.rc_context(SETTINGS):
        agreement_figure(board).savefig(agreement, dpi=110)
        cost_figure(board).savefig(cost, dpi=110)


def agreement_figure(board: Board) -> Figure:
    """Draw agreement against the amount of further training, a panel for each setting, below the ceilings."""
    from matplotlib.figure import Figure

    from fimo.reporting.drawing import PANEL, band, ceiling_line, legend, stacked_axes

    columns = min(3, len(board.settings))
    rows = -(-len(board.settings) // columns)
    figure = Figure(figsize=(PANEL[0] * columns + 1.5, PANEL[1] * rows), layout="constrained")
    palette = palette_of(board)
    for axes, name in itertools.zip_longest(stacked_axes(figure, rows, columns), board.settings):
        if name is None:
            axes.set_visible(False)
            continue
        found = board.results[board.results["setting"] == name]
        found = found.rename(columns={"sem_models": "sem", "ceiling_upper": "ceiling"})
        for method in board.ranking.index:
            one = found[found["method"] == method]
            if len(one):
                band(axes, one, "step", palette[method], method)
        ceiling_line(axes, found.drop_duplicates("step"), "step")
        axes.set_title(name, loc="left", fontsize=9)
        axes.set(xlabel="steps of further training", ylabel=board.metric)
    legend(figure)
    return figure


def cost_figure(board: Board) -> Figure:
    """Draw agreement as a share of the ceiling, over all settings, against cost."""
    from matplotlib.figure import Figure

    palette = palette_of(board)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Axes = figure.subplots()
    named = {}
    for row in board.ranking.reset_index().to_dict("records"):
        named[row["method"]] = place = (row["share_of_cost"], row["share"])
        axes.plot(*place, "o", color=palette[row["method"]])
    axes.axhline(1, ls="--", lw=1, color=CEILING)
    axes.set_xscale("log")
    axes.margins(x=0.12)  # names are to the right of their points
    axes.set(xlabel="seconds, as a share of the gold standard's", ylabel="share of the noise ceiling")
    name_points(axes, named)
    return figure


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> list[Annotation]:
    """Write names beside points where they cover no other name or point, with a line to those further away.

    The axes stay as they are then: limits and size must be final.

    Args:
        points: places in data units by name, those first whose names shall be the nearest.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    point = figure.dpi / 72
    marks = [
        Bbox.from_bounds(x - 3 * point, y - 3 * point, 6 * point, 6 * point)
        for x, y in (
            axes.transData.transform(place) for place in points.values() if all(map(isfinite, place))
        )
    ]
    inside, taken, written = axes.get_window_extent(), list(marks), []
    for name, place in points.items():
        if not all(map(isfinite, place)):
            continue
        best: tuple[float, Annotation, Bbox] | None = None
        for (dx, dy), (side, level) in itertools.product(_SHIFTS, _SIDES):
            text = axes.annotate(
                name, place, xytext=(dx * side, dy * level), textcoords="offset points", fontsize=7,
                ha={-1: "right", 0: "center", 1: "left"}[side], va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": CEILING} if max(dx, dy) > 10 else None,
            )  # fmt: skip
            text.get_window_extent()  # moves the text to its place; that of text alone is wanted
            box = Text.get_window_extent(text)
            beyond = box.width * box.height - _shared(box, inside)
            covered = beyond + sum(_shared(box, other) for other in taken)
            if best is not None and covered >= best[0]:
                text.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (covered, text, box)
            if covered == 0:
                break
        assert best is not None
        taken.append(best[2])
        written.append(best[1])
    return written


_SHIFTS = [(5, 5), (5, 8), *((d, d) for d in (14, 22, 30, 40, 50, 62, 76, 90))]
"""Points to the side and upwards at which a name is tried."""

_SIDES = [(1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1.6), (0, -1.6)]


def _shared(a: Bbox, b: Bbox) -> float:
    """Return the area, in square pixels, that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def palette_of(board: Board) -> dict[str, str]:
    """Return each method's colour: the best ones and baselines have their own."""
    methods = list(board.ranking.index)
    return colors(methods, [*methods[:COLOURED], *BASELINES])
