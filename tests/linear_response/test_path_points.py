"""Evaluation points at which something dear is computed."""

from __future__ import annotations

from fimo.linear_response.path_points import nearest, spread, spread_from_first

STEPS = [1, 2, 4, 8, 16]


def test_points_are_evenly_spread_in_the_logarithm_of_steps() -> None:
    assert spread(STEPS, 3) == [2, 4, 5]  # nearest to 16 ** (1/3), 16 ** (2/3) and 16
    assert spread_from_first(STEPS, 3) == [1, 3, 5]
    assert spread(STEPS, 1) == spread_from_first(STEPS, 1) == [5]
    assert spread(STEPS, 5) == spread_from_first(STEPS, 9) == [1, 2, 3, 4, 5]


def test_each_point_takes_the_nearest_of_them() -> None:
    assert nearest(STEPS, [1, 4]) == [1, 1, 4, 4, 4]
