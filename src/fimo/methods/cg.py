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
from fimo.curvature.krylov_inverses import KernelInverse, KrylovInverse, ParameterInverse, kernel_pays
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
        parts = [b.part(s, s + size) for b in left.blocks() for s in range(0, b.n, size)]
        found = [self.solved_part(part, right, dampings.tolist()) for part in parts]
        return Solved(
            torch.cat([f.values for f in found], 1),
            tuple(r for f in found for r in f.residuals),
            tuple(k for f in found for k in f.iterations),
        )

    def solved_part(self, part: Rows, right: Rows, dampings: list[float]) -> Solved:
        """Return :meth:`solve` of rows whose solutions fit into memory together."""
        space = self.space(part)
        solutions = [self.iterate(space, part, damping) for damping in dampings]
        products = [space.against(s.vectors, right)[..., 0] for s in solutions]
        return Solved(
            torch.stack([p.view(part.n, part.r, right.n) for p in products]),
            tuple(s.residuals.max().item() for s in solutions),
            tuple(s.iterations for s in solutions),
        )

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

    score[j, i] = (1/N) x_j^T g_i with (G + damping I) x_j = g_j. All test instances and dampings share one
    block Krylov space (:mod:`~fimo.curvature.krylov_inverses`), which grows until each residual is within the
    tolerance; an iteration is a product of the whole mean G with a vector for each test instance, so the size
    of batches changes nothing. At convergence the scores are those of ``exact``.

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
    cost = "some ten products of the curvature with a vector for each test instance"
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
        precondition = None if self.factors is None else inverse_of(self.factors, damping)
        return self._solution(space, damping, precondition)

    def solved_part(self, part: Rows, right: Rows, dampings: list[float]) -> Solved:
        if self.factors is not None or self.spectral:  # where a step costs next to nothing
            return super().solved_part(part, right, dampings)
        memory = self.memory_mb * 2**20
        inverse: KrylovInverse
        if self.by_rows and kernel_pays(self.own_rows, part.n * part.r, memory):
            inverse = KernelInverse(self.own_rows, self.kernel, part, right)
            most = 2 * len(self.kernel)  # more than there are: memory for as many as rows was asked for
        else:
            inverse = ParameterInverse(self.operator, part, right)
            most = int(memory / (2 * part.p * part.dtype.itemsize))
        blocks = inverse.grow(dampings, self.tolerance, self.max_iterations, most)
        residuals = [inverse.residuals(damping).max().item() for damping in dampings]
        out_of_memory = blocks < self.max_iterations and not inverse.krylov.exhausted
        if isinstance(inverse, ParameterInverse) and out_of_memory and max(residuals) > self.tolerance:
            return self._from_krylov(inverse, blocks, part, right, dampings)
        for damping, residual in zip(dampings, residuals, strict=True):
            # an exhausted space leaves rounding errors only
            self._warned(residual, blocks, damping, residual <= self.tolerance or inverse.krylov.exhausted)
        products = inverse.products(dampings)[..., 0].unflatten(1, (part.n, part.r))
        return Solved(products, tuple(residuals), (blocks,))

    @functools.cached_property
    def kernel(self) -> Tensor:
        """The kernel of the rows, made once where it is used."""
        return self.own_rows.kernel()

    def _from_krylov(
        self, inverse: ParameterInverse, blocks: int, part: Rows, right: Rows, dampings: list[float]
    ) -> Solved:
        """Go on by three vectors for each right-hand side where memory holds no larger Krylov space."""
        space = ParameterSpace(self.operator, part)
        found, residuals, iterations = [], [], []
        for damping in dampings:
            start = inverse.krylov.combine(inverse.coefficients(damping))
            solution = self._solution(space, damping, None, start, blocks)
            residuals.append(solution.residuals.max().item())
            iterations.append(blocks + solution.iterations)
            found.append(space.against(solution.vectors, right)[..., 0].view(part.n, part.r, right.n))
        return Solved(torch.stack(found), tuple(residuals), tuple(iterations))

    def _solution(
        self,
        space: Space,
        damping: float,
        precondition: Callable[[Tensor], Tensor] | None = None,
        start: Tensor | None = None,
        made: int = 0,
    ) -> Solution:
        most = self.max_iterations - made
        solution = conjugate_gradients(space, damping, self.tolerance, most, precondition, start)
        steps = made + solution.iterations
        self._warned(solution.residuals.max().item(), steps, damping, solution.converged)
        return solution

    def _warned(self, residual: float, steps: int, damping: float, converged: bool) -> None:
        if not converged:
            log.warning(
                "conjugate gradients: the largest residual is %.2g of its right-hand side after %d steps "
                "(damping %.3g)",
                residual,
                steps,
                damping,
            )


def inverse_of(factors: KroneckerFactors, damping: float, power: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return the product of vectors ``[P, K]`` with a power of the damped factors' inverse."""
    return lambda vectors: factors.solve(vectors, torch.tensor([damping]), power=power)[0]
