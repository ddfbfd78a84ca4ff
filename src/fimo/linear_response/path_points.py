"""Where along a trajectory curvature is taken: few points, evenly spread over the logarithm of time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.further_training.trajectory import Trajectory


@dataclass(frozen=True)
class Segment:
    """Evaluation points ``first`` (excluded; 0 is the final model) to ``last``, with one Jacobian."""

    first: int
    last: int


def segments(steps: Sequence[int], most: int) -> list[Segment]:
    """Cut the E evaluation points into at most ``most`` segments whose lengths grow geometrically.

    Args:
        steps: ``[E]``, optimizer steps at the evaluation points.
    """
    bounds = [0, *spread(steps, most)]
    return [Segment(a, b) for a, b in itertools.pairwise(bounds)]


def spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the numbers 1…E, the last included, evenly spread in log(steps)."""
    if len(steps) <= most:
        return list(range(1, len(steps) + 1))
    logs = torch.tensor(steps, dtype=torch.float64).log()
    wanted = torch.linspace(logs[0].item(), logs[-1].item(), most + 1, dtype=torch.float64)[1:]
    return sorted({int((logs - w).abs().argmin()) + 1 for w in wanted})


def spread_from_first(steps: Sequence[int], most: int) -> list[int]:
    """Return the same with the first number included, unless only one is allowed, which is the last."""
    if len(steps) <= most or most == 1:
        return spread(steps, most)
    logs = torch.tensor(steps, dtype=torch.float64).log()
    wanted = torch.linspace(logs[0].item(), logs[-1].item(), most, dtype=torch.float64)
    return sorted({int((logs - w).abs().argmin()) + 1 for w in wanted})


def nearest(steps: Sequence[int], points: Sequence[int]) -> list[int]:
    """Return for each of the E evaluation points the one of ``points`` (from 1) nearest in log(steps)."""
    logs = torch.tensor(steps, dtype=torch.float64).log()
    chosen = torch.tensor(points) - 1
    return [points[k] for k in (logs[:, None] - logs[chosen]).abs().argmin(1).tolist()]


def midpoint(trajectory: Trajectory, segment: Segment) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return parameters (and Adam's second moment) in the middle of a segment.

    Those of the evaluation point there; where there is none, the mean of the segment's ends, but the last
    one's second moment, which is zero at the final model.
    """
    a, b = segment.first, segment.last
    middle, moments = (a + b) // 2, trajectory.second_moment
    if middle > a:
        return dict(trajectory.parameters[middle]), None if moments is None else dict(moments[middle])
    start, end = trajectory.parameters[a], trajectory.parameters[b]
    mean = {name: (start[name] + end[name]) / 2 for name in start}
    return mean, None if moments is None else dict(moments[b])


def mean_of(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of tensors by name."""
    return {name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]}
