"""LESS."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo.curvature.adam_steps import AdamSteps, Moments, moments_of
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows, Rows
from fimo.curvature.projected_gradients import ProjectedGradients, RemadeGradients
from fimo.curvature.projection import RandomProjection
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.projected import Projected, ProjectedRowsMethod, side_by_side
from fimo.methods.tracin import models_at, rates_of
from fimo.models.final_model import FinalModel
from fimo.scores import Access, Scores

CODE = ("fimo.curvature.gradients", "fimo.curvature.adam_steps")
"""That computes projected steps."""


class Less(ProjectedRowsMethod):
    """Cosine of a test gradient and the step of Adam that a training instance makes (Xia et al., 2024, LESS).

    With m and v Adam's moments at a checkpoint θ_c and g the loss gradients there,

        score[j, i] = sum_c lr_c cos(g_j, Γ_i),
        Γ_i = (β1 m + (1 - β1) g_i) / (sqrt(β2 v + (1 - β2) g_i^2) + eps),

    the training gradient as Adam takes it, entry by entry, and both of unit length, so that long sequences
    and large losses don't win by their size. The paper reads m and v from the optimizer of a short training;
    here they are what they become at θ_c after many steps: the mean training gradient, and the mean square of
    a batch's mean gradient, of batches drawn without replacement.

    Args:
        dimension: of a random projection of g_j and Γ_i, between which the cosines then are (8192 in the
            paper); null: none.
        batch_size: B of training, whose noise v contains; N where there are fewer instances.
        beta1, beta2, eps: of Adam.
        checkpoints: files (Lightning, plain state_dict, safetensors) or state_dicts; the final model alone
            when None.
        lr: the learning rate at each checkpoint, or one for all.
        seed: of the projection.
        storage: type in which steps are kept; the model's when None.
        cache: a folder that keeps the steps of unit length (with a projection ``dimension`` numbers each,
            else as many as there are parameters), for other runs and test instances.
    """

    needs = "checkpoints of training, if there are any"
    cost = "one gradient per instance and checkpoint, of which the training ones are formed"
    use = "choosing data for a network that Adam fine-tunes"

    def __init__(
        self,
        dimension: int | None = None,
        batch_size: int = 32,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        checkpoints: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
        lr: float | Sequence[float] = 1.0,
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(memory_mb, storage, cache)
        for key, count in (("dimension", dimension), ("batch_size", batch_size)):
            if count is not None and count < 1:
                raise InputError(key, f"expected at least 1 but got {count}")
        for key, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise InputError(key, f"expected a number from 0 to below 1 but got {beta}")
        if eps <= 0:
            raise InputError("eps", f"expected a positive number but got {eps}")
        self.dimension, self.batch_size, self.seed = dimension, batch_size, seed
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.checkpoints = None if checkpoints is None else list(checkpoints)
        self.rates = rates_of(self.checkpoints, lr)

    @property
    def access(self) -> Access:
        return Access.FINAL_MODEL if self.checkpoints is None else Access.CHECKPOINTS

    def models(self, final_model: FinalModel) -> Iterator[FinalModel]:
        yield from models_at(final_model, self.checkpoints)

    def projected(self, gradients: InstanceGradients, train: Instances, checkpoint: int) -> Projected:
        return self._steps(gradients, train, self._random(gradients))

    def scores(self, problem: AttributionProblem) -> Scores:
        total, evaluations = self._sums(problem, self._sides(problem))
        return self.result(problem, total, gradient_evaluations=evaluations)

    def extreme_scores(self, problem: AttributionProblem, k: int) -> Scores | None:
        if self.cache is None and len(self.rates) > 1:
            return None
        sides = list(self._sides(problem))
        if not all(side.in_memory for side in sides):
            return None
        queries = torch.cat([side.test.dense()[:, 0] * side.factor[:, None] for side in sides], 1)
        blocks = side_by_side([side.train for side in sides], problem.left_out)
        some = self.at_the_ends(problem, queries, blocks, k)
        total, evaluations = self._sums(some, sides)
        return self.result(some, total, gradient_evaluations=evaluations, ranks=k)

    def _sums(self, problem: AttributionProblem, sides: Iterable[_Sides]) -> tuple[Tensor, int]:
        """Return the scores ``[J, L]``, and the gradients that were evaluated for them."""
        total = torch.zeros(len(problem.test), len(problem.index)).to(
            problem.train.targets.device, problem.dtype
        )
        evaluations = 0
        for side in sides:
            start = 0
            for directions, _ in side.train.chosen(problem.left_out):
                total[:, start : start + len(directions)] += side.products(directions)
                start += len(directions)
            evaluations += side.gradients.evaluations
        return total, evaluations

    def _sides(self, problem: AttributionProblem) -> Iterator[_Sides]:
        """Yield what is multiplied at each checkpoint."""
        for model, rate in zip(self.models(problem.final_model), self.rates, strict=True):
            gradients = self.gradients(model)
            projection = self._random(gradients)
            steps = self._steps(gradients, problem.train, projection)
            if self.cache is None:  # they are used once
                train: ProjectedGradients = RemadeGradients(problem.train, steps.project, steps.width)
            else:
                train = self.rows(gradients, problem.train, steps)
            test = gradients.measurements(problem.test, "layers")
            if projection is not None:
                test = DenseRows(projection(test), {"projected": torch.Size([projection.k])})
            elif test.n * test.p * test.dtype.itemsize <= gradients.memory / 4:
                test = DenseRows(test.dense(), test.shapes)
            lengths = test.squared_norms()[:, 0].sqrt()
            yield _Sides(gradients, test, rate * (lengths > 0) / lengths.where(lengths > 0, 1), train)

    def _random(self, gradients: InstanceGradients) -> RandomProjection | None:
        if self.dimension is None:
            return None
        return RandomProjection(gradients.p, self.dimension, "auto", self.seed, self.memory_mb / 2)

    def _steps(
        self, gradients: InstanceGradients, train: Instances, projection: RandomProjection | None
    ) -> Projected:
        settings: dict[str, Any] = {"batch_size": self.batch_size, "eps": self.eps}
        settings |= {"beta1": self.beta1, "beta2": self.beta2}
        if projection is not None:
            settings |= {"dimension": projection.k, "entries": projection.kind, "seed": self.seed}

        @functools.cache
        def all_gradients() -> Rows:
            return gradients.losses(train, "layers")

        @functools.cache
        def steps() -> AdamSteps:
            def both() -> Tensor:
                moments = moments_of(all_gradients(), self.batch_size)
                return torch.stack([moments.first, moments.second])

            batches = {"batch_size": self.batch_size}
            first, second = self.kept(gradients, train, "moments", batches, CODE, both)
            return AdamSteps(self.beta1, self.beta2, self.eps, Moments(first, second))

        def project(instances: Instances) -> Iterator[Tensor]:
            made = steps()
            rows = all_gradients() if instances is train else gradients.losses(instances, "layers")
            yield from made.directions(rows, projection, self.memory_mb)

        width = gradients.p if projection is None else projection.k
        return Projected(project, width, "steps", settings, CODE)


@dataclass(frozen=True)
class _Sides:
    """What is multiplied at a checkpoint.

    Args:
        gradients: there.
        test: gradients, projected where a projection was asked for.
        factor: ``[J]``, the learning rate over each one's length.
        train: steps of unit length.
    """

    gradients: InstanceGradients
    test: Rows
    factor: Tensor
    train: ProjectedGradients

    @property
    def in_memory(self) -> bool:
        return isinstance(self.test, DenseRows)

    def products(self, directions: Tensor) -> Tensor:
        """Return ``[J, n]`` of directions ``[n, K]``."""
        return self.test.times(directions.to(self.test.dtype).T)[:, 0] * self.factor[:, None]
