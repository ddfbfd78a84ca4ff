"""Influence by LiSSA, with the Gauss-Newton matrix or the Hessian."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.hessian import hessian
from fimo.curvature.jacobian import Rows
from fimo.curvature.kronecker import KroneckerFactors, fit_factors, no_factors
from fimo.curvature.krylov import KrylovSpace
from fimo.curvature.krylov_spaces import KernelSpace, ParameterSpace, Space, SpectralSpace
from fimo.curvature.linear_products import LinearHessian
from fimo.curvature.operators import GaussNewton, Hessian, RowsOperator
from fimo.curvature.solvers import (
    DivergenceError,
    Extremes,
    Solution,
    extreme_eigenvalues,
    lissa,
    lissa_in_krylov_space,
    lissa_on_spectrum,
)
from fimo.curvature.spectrum import MAX_DIMENSION
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.cg import IteratedCurvature, gauss_newton_products, gauss_newton_trace, inverse_of
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)

MAX_STEPS = 5000
"""Steps that are taken one by one where no depth is given."""

LANCZOS_STEPS, MOST_LANCZOS_STEPS = 30, 300
"""Most products for the extreme eigenvalues, of one vector each, with little and with enough memory."""


class Lissa(CurvatureMethod):
    """Influence by the truncated Neumann series of LiSSA (Agarwal et al., 2017; Koh and Liang, 2017).

    score[j, i] = (1/N) x_j^T g_i with x_j = lim x_t / scale,
    x_t = g_j + (I - (C + damping) / scale) x_{t-1}. At convergence the scores are those of ``exact``; fewer
    steps act like further training that stops early, directions of little curvature last.

    Without batches x_t is a polynomial in C applied to g_j, and it is evaluated as one instead of taking the
    steps: on the eigenvalues of C where it can be decomposed (exact), else in a block Krylov space that all
    test instances share, up to ``tolerance`` (see
    :func:`~fimo.curvature.solvers.lissa_in_krylov_space`). With batches, as first proposed, the steps are
    taken; their expectation over batches is the x_t without.

    Args:
        damping, propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`; the paper has 1x to 1000x.
            ``auto`` takes the matrix's trace, above 1,024 outputs estimated from 32 random vectors.
        curvature: ``gauss_newton`` or ``hessian``, which may be indefinite and then needs more damping.
        depth: number of steps; null: as many as bring the residual below the tolerance, which the damping and
            the scale tell in advance (where steps have to be taken: at most 5000).
        scale: of the series; null: 1.05 times the largest eigenvalue plus damping.
        batch_size: training instances per step, drawn anew each time; null: all of them. With batches an
            automatic scale bounds any batch's largest eigenvalue.
        tolerance: of the relative residual.
        precondition: ``none``, or ``ekfac``: each step is multiplied by EK-FAC's inverse with the same
            damping (ASTRA; Wang et al., 2025), so that directions of little curvature are not last: fewer
            steps, see :ref:`preconditioned`. They are then taken one by one, at most 5000 (with batches,
            ``depth`` of them); ``scale`` is relative to EK-FAC.
        seed: of the batches.

    Raises:
        InputError: the series diverges.
    """

    needs = "further training to match, or a damping"
    cost = "up to thousands of products with the curvature"
    use = "comparisons with published results; `cg` gets there sooner"

    def __init__(
        self,
        damping: DampingValue = "time_matched",
        propagate: Literal["loss", "outputs"] = "loss",
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        depth: int | None = None,
        scale: float | None = None,
        batch_size: int | None = None,
        tolerance: float = 1e-4,
        precondition: Literal["none", "ekfac"] = "none",
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(damping, propagate, memory_mb, storage, cache)
        if curvature not in ("gauss_newton", "hessian"):
            raise InputError("curvature", f"expected one of gauss_newton, hessian but got {curvature!r}")
        for key, value in (("depth", depth), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(key, f"expected at least 1 but got {value}")
        if scale is not None and scale <= 0:
            raise InputError("scale", f"expected a positive number or null but got {scale}")
        if precondition not in ("none", "ekfac"):
            raise InputError("precondition", f"expected one of none, ekfac but got {precondition!r}")
        if precondition == "ekfac" and batch_size is not None and depth is None:
            raise InputError(
                "depth",
                "expected a number: how many preconditioned steps on batches suffice is not known in advance",
            )
        self.curvature, self.depth, self.scale = curvature, depth, scale
        self.batch_size, self.tolerance, self.seed = batch_size, tolerance, seed
        self.precondition = precondition

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        return no_factors(final_model, train, "auto") if self.precondition == "ekfac" else None

    @property
    def shifted(self) -> bool:
        """Whether ``auto`` damping also exceeds what makes the curvature indefinite."""
        return False

    def fit(self, final_model: FinalModel, train: Instances) -> LissaCurvature:
        gradients = self.gradients(final_model)
        operator, rows, by_rows = gauss_newton_products(gradients, train)
        if self.curvature == "hessian":
            operator, by_rows = hessian(final_model, train, count=gradients.count), False
        whole = self.batch_size is not None and self.batch_size >= len(train)
        kind = HessianSeries if self.shifted else LissaCurvature
        return kind(
            gradients, train, operator, rows, by_rows, self.memory_mb, self.curvature == "hessian",
            self.depth, self.scale, None if whole else self.batch_size, self.tolerance, self.seed,
            fit_factors(gradients, train) if self.precondition == "ekfac" else None,
        )  # fmt: skip


class LissaHessian(Lissa):
    """LiSSA with the Hessian of the training loss, as first proposed; see :class:`Lissa`.

    The Hessian of a network is indefinite, and the series then diverges unless the damping exceeds the most
    negative eigenvalue: ``auto`` is 0.1 times Gauss-Newton's mean eigenvalue plus 1.1 times the size of that
    eigenvalue, which Lanczos iterations bound (they go on until the bound is within a twentieth of it, or
    within a ten-thousandth of the largest eigenvalue). ``batch_size=32, depth=200`` is the series as first
    proposed.
    """

    needs = "nothing else"
    cost = "as `lissa`, with the Hessian"
    use = "comparisons with published results"

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        depth: int | None = None,
        scale: float | None = None,
        batch_size: int | None = None,
        tolerance: float = 1e-4,
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(
            damping,
            propagate,
            "hessian",
            depth,
            scale,
            batch_size,
            tolerance,
            "none",
            seed,
            memory_mb,
            storage,
            cache,
        )

    @property
    def shifted(self) -> bool:
        return True


@dataclass(frozen=True)
class LissaCurvature(IteratedCurvature):
    """A curvature that is inverted by a truncated Neumann series.

    Args:
        of_hessian: whether it is the Hessian, which may be indefinite.
        depth, scale, tolerance, seed: see :class:`Lissa`.
        batch: training instances per step; None for all.
        factors: of the preconditioner; None for none.
    """

    of_hessian: bool
    depth: int | None
    scale: float | None
    batch: int | None
    tolerance: float
    seed: int
    factors: KroneckerFactors | None

    def space(self, left: Rows) -> Space:
        if self.factors is not None:  # a preconditioner is one of parameter space
            return ParameterSpace(self.operator, left)
        if self.batch is None:
            if self.spectral:
                return super().space(left)
            largest = int(self.memory_mb * 2**20 / (2 * left.p * left.dtype.itemsize))
            return KrylovSpace(self.operator, left, largest)
        # a batch's matrix has its own eigenvectors: the kernel's span serves all batches
        if self.by_rows and 2 * self.own_rows.n * self.own_rows.r < min(
            self.final_model.size, 2 * MAX_DIMENSION
        ):
            return KernelSpace(self.own_rows, left, len(self.train))
        return ParameterSpace(self.operator, left)

    def iterate(self, space: Space, part: Rows, damping: float) -> Solution:
        try:
            if self.factors is not None:
                return self._preconditioned(space, self.factors, damping)
            return self._series(space, damping)
        except DivergenceError as error:
            raise InputError("scale" if "raise the scale" in str(error) else "damping", str(error)) from error

    def _series(self, space: Space, damping: float) -> Solution:
        scale = self.scale if self.scale is not None else self.largest() * 1.05 + damping
        depth = self.depth if self.depth is not None else self._needed(damping, scale)
        if self.batch is not None:
            return self._by_batches(space, damping, scale, min(depth, self.depth or MAX_STEPS))
        if isinstance(space, SpectralSpace):
            return self._warned(lissa_on_spectrum(space, damping, scale, depth), damping)
        assert isinstance(space, KrylovSpace)
        solution = lissa_in_krylov_space(space, damping, scale, depth, self.tolerance)
        if solution is None:
            log.info("LiSSA takes its steps: the memory does not suffice for a Krylov space")
            steps = min(depth, self.depth or MAX_STEPS)
            solution = lissa(space, damping, scale, steps, self.tolerance)
        return self._warned(solution, damping)

    def _preconditioned(self, space: Space, factors: KroneckerFactors, damping: float) -> Solution:
        inverse, depth = inverse_of(factors, damping), self.depth or MAX_STEPS
        scale = self.scale or 1.05 * self._largest_preconditioned(factors, damping)
        if self.batch is not None:
            return self._by_batches(space, damping, scale, depth, inverse)
        return self._warned(lissa(space, damping, scale, depth, self.tolerance, None, inverse), damping)

    def _largest_preconditioned(self, factors: KroneckerFactors, damping: float) -> float:
        """Return a bound of the largest eigenvalue of M (C + damping), M the damped factors' inverse."""
        root = inverse_of(factors, damping, 0.5)

        def times(vectors: Tensor) -> Tensor:
            inside = root(vectors)
            return root(self.operator.times(inside) + damping * inside)

        largest = self._extremes(times, smallest=False).upper
        return 2 * largest if self.batch is not None else largest  # a batch's may be larger

    def _by_batches(
        self,
        space: Space,
        damping: float,
        scale: float,
        depth: int,
        precondition: Callable[[Tensor], Tensor] | None = None,
    ) -> Solution:
        batches = self._batches(space)
        for _ in range(5 if self.scale is None else 1):
            try:
                return lissa(space, damping, scale, depth, self.tolerance, batches, precondition)
            except DivergenceError as error:
                # a batch may have larger eigenvalues than the whole: an automatic scale then doubles
                last, scale = error, 2 * scale
        raise last

    def _needed(self, damping: float, scale: float) -> int:
        """Return the steps after which the slowest direction's residual is below the tolerance."""
        slowest = max(damping + min(0.0, self.extremes[0]), 0.0) if self.of_hessian else damping
        rate = -math.log1p(-min(slowest / scale, 0.5))
        return max(1, math.ceil(-math.log(self.tolerance) / rate)) if rate > 0 else MAX_STEPS

    def _warned(self, solution: Solution, damping: float) -> Solution:
        if not solution.converged or bool((solution.residuals > 2 * self.tolerance).any()):
            log.warning(
                "LiSSA has not converged: the largest residual is %.2g of its right-hand side after %d steps "
                "(damping %.3g); its scores are those of a truncated series",
                solution.residuals.max().item(),
                solution.iterations,
                damping,
            )
        return solution

    def largest(self) -> float:
        """Return a bound of the largest eigenvalue of the curvature (with batches: of any batch's)."""
        if self.batch is not None and self.by_rows:
            # |C_batch| <= the largest |A_i^T A_i| <= the largest squared norm of an instance's rows
            return float(self.own_rows.squared_norms().sum(1).max())
        if self.spectral:
            return max(self.spectrum.eigenvalues.tolist(), default=0.0)
        largest = max(abs(value) for value in self.extremes)
        return 2 * largest if self.batch is not None else largest  # a batch's may be larger

    @functools.cached_property
    def extremes(self) -> tuple[float, float]:
        """Bounds of the curvature's smallest and largest eigenvalue, by Lanczos iterations.

        See :func:`~fimo.curvature.solvers.extreme_eigenvalues`.
        """
        extremes = self._extremes(self.operator.times, smallest=self.of_hessian)
        return extremes.lower, extremes.upper

    def _extremes(self, times: Callable[[Tensor], Tensor], smallest: bool) -> Extremes:
        generator = torch.Generator(self.operator.device).manual_seed(1)
        start = torch.randn(
            self.operator.p,
            2,
            generator=generator,
            dtype=self.operator.dtype,
            device=self.operator.device,
        )
        room = int(self.memory_mb * 2**20 / (self.operator.p * self.operator.dtype.itemsize))
        steps = max(LANCZOS_STEPS, min(MOST_LANCZOS_STEPS, room))
        extremes = extreme_eigenvalues(times, start, steps, smallest=smallest)
        if not extremes.converged:
            log.warning(
                "the curvature's extreme eigenvalues are known to %.1g after %d steps only; if LiSSA "
                "diverges, raise its damping or memory_mb",
                extremes.error,
                steps,
            )
        return extremes

    def _batches(self, space: Space) -> Callable[[int], Callable[[Tensor], Tensor]]:
        n, size = len(self.train), self.batch
        assert size is not None

        def batch(step: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            index = torch.randperm(n, generator=generator)[:size]
            if isinstance(space, KernelSpace):
                return lambda vectors: space.times_of_batch(vectors, index)
            if isinstance(self.operator, LinearHessian):
                return self.operator.of_batch(index)
            chosen = self.train[index]
            if self.of_hessian:
                return Hessian(self.final_model, chosen, count=self.gradients.count).times
            if self.by_rows:
                return RowsOperator(self.gradients.gauss_newton(chosen)).times
            return GaussNewton(self.final_model, chosen, count=self.gradients.count).times

        assert isinstance(space, KernelSpace | ParameterSpace)
        return batch


@dataclass(frozen=True)
class HessianSeries(LissaCurvature):
    """The Hessian, with the mean eigenvalue that makes ``auto`` damping exceed its most negative one."""

    def mean_eigenvalue(self) -> float:
        """Return that of the Gauss-Newton matrix, plus ten times what makes the Hessian positive."""
        whole = (
            RowsOperator(self.rows)
            if self.rows is not None
            else GaussNewton(self.final_model, self.train, count=self.gradients.count)
        )
        trace = gauss_newton_trace(self.gradients, self.train, whole)
        return trace / self.final_model.size + 11 * max(0.0, -self.extremes[0])
