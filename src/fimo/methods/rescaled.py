"""Rescaled influence functions: the curvature that remains when an instance leaves, by its leverage."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.cotangents import Cotangents
from fimo.curvature.jacobian import Rows
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod, FittedCurvature, Solved
from fimo.models.losses import Loss


class RescalableInfluence(CurvatureMethod):
    """Influence that can take an instance's own curvature away with it (Rubinstein and Hopkins, 2025).

    The quadratic objective of the training set without i has the curvature C - A_i^T A_i / N, where A_i are
    i's rows of C. With ``rescaled``, the score is its Newton step,

        score[j, i] = (1/N) g_j^T (C + damping I - A_i^T A_i / N)^-1 g_i,

    by Woodbury's identity from the inverse for all i: a model of one output gets its score divided by
    1 - h_i, h_i = A_i (C + damping I)^-1 A_i^T / N the leverage; one of several, the inverse of that matrix.
    Leaving one instance out of least squares (with an L2 penalty) is then exact, also where parameters are
    as many as instances and influence functions say far too little.

    Args:
        rescaled: take the curvature away; see :class:`~fimo.methods.gradient.CurvatureMethod` for the others.
    """

    def __init__(
        self,
        damping: DampingValue,
        propagate: Literal["loss", "outputs"],
        rescaled: bool,
        memory_mb: float,
        storage: str | None,
        cache: str | None,
    ) -> None:
        super().__init__(damping, propagate, memory_mb, storage, cache)
        self.rescaled = rescaled

    def solved(
        self, curvature: FittedCurvature, left: Rows, problem: AttributionProblem, dampings: Tensor
    ) -> Solved:
        if not self.rescaled:
            return super().solved(curvature, left, problem, dampings)
        assert isinstance(curvature, RescalableCurvature)
        rows, weights = remaining(curvature, problem.removed, dampings)
        return curvature.combined(left, rows, weights, dampings)


@dataclass(frozen=True)
class RescalableCurvature(FittedCurvature):
    """A curvature that says what it makes of each instance's own rows."""

    @abstractmethod
    def root(self, loss: Loss) -> Cotangents:
        """Return the cotangents whose rows A_i make up the curvature: C = (1/N) sum_i A_i^T A_i."""

    @abstractmethod
    def own(self, rows: Rows, dampings: Tensor) -> Tensor:
        """Return ``rows_i (C + damping)^-1 rows_i^T`` of each instance, ``[E, n, R, R]``."""

    @abstractmethod
    def combined(self, left: Rows, right: Rows, weights: Tensor, dampings: Tensor) -> Solved:
        """Return ``left^T (C + damping)^-1`` times sums of each instance's rows.

        Args:
            right: S rows of each of m instances.
            weights: ``[E, m, S]``, of the sums.
        """

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        ones = torch.ones(len(dampings), right.n, 1, dtype=right.dtype, device=right.device)
        return self.combined(left, right, ones, dampings)


def remaining(curvature: RescalableCurvature, removed: Instances, dampings: Tensor) -> tuple[Rows, Tensor]:
    """Return rows ``[L, 1 + R]`` and weights ``[E, L, 1 + R]`` whose sums stand in for the gradients.

    With H = C + damping I, the inverse without i applied to its gradient is that of all applied to another:

        (H - A^T A / N)^-1 g = H^-1 (g + A^T w),    w = (I - A H^-1 A^T / N)^-1 A H^-1 g / N.

    Raises:
        InputError: H - A^T A / N is not positive, so that C is not the sum of its instances' curvatures.
    """
    loss, n = curvature.final_model.loss, len(curvature.train)
    root = curvature.root(loss)

    def gradient_and_root(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([loss.gradient(outputs, targets)[:, None], root(outputs, targets)], 1)

    rows = curvature.gradients.rows(removed, gradient_and_root, "loss_and_curvature")
    own = curvature.own(rows, dampings) / n
    leverage, along = own[..., 1:, 1:], own[..., 1:, :1]
    largest = torch.linalg.eigvalsh((leverage + leverage.mT) / 2)[..., -1]
    if (over := int((largest >= 1).any(0).sum())) > 0:
        raise InputError(
            "rescaled",
            f"{over} of {len(removed)} instances have more curvature than this approximation gives the "
            f"training set along their gradients (a leverage of up to {largest.max().item():.3g}, where less "
            "than 1 is possible), as it happens where parameters outnumber instances; `exact` has it whole, "
            "and more damping helps",
        )
    identity = torch.eye(leverage.shape[-1], dtype=own.dtype, device=own.device)
    weights = torch.linalg.solve(identity - leverage, along)[..., 0]
    return rows, torch.cat([torch.ones_like(weights[..., :1]), weights], -1)
