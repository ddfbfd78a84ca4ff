"""Exact influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.cotangents import Cotangents, GradientOf
from fimo.curvature.jacobian import Rows
from fimo.curvature.spectrum import MAX_DIMENSION, KernelSpectrum, Phi, kernel_dimension
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import Solved
from fimo.methods.rescaled import RescalableCurvature, RescalableInfluence
from fimo.models.final_model import FinalModel
from fimo.models.losses import Loss


class ExactInfluence(RescalableInfluence):
    """Influence function with the whole damped Gauss-Newton matrix (Koh and Liang, 2017).

    score[j, i] = (1/N) g_j^T (G + damping I)^-1 g_i, by an eigendecomposition of G or of its N·R x N·R
    kernel, whichever is smaller; a sweep over dampings, and ``time_matched`` for all evaluation
    points, reuse it.

    Args:
        damping, propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`.
        curvature: ``gauss_newton`` or ``empirical`` (the empirical Fisher, of the training gradients).
        rescaled: take the left-out instance's own curvature away with it, see
            :class:`~fimo.methods.rescaled.RescalableInfluence`.
        max_dimension: the largest eigenproblem that is tried; beyond it the method doesn't apply.
    """

    needs = "further training to match, or a damping"
    cost = "an eigendecomposition of min(P, N x outputs) squared"
    use = "small networks: what every approximation of influence functions aims at"

    def __init__(
        self,
        damping: DampingValue = "time_matched",
        propagate: Literal["loss", "outputs"] = "loss",
        curvature: Literal["gauss_newton", "empirical"] = "gauss_newton",
        rescaled: bool = False,
        max_dimension: int = MAX_DIMENSION,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(damping, propagate, rescaled, memory_mb, storage, cache)
        if curvature not in ("gauss_newton", "empirical"):
            raise InputError("curvature", f"expected one of gauss_newton, empirical but got {curvature!r}")
        self.curvature, self.max_dimension = curvature, max_dimension

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        dimension = kernel_dimension(final_model, train)
        if self.curvature == "empirical":
            dimension = min(dimension, len(train))
        if dimension <= self.max_dimension:
            return None
        return f"its eigenproblem is {dimension} x {dimension} (max_dimension={self.max_dimension})"

    def fit(self, final_model: FinalModel, train: Instances) -> Decomposed:
        if reason := self.inapplicable(final_model, train):
            raise InputError("method.exact", reason)
        gradients = self.gradients(final_model)
        empirical = self.curvature == "empirical"
        rows = gradients.losses(train) if empirical else None
        return Decomposed(gradients, train, KernelSpectrum(final_model, train, gradients, rows), empirical)


@dataclass(frozen=True)
class Decomposed(RescalableCurvature):
    """A curvature by its eigenvalues and eigenvectors.

    Args:
        empirical: whether it is the empirical Fisher, else Gauss-Newton.
    """

    spectrum: KernelSpectrum
    empirical: bool

    def mean_eigenvalue(self) -> float:
        return self.spectrum.mean_eigenvalue

    def root(self, loss: Loss) -> Cotangents:
        return GradientOf(loss) if self.empirical else loss.hessian_root

    def own(self, rows: Rows, dampings: Tensor) -> Tensor:
        along = self.spectrum.coordinates(rows)
        values, phis = self.spectrum.eigenvalues, [inverse(damping) for damping in dampings.tolist()]
        if self.spectrum.complete:
            return torch.stack([(along * phi(values)) @ along.mT for phi in phis])
        inner, zero = rows.to(torch.float64).own_gram(), torch.zeros_like(along[0, 0, :1])
        return torch.stack(
            [(along * (phi(values) - phi(zero))) @ along.mT + phi(zero) * inner for phi in phis]
        )

    def combined(self, left: Rows, right: Rows, weights: Tensor, dampings: Tensor) -> Solved:
        pair = self.spectrum.pair(left, right)
        each = zip(weights.to(torch.float64), dampings.tolist(), strict=True)
        return Solved(torch.stack([(pair.apply(inverse(d)) * weight).sum(-1) for weight, d in each]))


def inverse(damping: float) -> Phi:
    """Return the spectral function of a damped inverse, 1 / (c + damping)."""
    return lambda c: 1 / (c + damping)
