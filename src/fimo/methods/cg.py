"""Influence by conjugate gradients."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows, StreamedRows
from fimo.curvature.kronecker import KroneckerFactors, fit_factors, no_factors
from fimo.curvature.krylov_spaces import ParameterSpace, Space, SpectralSpace
from fimo.curvature.operators import GaussNewton, Operator, RowsOperator
from fimo.curvature.solvers import Solution, conjugate_gradients
from fimo.curvature.spectrum import KernelSpectrum
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod, FittedCurvature, Solved
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)

MAX_SPECTRAL = 3000
"""Largest eigenproblem, min(P, N·R), that is solved to iterate on eigenvalues instead of vectors."""

MAX_ROWS = 64
"""Gauss-Newton rows per instance above which products go through the network instead."""


MAX_TRACED = 1024
"""Gauss-Newton rows per instance above which their trace is estimated from random vectors."""


def gauss_newton_trace(gradients: InstanceGradients, train: Instances, operator: Operator) -> float:
    """Return the trace of the Gauss-Newton matrix of the mean training loss: mean_i tr(J_i^T H_i J_i).

    Exact by the squared norms of its rows, in blocks of instances, up to ``MAX_TRACED`` outputs and where one
    instance's rows fit into the memory; else an estimate, whose standard error is logged.

    Args:
        operator: the matrix, by products.
    """
    if isinstance(operator, RowsOperator):
        return operator.trace()
    outputs = gradients.final_model.outputs(train[:1])[0].numel()
    if outputs > MAX_TRACED or outputs * gradients.p * gradients.dtype.itemsize > gradients.memory:
        return operator.trace()
    return RowsOperator(gradients.gauss_newton(train)).trace()


@dataclass(frozen=True)
class IteratedCurvature(FittedCurvature):
    """A curvature whose damped inverse is found by iteration on the test gradients.

    Args:
        operator: the matrix, by products.
        rows: of Gauss-Newton, where instances have few outputs.
        by_rows: whether the matrix is that of ``rows``.
        memory_mb: of a block's vectors.
    """

    operator: Operator
    rows: Rows | None
    by_rows: bool
    memory_mb: float

    def mean_eigenvalue(self) -> float:
        operator = RowsOperator(self.own_rows) if self.by_rows else self.operator
        return gauss_newton_trace(self.gradients, self.train, operator) / self.final_model.size

    @property
    def own_rows(self) -> Rows:
        """The rows of which this is the matrix."""
        assert self.rows is not None
        return self.rows

    @property
    def spectral(self) -> bool:
        """Whether the eigenproblem is small enough to iterate on eigenvalues."""
        return self.by_rows and min(self.final_model.size, self.own_rows.n * self.own_rows.r) <= MAX_SPECTRAL

    def space(self, left: Rows) -> Space:
        """Return where to iterate on the rows ``left``: iterates are the same, steps differ in cost."""
        return SpectralSpace(self.spectrum, left) if self.spectral else ParameterSpace(self.operator, left)

    @functools.cached_property
    def spectrum(self) -> KernelSpectrum:
        """The eigendecomposition of the curvature, made once where it is used."""
        return KernelSpectrum(self.final_model, self.train, self.gradients, self.own_rows)

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        # blocks of right-hand sides: a block's vectors of length P stay within the memory
        size = max(1, int(self.memory_mb * 2**20 / (8 * left.p * left.r * left.dtype.itemsize)))
        found, residuals, iterations = [], [], []
        for block in left.blocks():
            for start in range(0, block.n, size):
                part = block.part(start, start + size)
                space = self.space(part)
                each = []
                for damping in dampings.tolist():
                    solution = self.iterate(space, part, damping)
                    residuals.append(solution.residuals.max().item())
                    iterations.append(solution.iterations)
                    products = space.against(solution.vectors, right)[..., 0]
                    each.append(products.view(part.n, part.r, right.n))
                found.append(torch.stack(each))
        return Solved(torch.cat(found, 1), tuple(residuals), tuple(iterations))

    @abstractmethod
    def iterate(self, space: Space, part: Rows, damping: float) -> Solution:
        """Return the solution for one damping."""


def gauss_newton_products(
    gradients: InstanceGradients, train: Instances
) -> tuple[Operator, Rows | None, bool]:
    """Return the Gauss-Newton matrix by products, its rows where they are few, and whether they are."""
    outputs = gradients.final_model.outputs(train[:1])[0].numel()
    rows = gradients.gauss_newton(train) if outputs <= MAX_ROWS else None
    # rows that don't stay in memory cost more to make anew for each product than the network's passes
    if rows is not None and not isinstance(rows, StreamedRows):
        return RowsOperator(rows), rows, True
    return GaussNewton(gradients.final_model, train, count=gradients.count), rows, rows is not None


class ConjugateGradients(CurvatureMethod):
    """Influence with the damped Gauss-Newton matrix, by conjugate gradients (Martens, 2010).

    score[j, i] = (1/N) x_j^T g_i with (G + damping I) x_j = g_j. All test instances are solved for at
    once, each until its residual is within the tolerance; an iteration is a product with the whole mean G, so
    the size of batches changes nothing. At convergence the scores are those of ``exact``.

    Args:
        damping, propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`; in the paper 1x to 1000x.
            ``auto`` takes the matrix's trace, above 1,024 outputs estimated from 32 random vectors (the log
            gives its standard error).
        tolerance: of the relative residual.
        max_iterations: after which the scores are what they are, with a warning.
        precondition: ``none`` or ``ekfac``, the factors with the same damping (as ASTRA does; Wang et al.,
            2025). It leaves two or three times less after ten or so iterations, where large networks stop;
            to convergence it takes as many or up to twice as many: see :ref:`preconditioned`.
    """

    needs = "further training to match, or a damping"
    cost = "some ten products with the curvature per left-out instance"
    use = "influence functions where `exact` is too large"

    def __init__(
        self,
        damping: DampingValue = "time_matched",
        propagate: Literal["loss", "outputs"] = "loss",
        tolerance: float = 1e-5,
        max_iterations: int = 1000,
        precondition: Literal["none", "ekfac"] = "none",
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(damping, propagate, memory_mb, storage, cache)
        if not 0 < tolerance < 1:
            raise InputError("tolerance", f"expected a number between 0 and 1 but got {tolerance}")
        if max_iterations < 1:
            raise InputError("max_iterations", f"expected at least 1 but got {max_iterations}")
        if precondition not in ("none", "ekfac"):
            raise InputError("precondition", f"expected one of none, ekfac but got {precondition!r}")
        self.tolerance, self.max_iterations, self.precondition = tolerance, max_iterations, precondition

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        return no_factors(final_model, train, "auto") if self.precondition == "ekfac" else None

    def fit(self, final_model: FinalModel, train: Instances) -> ConjugateGradientCurvature:
        gradients = self.gradients(final_model)
        operator, rows, by_rows = gauss_newton_products(gradients, train)
        factors = fit_factors(gradients, train) if self.precondition == "ekfac" else None
        return ConjugateGradientCurvature(
            gradients, train, operator, rows, by_rows, self.memory_mb,
            self.tolerance, self.max_iterations, factors,
        )  # fmt: skip


@dataclass(frozen=True)
class ConjugateGradientCurvature(IteratedCurvature):
    """The Gauss-Newton matrix, inverted by conjugate gradients.

    Args:
        tolerance: of the relative residual.
        max_iterations: after which a solution is what it is.
        factors: of the preconditioner; None for none.
    """

    tolerance: float
    max_iterations: int
    factors: KroneckerFactors | None

    def space(self, left: Rows) -> Space:
        # a preconditioner is one of parameter space
        return super().space(left) if self.factors is None else ParameterSpace(self.operator, left)

    def iterate(self, space: Space, part: Rows, damping: float) -> Solution:
        precondition: Callable[[Tensor], Tensor] | None = None
        if self.factors is not None:
            precondition = inverse_of(self.factors, damping)

        solution = conjugate_gradients(space, damping, self.tolerance, self.max_iterations, precondition)
        if not solution.converged:
            log.warning(
                "conjugate gradients: the largest residual is %.2g of its right-hand side after %d steps "
                "(damping %.3g)",
                solution.residuals.max().item(),
                solution.iterations,
                damping,
            )
        return solution


def inverse_of(factors: KroneckerFactors, damping: float, power: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return the product of vectors ``[P, K]`` with a power of the damped factors' inverse."""
    return lambda vectors: factors.solve(vectors, torch.tensor([damping]), power=power)[0]
