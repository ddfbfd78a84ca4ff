"""TRAK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fimo.curvature.cotangents import GradientOf
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.projection import Projection, project
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import Damping, DampingValue
from fimo.methods.gradient import GradientMethod
from fimo.methods.tracin import models_at
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss
from fimo.scores import Access, Scores


class Trak(GradientMethod):
    """Influence in a linear model of randomly projected gradients of a scalar output (Park et al., 2023).

    With f the scalar that the loss is a function of (log-odds of the correct class, a regression's output),
    φ = projected gradient of f, Φ those of the N training instances and q = dloss/df,

        score[j, i] = q_j φ_j^T (Φ^T Φ + N damping)^-1 φ_i q_i,

    where f_j and q are averaged over checkpoints separately, as the paper averages its ensemble. The paper
    scores f_j itself, without q_j, a factor common to all i: the order of scores is the same, and with q_j
    their sign is that of the loss. Other losses take f to be the loss.

    Args:
        dimension: k of the projection.
        damping: of Φ^T Φ / N: ``auto``, 0.1 mean eigenvalues; a multiple of the mean squared gradient of f; a
            number. The paper has none and needs N > k.
        projection: ``normal``, ``sign``, ``sparse``, or ``auto`` by size.
        checkpoints: of the training, files or state_dicts; the final model alone when None.
        seed: of the projection; each checkpoint has its own.
    """

    needs = "classes, or values of small dimension; more models of the same training if there are any"
    cost = "one projected gradient per instance"
    use = "many test instances, when memory is short"

    def __init__(
        self,
        dimension: int = 512,
        damping: DampingValue = "auto",
        projection: Projection = "auto",
        checkpoints: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        if dimension < 1:
            raise InputError("dimension", f"expected at least 1 but got {dimension}")
        if projection not in ("auto", "normal", "sign", "sparse"):
            raise InputError(
                "projection", f"expected one of auto, normal, sign, sparse but got {projection!r}"
            )
        if checkpoints is not None and len(checkpoints) == 0:
            raise InputError("checkpoints", "expected at least one checkpoint or null")
        self.dimension, self.projection, self.seed = dimension, projection, seed
        self.damping = Damping.parse(damping)
        if self.damping.kind == "time_matched":
            raise InputError("damping", "TRAK's kernel has no unit of time; expected a number, 1x or auto")
        self.checkpoints = checkpoints

    @property
    def access(self) -> Access:
        return Access.FINAL_MODEL if self.checkpoints is None else Access.CHECKPOINTS

    def scores(self, problem: AttributionProblem) -> Scores:
        models = models_at(problem.final_model, self.checkpoints)
        kernels, ours, theirs, evaluations = [], [], [], 0
        for c, model in enumerate(models):
            gradients = self.gradients(model)
            kernels.append(self._kernel(gradients, problem, self.seed + c))
            ours.append(self._explained(model, problem.test))
            theirs.append(_slope(model, problem.removed))
            evaluations += gradients.evaluations
        kernel = torch.stack(kernels).mean(0)
        q_test, q_removed = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
        values = (q_test[:, None] * kernel * q_removed).to(problem.dtype)
        return self.result(problem, values, gradient_evaluations=evaluations)

    def _kernel(self, gradients: InstanceGradients, problem: AttributionProblem, seed: int) -> Tensor:
        """Return ``φ_j^T (Φ^T Φ + N damping)^-1 φ_i`` ``[J, L]`` in float64."""
        model = gradients.final_model
        scalar = Loss.of(model.loss.scalar_output)

        def projected(instances: Instances, function: Loss, name: str) -> Tensor:
            rows = gradients.rows(instances, GradientOf(function), name)
            found = project(rows, self.dimension, self.projection, seed, self.memory_mb / 2)
            return found[:, 0].double()

        features = projected(problem.train, scalar, "scalar")
        removed = features if problem.left_out is None else projected(problem.removed, scalar, "scalar")
        explained = projected(
            problem.test, model.measurement or scalar, "measurement" if model.measurement else "scalar"
        )
        n, k = features.shape
        mean_square = features.square().sum(1).mean().item()
        damping = self.damping.resolve(mean_square / model.size, mean_square / k).item()
        if n >= k:
            matrix = features.T @ features / n
            matrix.diagonal().add_(damping)
            solved: Tensor = torch.linalg.solve(matrix, removed.T)
            return explained @ solved / n
        # the same by the N x N matrix (Woodbury)
        matrix = features @ features.T / n
        matrix.diagonal().add_(damping)
        solved = torch.linalg.solve(matrix, features @ removed.T)
        return (explained @ removed.T - (explained @ features.T) @ solved / n) / damping / n

    def _explained(self, model: FinalModel, test: Instances) -> Tensor:
        """Return the factor of each test instance: q_j, or 1 where a measurement is explained."""
        return torch.ones_like(_slope(model, test)) if model.measurement else _slope(model, test)


def _slope(model: FinalModel, instances: Instances) -> Tensor:
    """Return q = dloss/df ``[n]`` in float64."""
    return model.loss.scalar_slope(model.outputs(instances).double(), instances.targets)
