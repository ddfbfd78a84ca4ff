"""LESS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fimo.curvature.jacobian import DenseRows, Rows
from fimo.curvature.projection import project
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.gradient import GradientMethod
from fimo.methods.tracin import models_at, rates_of
from fimo.scores import Access, Scores

STEPS_MB = 24
"""Of training gradients whose steps are made together; larger pieces of memory are slow, being given back."""


class Less(GradientMethod):
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

    def scores(self, problem: AttributionProblem) -> Scores:
        models = models_at(problem.final_model, self.checkpoints)
        total = torch.zeros(len(problem.test), len(problem.index)).to(
            problem.removed.targets.device, problem.dtype
        )
        evaluations = 0
        for model, rate in zip(models, self.rates, strict=True):
            gradients = self.gradients(model)
            rows = gradients.losses(problem.train, "layers")
            moments = moments_of(rows, self.batch_size)
            test = gradients.measurements(problem.test)
            removed = rows if problem.left_out is None else gradients.losses(problem.removed, "layers")
            total += rate * self._cosines(test, removed, moments)
            evaluations += gradients.evaluations
        return self.result(problem, total, gradient_evaluations=evaluations)

    def _cosines(self, test: Rows, removed: Rows, moments: Moments) -> Tensor:
        """Return ``[J, L]``."""
        ours = None if self.dimension is None else project(test, self.dimension, seed=self.seed)[:, 0]
        lengths = test.squared_norms()[:, 0].sqrt() if ours is None else ours.norm(dim=1)
        found = []
        for piece in removed.pieces(min(STEPS_MB, self.memory_mb / 4)):
            steps = self.steps(piece.dense()[:, 0], moments)
            if ours is None:
                products, sizes = test.times(steps.T)[:, 0], steps.norm(dim=1)
            else:
                assert self.dimension is not None
                theirs = project(DenseRows(steps[:, None], test.shapes), self.dimension, seed=self.seed)[:, 0]
                products, sizes = ours @ theirs.T, theirs.norm(dim=1)
            norms = lengths[:, None] * sizes
            found.append(products / norms.where(norms > 0, 1))
        return torch.cat(found, 1)

    def steps(self, gradients: Tensor, moments: Moments) -> Tensor:
        """Return Γ ``[n, P]`` of gradients ``[n, P]``."""
        first = torch.add(self.beta1 * moments.first, gradients, alpha=1 - self.beta1)
        second = torch.addcmul(self.beta2 * moments.second, gradients, gradients, value=1 - self.beta2)
        return first.div_(second.sqrt_().add_(self.eps))


@dataclass(frozen=True)
class Moments:
    """Adam's, each ``[P]``.

    Args:
        first: the mean gradient.
        second: the mean square of a batch's gradient.
    """

    first: Tensor
    second: Tensor


def moments_of(rows: Rows, batch_size: int) -> Moments:
    """Return the moments that Adam's averages have as expectation where parameters hardly move.

    Args:
        rows: the N training gradients.
        batch_size: B; the mean of B of N gradients drawn without replacement has the variance
            (N - B) / (B (N - 1)) times that of one.
    """
    n = rows.n
    batch = min(batch_size, n)
    ones = torch.ones(n, 1, 1, dtype=rows.dtype, device=rows.device)
    mean = rows.transposed_times(ones)[:, 0] / n
    square = rows.squares().transposed_times(ones)[:, 0] / n
    variance = (square - mean.square()).clamp(min=0)
    return Moments(mean, mean.square() + variance * ((n - batch) / (batch * max(1, n - 1))))
