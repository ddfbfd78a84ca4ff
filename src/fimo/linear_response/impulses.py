"""Impulses: the first order of further training along a full run, without the curvature between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.further_training.trajectory import FurtherTraining, Trajectory
from fimo.linear_response.coefficient_optimizer import preconditioner
from fimo.linear_response.path_points import nearest, spread
from fimo.linear_response.phi import times
from fimo.linear_response.recursion import with_parameters
from fimo.models.final_model import FinalModel


@dataclass(frozen=True)
class Impulses:
    """What leaving instances out does to test losses to first order.

    Args:
        values: ``[E, J, L]`` (float64), loss changes.
        likeness: ``[E, J, J]`` (float64), inner products of the test instances' gradients at the run's
            parameters (at the nearest point where gradients were taken).
        evaluations: gradients of single instances that were made.
    """

    values: Tensor
    likeness: Tensor
    evaluations: int


def impulses(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    removed: Instances,
    further_training: FurtherTraining,
    trajectory: Trajectory,
    segments: int,
    memory_mb: float,
) -> Impulses:
    """Return the impulses of the left-out instances along one seed's full run.

        values[t, j, i] = sum over segments k until t of g_j(θ_t)^T P_k g_i(θ_k) Δτ_k / N,

    with gradients g_j of what is explained on test instances and g_i of training losses (the mean of a
    segment's ends), P_k the optimizer's preconditioner at its end (ones for SGD), and Δτ_k the time that
    passes in it, the sum of learning rates for plain SGD. Seeds' batches are taken as their mean: an instance
    pushes by 1/N at every step. Where steps are few, or curvature is small, that is all there is.

    Args:
        removed: the L left-out instances.
        segments: most points of the run, besides its start, at which gradients are taken; in between values
            grow in proportion to time.
    """
    given, rule = further_training, further_training.protocol.update_rule
    points = spread(given.steps, segments)
    clock = [0.0, *times(given.protocol, given.steps)]
    size = max(1, int(memory_mb * 2**20 / (16 * final_model.size)))
    parts: list[Tensor] = []
    likeness: list[Tensor] = []
    evaluations = 0
    for block in removed.batches(size):
        before = InstanceGradients(with_parameters(final_model, trajectory.parameters[0]), memory_mb)
        start = before.losses(block).dense()[:, 0]
        force, found, evaluations = torch.zeros_like(start), [], evaluations + before.evaluations
        for last, point in zip([0, *points[:-1]], points, strict=True):
            at = InstanceGradients(with_parameters(final_model, trajectory.parameters[point]), memory_mb)
            end = at.losses(block).dense()[:, 0]
            push = (start + end) * ((clock[point] - clock[last]) / 2 / len(train))
            if trajectory.second_moment is not None:
                diagonal = preconditioner(rule, dict(trajectory.second_moment[point]))
                push = push if diagonal is None else push * diagonal
            force, start = force + push, end
            explained = at.measurements(test)
            found.append(explained.times(force.T)[:, 0])
            if len(likeness) < len(points):
                likeness.append(explained.gram(explained)[:, 0, :, 0].double())
            evaluations += at.evaluations
        parts.append(torch.stack(found).double())
    at_points, where = torch.cat(parts, 2), [points.index(k) for k in nearest(given.steps, points)]
    pace = torch.tensor([clock[e + 1] / clock[points[k]] for e, k in enumerate(where)], dtype=torch.float64)
    values = at_points[where] * pace.to(at_points.device)[:, None, None]
    return Impulses(values, torch.stack(likeness)[where], evaluations)
