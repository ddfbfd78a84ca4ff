"""TRAK."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fimo.curvature.cotangents import GradientOf
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.projected_gradients import ProjectedGradients
from fimo.curvature.projection import Projection, RandomProjection
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import Damping, DampingValue
from fimo.methods.projected import Projected, ProjectedRowsMethod, side_by_side
from fimo.methods.tracin import models_at
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss
from fimo.scores import Access, Scores

CODE = ("fimo.curvature.gradients", "fimo.curvature.projection", "fimo.models.loss_function")
"""That computes projected gradients."""


class Trak(ProjectedRowsMethod):
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
        storage: type in which φ are held or kept; the model's when None.
        cache: a folder that keeps φ of the training instances, for other runs, test instances and dampings.
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

    def models(self, final_model: FinalModel) -> Iterator[FinalModel]:
        yield from models_at(final_model, self.checkpoints)

    def projected(self, gradients: InstanceGradients, train: Instances, checkpoint: int) -> Projected:
        return self._scalars(gradients, self._random(gradients, checkpoint))

    def scores(self, problem: AttributionProblem) -> Scores:
        values, evaluations = self._products(problem, self._checkpoints(problem))
        return self.result(problem, values, gradient_evaluations=evaluations)

    def extreme_scores(self, problem: AttributionProblem, k: int) -> Scores | None:
        if self.cache is None and self.checkpoints is not None and len(self.checkpoints) > 1:
            return None
        at = list(self._checkpoints(problem))
        queries = torch.cat([each.queries for each in at], 1) / len(at)
        queries *= torch.stack([each.explained for each in at]).mean(0)[:, None]
        slopes = torch.stack([_slope(each.gradients.final_model, problem.removed) for each in at]).mean(0)
        blocks = side_by_side([each.rows for each in at], problem.left_out, slopes)
        some = self.at_the_ends(problem, queries, blocks, k)
        values, evaluations = self._products(some, at)
        return self.result(some, values, gradient_evaluations=evaluations, ranks=k)

    def _products(self, problem: AttributionProblem, at: Iterable[_Checkpoint]) -> tuple[Tensor, int]:
        """Return the scores ``[J, L]``, and the gradients that were evaluated for them."""
        shape = len(problem.test), len(problem.index)
        kernel = torch.zeros(shape, dtype=torch.float64, device=problem.train.targets.device)
        ours, theirs, evaluations = [], [], 0
        for each in at:
            start = 0
            for rows, _ in each.rows.chosen(problem.left_out):
                kernel[:, start : start + len(rows)] += each.queries @ rows.double().T
                start += len(rows)
            ours.append(each.explained)
            theirs.append(_slope(each.gradients.final_model, problem.removed))
            evaluations += each.gradients.evaluations
        kernel *= torch.stack(ours).mean(0)[:, None]
        kernel *= torch.stack(theirs).mean(0) / len(ours)
        return kernel.to(problem.dtype), evaluations

    def _checkpoints(self, problem: AttributionProblem) -> Iterator[_Checkpoint]:
        for checkpoint, model in enumerate(self.models(problem.final_model)):
            gradients = self.gradients(model)
            projection = self._random(gradients, checkpoint)
            rows = self.rows(gradients, problem.train, self._scalars(gradients, projection))
            function, name = (
                model.measurement or _scalar(model),
                "measurement" if model.measurement else "scalar",
            )
            test = projection(gradients.rows(problem.test, GradientOf(function), name))[:, 0].double()
            slope = _slope(model, problem.test)
            explained = torch.ones_like(slope) if model.measurement else slope
            yield _Checkpoint(gradients, self._queries(model, rows, test), explained, rows)

    def _queries(self, model: FinalModel, rows: ProjectedGradients, test: Tensor) -> Tensor:
        """Return ``φ_j^T (Φ^T Φ + N damping)^-1`` ``[J, k]`` of the test instances' φ ``[J, k]``, float64."""
        n, k = rows.n, rows.width
        features = torch.cat([some.double() for some, _ in rows.blocks()]) if n < k else None
        (squares,) = [features @ features.T] if features is not None else rows.second_moments([k])
        mean_square = squares.diagonal().sum().item() / n
        damping = self.damping.resolve(mean_square / model.size, mean_square / k).item()
        matrix = squares / n
        matrix.diagonal().add_(damping)
        if features is None:
            solved: Tensor = torch.linalg.solve(matrix, test.T)
            return solved.T / n
        # the same by the N x N matrix (Woodbury)
        solved = torch.linalg.solve(matrix, features @ test.T)
        return (test - solved.T @ features / n) / damping / n

    def _random(self, gradients: InstanceGradients, checkpoint: int) -> RandomProjection:
        seed = self.seed + checkpoint
        return RandomProjection(gradients.p, self.dimension, self.projection, seed, self.memory_mb / 2)

    def _scalars(self, gradients: InstanceGradients, projection: RandomProjection) -> Projected:
        function = GradientOf(_scalar(gradients.final_model))

        def project(instances: Instances) -> Iterator[Tensor]:
            for block in projection.blocks(gradients.rows(instances, function, "scalar")):
                yield block[:, 0]

        settings = {"dimension": projection.k, "entries": projection.kind, "seed": projection.seed}
        return Projected(project, projection.k, "scalar", settings, CODE)


@dataclass(frozen=True)
class _Checkpoint:
    """What scores are made of at a checkpoint.

    Args:
        gradients: there.
        queries: ``[J, k]`` float64, whose products with rows are the kernel.
        explained: ``[J]``, the factor of each test instance: q_j, or 1 where a measurement is explained.
        rows: φ of the training instances.
    """

    gradients: InstanceGradients
    queries: Tensor
    explained: Tensor
    rows: ProjectedGradients


def _scalar(model: FinalModel) -> Loss:
    return Loss.of(model.loss.scalar_output)


def _slope(model: FinalModel, instances: Instances) -> Tensor:
    """Return q = dloss/df ``[n]`` in float64."""
    return model.loss.scalar_slope(model.outputs(instances).double(), instances.targets)
