"""Influence by conjugate gradients."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows, StreamedRows
from fimo.curvature.kronecker import KroneckerFactors, fit_factors
from fimo.curvature.krylov_spaces import ParameterSpace, Space, SpectralSpace
from fimo.curvature.operators import GaussNewton, Operator, RowsOperator
from fimo.curvature.solvers import Solution, conjugate_gradients
from fimo.curvature.spectrum import KernelSpectrum
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod
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


class IterativeMethod(CurvatureMethod):
    """An influence function whose damped inverse is found by iteration on the test gradients.

    Attributes:
        residuals: the largest relative residual for each damping of the last call.
        iterations: that each damping took.
    """

    residuals: tuple[float, ...] = ()
    iterations: tuple[int, ...] = ()

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self.__dict__.pop("spectrum", None)
        outputs = final_model.outputs(train[:1])[0].numel()
        self.by_rows = outputs <= MAX_ROWS
        if self.by_rows:
            self.rows = self.gradients.gauss_newton(train)
        # rows that don't stay in memory cost more to make anew for each product than the network's passes
        stays = self.by_rows and not isinstance(self.rows, StreamedRows)
        self.operator: Operator = (
            RowsOperator(self.rows) if stays else GaussNewton(final_model, train, count=self.gradients.count)
        )

    def mean_eigenvalue(self) -> float:
        rows = RowsOperator(self.rows) if self.by_rows else self.operator
        return gauss_newton_trace(self.gradients, self.train, rows) / self.final_model.size

    def space(self, left: Rows) -> Space:
        """Return where to iterate on the rows ``left``: iterates are the same, steps differ in cost."""
        if self.by_rows and min(self.final_model.size, self.rows.n * self.rows.r) <= MAX_SPECTRAL:
            return SpectralSpace(self.spectrum, left)
        return ParameterSpace(self.operator, left)

    @functools.cached_property
    def spectrum(self) -> KernelSpectrum:
        """The eigendecomposition of the curvature, made once where it is used."""
        return KernelSpectrum(self.final_model, self.train, self.gradients, self.rows)

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Tensor:
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
        self.residuals, self.iterations = tuple(residuals), tuple(iterations)
        return torch.cat(found, 1)

    def iterate(self, space: Space, part: Rows, damping: float) -> Solution:
        """Return the solution for one damping."""
        raise NotImplementedError


class ConjugateGradients(IterativeMethod):
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
        precondition: ``none`` or ``ekfac``, which takes more iterations than none on small networks (1.2 to 3
            times as many in our trials), where few eigenvalues are large and the layers are strongly coupled.
    """

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

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self.factors: KroneckerFactors | None = None
        if self.precondition == "ekfac":
            self.factors = fit_factors(self.gradients, train)

    def space(self, left: Rows) -> Space:
        # a preconditioner is one of parameter space
        return super().space(left) if self.factors is None else ParameterSpace(self.operator, left)

    def iterate(self, space: Space, part: Rows, damping: float) -> Solution:
        precondition: Callable[[Tensor], Tensor] | None = None
        if self.factors is not None:
            precondition = _inverse(self.factors, damping)

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


def _inverse(factors: KroneckerFactors, damping: float) -> Callable[[Tensor], Tensor]:
    return lambda vectors: factors.solve(vectors, torch.tensor([damping]))[0]
