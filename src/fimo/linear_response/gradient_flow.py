"""The finite-time response in constant curvature with mean batches, phi(G) g_i / N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.kronecker import MAX_EXACT_OUTPUTS, fit_factors
from fimo.curvature.spectrum import KernelSpectrum
from fimo.data.instances import Instances
from fimo.further_training.trajectory import FurtherTraining, Trajectory
from fimo.linear_response.coefficient_optimizer import preconditioner
from fimo.linear_response.kronecker_response import kronecker_response
from fimo.linear_response.own_response import own_response
from fimo.linear_response.path_points import spread
from fimo.linear_response.phi import relaxation, times
from fimo.linear_response.recursion import outputs_at, with_parameters
from fimo.models.final_model import FinalModel
from fimo.models.loss_changes import loss_changes_by


class MeanBatchResponse:
    """Predicts loss changes by phi of a curvature taken at the final model, or at points of full runs.

    With phi(c) = (1 - exp(-c tau)) / c (:mod:`fimo.linear_response.phi`), where tau is the sum of learning
    rates; with Adam curvature and gradients are in units of its preconditioner.

    Args:
        segments: most points of a run at which curvature is taken; evaluation points share the nearest's.
        propagate: ``outputs`` evaluates the loss at the changed outputs; ``loss`` takes it as linear in them.
        memory_mb: of Jacobians held at once.
        copies: ``[L]``, how many copies of each left-out instance are left out together.

    Attributes:
        gradient_evaluations: so far.
    """

    def __init__(
        self,
        final_model: FinalModel,
        train: Instances,
        further_training: FurtherTraining,
        segments: int,
        propagate: Literal["outputs", "loss"],
        memory_mb: float,
        copies: Tensor,
    ) -> None:
        self.final_model, self.train, self.ft = final_model, train, further_training
        self.segments, self.propagate, self.memory_mb = segments, propagate, memory_mb
        self.copies = copies
        self.loss_changes = loss_changes_by(propagate)
        protocol = further_training.protocol
        self.rule = protocol.update_rule
        self.time = times(protocol, further_training.steps)
        self.gradient_evaluations = 0

    def at_final_model(self, test: Instances, left_out: Instances) -> Tensor:
        """Return the scores ``[E, J, L]`` with everything taken at the final model."""
        weight = self._estimated_preconditioner() if self.rule.preconditions else None
        changes = self._relaxed(self.final_model, test, left_out, self.time, weight)
        outputs = outputs_at(self.final_model, self.final_model.parameters(), test)
        return torch.stack([self.loss_changes(self.final_model, outputs, test.targets, c) for c in changes])

    def at_ends(self, trajectory: Trajectory, test: Instances, left_out: Instances) -> Tensor:
        """Return one seed's scores ``[E, J, L]``, each with its run's parameters at (or near) its point."""
        found: list[Tensor] = []
        for k, mine in self._shares():
            model = with_parameters(self.final_model, trajectory.parameters[k])
            weight = None
            if trajectory.second_moment is not None:
                weight = preconditioner(self.rule, dict(trajectory.second_moment[k]))
            changes = self._relaxed(model, test, left_out, [self.time[e] for e in mine], weight)
            for e, change in zip(mine, changes, strict=True):
                outputs = outputs_at(self.final_model, trajectory.parameters[e + 1], test)
                found.append(self.loss_changes(self.final_model, outputs, test.targets, change))
        return torch.stack(found)

    def by_factors(self, test: Instances, left_out: Instances, at_final_model: bool) -> Tensor:
        """Return the scores ``[E, J, L]`` by phi of EK-FAC's eigenvalues.

        Args:
            at_final_model: else at the mean of the seeds' parameters at each point.
        """
        if at_final_model:
            pace = 1.0
            if self.rule.preconditions:
                pace = self.rule.mean_pace(self._estimated_preconditioner())
            return self._by_factors_at(self.final_model, test, left_out, [pace * t for t in self.time])
        shares, runs = self._shares(), len(self.ft.seeds)
        means: dict[int, dict[str, Tensor]] = {}
        paces = dict.fromkeys((k for k, _ in shares), 0.0 if self.rule.preconditions else 1.0)
        for trajectory in self.ft.full_runs():
            for k, _ in shares:
                mean = means.setdefault(
                    k, {n: torch.zeros_like(p) for n, p in trajectory.parameters[k].items()}
                )
                for name, own in trajectory.parameters[k].items():
                    mean[name] += own / runs
                if trajectory.second_moment is not None:
                    diagonal = preconditioner(self.rule, dict(trajectory.second_moment[k]))
                    assert diagonal is not None
                    paces[k] += self.rule.mean_pace(diagonal) / runs
        found = []
        for k, mine in shares:
            model, time = with_parameters(self.final_model, means[k]), [paces[k] * self.time[e] for e in mine]
            found.append(self._by_factors_at(model, test, left_out, time))
        return torch.cat(found)

    def of_themselves(self) -> Tensor:
        """Return the training instances' scores for their own losses ``[N]``, after all further training.

        By phi of EK-FAC's eigenvalues at the final model, in a time linear in N.
        """
        pace = 1.0
        if self.rule.preconditions:
            pace = self.rule.mean_pace(self._estimated_preconditioner())
        phi = relaxation(pace * self.time[-1], self.rule.flow_decay)
        gradients = InstanceGradients(self.final_model, self.memory_mb)
        found = own_response(self.final_model, self.train, phi, self.copies, gradients)
        self.gradient_evaluations += gradients.evaluations
        return found

    def _shares(self) -> list[tuple[int, list[int]]]:
        """Return points of a run at which curvature is taken, each with the evaluation points nearest to it.

        Points count from the final model (0), evaluation points from the first.
        """
        points = spread(self.ft.steps, self.segments)
        distances = (torch.tensor(points) - torch.arange(1, len(self.time) + 1)[:, None]).abs()
        nearest = [points[k] for k in distances.argmin(1).tolist()]
        return [(k, [e for e, near in enumerate(nearest) if near == k]) for k in points]

    def _relaxed(
        self,
        model: FinalModel,
        test: Instances,
        left_out: Instances,
        time: Sequence[float],
        weight: Tensor | None,
    ) -> list[Tensor]:
        """Return the changes ``[J·D, L]`` of test outputs, J_j P^½ phi(P^½ G P^½) P^½ g_i / N, per time."""
        gradients = InstanceGradients(model, self.memory_mb)
        scale = None if weight is None else weight.sqrt()
        spectrum = KernelSpectrum(model, self.train, gradients, column_scale=scale)
        pair = spectrum.pair(gradients.outputs(test), gradients.losses(left_out))
        self.gradient_evaluations += gradients.evaluations
        n = len(self.train)
        found = [pair.apply(relaxation(t, self.rule.flow_decay))[..., 0].flatten(0, 1) / n for t in time]
        return [change * self.copies.to(change) for change in found]

    def _by_factors_at(
        self, model: FinalModel, test: Instances, left_out: Instances, time: Sequence[float]
    ) -> Tensor:
        gradients = InstanceGradients(model, self.memory_mb)
        factors = fit_factors(gradients, self.train)
        outputs = model.outputs(test)
        by_outputs = self.propagate == "outputs" and outputs[0].numel() <= MAX_EXACT_OUTPUTS
        rows = gradients.outputs(test) if by_outputs else gradients.measurements(test)
        phis = [relaxation(t, self.rule.flow_decay) for t in time]
        changes = kronecker_response(factors, rows, gradients.losses(left_out), phis, self.memory_mb)
        self.gradient_evaluations += gradients.evaluations
        flat = changes.flatten(1, 2) / len(self.train) * self.copies.to(changes)
        if not by_outputs:  # changes of losses themselves
            return flat
        return torch.stack([self.loss_changes(model, outputs, test.targets, c) for c in flat])

    def _estimated_preconditioner(self) -> Tensor:
        """Return Adam's diagonal near the final model; a batch's squared gradient is mean^2 + var / B."""
        gradients = InstanceGradients(self.final_model, self.memory_mb)
        rows, n = gradients.losses(self.train), len(self.train)
        mean = rows.transposed_times(torch.ones(n, 1, 1, dtype=rows.dtype, device=rows.device))[:, 0] / n
        square = torch.zeros_like(mean)
        for piece in rows.pieces():
            square += piece.dense().square().sum((0, 1))
        variance = (square / n - mean.square()).clamp(min=0)
        self.gradient_evaluations += gradients.evaluations
        size = min(self.ft.protocol.batch_size, n)
        return 1 / self.rule.denominator(mean.square() + variance / size)
