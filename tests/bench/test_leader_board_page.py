"""The figures of the leader board's page."""

from __future__ import annotations

import itertools

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from fimo.bench.page import name_points


def test_names_of_crowded_points_cover_neither_each_other_nor_points() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        10 ** (1.5 * torch.rand(30, generator=generator) - 4),
        1 - 0.5 * torch.rand(30, generator=generator),
    )
    points = {f"a_method_{k}": (float(x[k]), float(y[k])) for k in range(30)}
    points["unmeasured"] = (float("nan"), 1.0)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([1e-4, 1], [0.2, 1.1], "o")
    axes.set_xscale("log")
    written = name_points(axes, points)
    assert [text.get_text() for text in written] == list(points)[:30]
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in written]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    places = [axes.transData.transform(points[text.get_text()]) for text in written]
    assert not any(box.contains(*place) for box in boxes for place in places)
    whole = axes.get_window_extent()
    assert all(whole.x0 <= b.x0 and b.x1 <= whole.x1 for b in boxes)
