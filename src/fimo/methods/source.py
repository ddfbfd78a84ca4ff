"""SOURCE, for further training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows
from fimo.curvature.spectrum import MAX_DIMENSION, KernelSpectrum, Phi, kernel_dimension
from fimo.data.instances import Instances
from fimo.engine.leave_out import make_rule
from fimo.errors import InputError
from fimo.further_training.trajectory import Trajectory
from fimo.linear_response.coefficient_optimizer import preconditioner
from fimo.linear_response.path_points import mean_of, nearest, spread_from_first
from fimo.linear_response.phi import relaxation, times
from fimo.linear_response.recursion import with_parameters
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.error_bars import NO_BARS
from fimo.methods.following import FollowingMethod, Tally
from fimo.models.final_model import FinalModel
from fimo.scores import Scores


class Source(FollowingMethod):
    """Unrolled differentiation with piecewise stationary dynamics (SOURCE; Bae et al., 2024, eqs. 12-17).

    Further training up to an evaluation point is cut into segments, in each of which the curvature G_l and
    the instance's gradient g_il are constant:

        score[t, j, i] = (1/N) sum over l of g_j^T [prod over k > l of exp(-tau_k G_k)] phi(tau_l, G_l) g_il

    with phi(tau, G) = (1 - exp(-tau G)) G^-1 and tau_l the sum of the segment's learning rates; g_j is the
    test loss's gradient at the end. G_l and g_il are taken at the mean parameters of the segment's points and
    seeds, as in the paper's fast variant; G_l is the whole Gauss-Newton matrix, where the paper approximates
    it by EK-FAC. With Adam, the mean second moment preconditions both.

    Args:
        segments: of each span of further training; the paper takes 3.
        points: most evaluation points for which it is done, the first and the last among them (of one, the
            last), evenly spread in log(steps); others take the scores of the nearest on that scale.
        memory_mb: of gradients held at once.
    """

    needs = "the protocol of further training"
    cost = "one full run per seed, and an eigendecomposition per segment"
    use = "longer further training without real runs, at the cost of mean batches"

    def __init__(self, segments: int = 3, points: int = 5, memory_mb: float = 1024) -> None:
        for key, value in (("segments", segments), ("points", points), ("memory_mb", memory_mb)):
            if value < 1:
                raise InputError(key, f"expected at least 1 but got {value}")
        self.segments, self.points, self.memory_mb = segments, points, memory_mb

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        dimension = kernel_dimension(final_model, train)
        if dimension <= MAX_DIMENSION:
            return None
        return f"its eigenproblem is {dimension} x {dimension} (at most {MAX_DIMENSION})"

    def scores(self, problem: AttributionProblem) -> Scores:
        steps, tally = problem.followed.steps, Tally()
        runs = list(problem.followed.full_runs())
        tally.add(len(runs) * problem.run_gradients)
        chosen = spread_from_first(steps, self.points)
        found = {e: self._until(problem, e, runs, tally) for e in chosen}
        values = torch.stack([found[k] for k in nearest(steps, chosen)])
        return self.with_bars(problem, values, NO_BARS, tally)

    def _until(
        self, problem: AttributionProblem, end: int, runs: Sequence[Trajectory], tally: Tally
    ) -> Tensor:
        """Return the scores ``[J, L]`` at evaluation point ``end`` (from 1)."""
        final_model, protocol = problem.final_model, problem.followed.protocol
        test, left_out, n = problem.test, problem.removed, len(problem.train)
        time = [0.0, *times(protocol, problem.followed.steps)]
        bounds = sorted({round(end * k / self.segments) for k in range(self.segments + 1)})
        at_end = InstanceGradients(with_parameters(final_model, _mean(runs, [end])), self.memory_mb)
        vectors = at_end.measurements(test).dense().double()  # [J, 1, P]
        tally.add(at_end.evaluations)
        total = torch.zeros(len(test), len(left_out), dtype=torch.float64, device=vectors.device)
        for first, last in reversed(list(itertools.pairwise(bounds))):
            inside = sorted({first, (first + last) // 2, last})
            model = with_parameters(final_model, _mean(runs, inside))
            gradients = InstanceGradients(model, self.memory_mb)
            moments = [
                mean_of([r.second_moment[k] for k in inside if k])
                for r in runs
                if r.second_moment is not None
            ]
            weight = preconditioner(protocol.update_rule, mean_of(moments) if moments else None)
            scale = None if weight is None else weight.double().sqrt()
            spectrum = KernelSpectrum(model, problem.train, gradients, column_scale=scale)
            tau = time[last] - time[first]
            rows = DenseRows(vectors, gradients.shapes)
            force = gradients.losses(left_out)
            total += spectrum.apply(relaxation(tau), rows, force)[:, 0, :, 0]
            carried = spectrum.parameter_change(_decay(tau), rows).T  # in scaled units
            vectors = (carried if scale is None else carried / scale)[:, None]
            tally.add(gradients.evaluations)
        total *= make_rule(protocol, problem.train).multiplicity(problem.index).to(total)
        return (total / n).to(problem.dtype)


def _mean(runs: Sequence[Trajectory], points: Sequence[int]) -> dict[str, Tensor]:
    return mean_of([r.parameters[k] for r in runs for k in points])


def _decay(tau: float) -> Phi:
    return lambda curvature: torch.exp(-tau * curvature)
