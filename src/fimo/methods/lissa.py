"""Influence by LiSSA, with the Gauss-Newton matrix or the Hessian."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.damping import DampingValue
from fimo.curvature.kernel import MAX_DIMENSION
from fimo.curvature.operators import GaussNewton, Hessian, RowsOperator
from fimo.curvature.rows import Rows
from fimo.curvature.solvers import (
    DivergenceError,
    Solution,
    lanczos,
    largest_eigenvalue,
    lissa,
    lissa_on_spectrum,
)
from fimo.curvature.spaces import KernelSpace, ParameterSpace, Space, SpectralSpace
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.cg import IterativeMethod
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)


class Lissa(IterativeMethod):
    """Influence by the truncated Neumann series of LiSSA (Agarwal et al., 2017; Koh and Liang, 2017).

    score[j, i] = (1/N) x_j^T g_i with x_j = lim x_t / scale,
    x_t = g_j + (I - (C + damping) / scale) x_{t-1}. At convergence the scores are those of ``exact``; fewer
    steps act like further training that stops early, directions of little curvature last.

    Args:
        damping, propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`; the paper has 1x to 1000x.
        curvature: ``gauss_newton`` or ``hessian``, which may be indefinite and then needs more damping.
        depth: largest number of steps.
        scale: of the series; null: 1.05 times the largest eigenvalue (power iteration) plus damping.
        batch_size: training instances per step, drawn anew each time; null: all of them, which is exact and
            stops at the tolerance. With batches an automatic scale bounds any batch's largest eigenvalue.
        tolerance: of the relative residual, for stopping early.
        seed: of the batches.

    Raises:
        InputError: the series diverges.
    """

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        depth: int = 5000,
        scale: float | None = None,
        batch_size: int | None = None,
        tolerance: float = 1e-4,
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
        self.curvature, self.depth, self.scale = curvature, depth, scale
        self.batch_size, self.tolerance, self.seed = batch_size, tolerance, seed

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self._largest: float | None = None
        if self.curvature == "hessian":
            self.by_rows, self.operator = False, Hessian(final_model, train, count=self.gradients.count)
        if self.batch_size is not None and self.batch_size >= len(train):
            self.batch_size = None

    def space(self, left: Rows) -> Space:
        if self.batch_size is None or self.curvature == "hessian":
            return super().space(left)
        # a batch's matrix has its own eigenvectors: the kernel's span serves all batches
        if self.by_rows and 2 * self.rows.n * self.rows.r < min(self.final_model.size, 2 * MAX_DIMENSION):
            return KernelSpace(self.rows, left, len(self.train))
        return ParameterSpace(self.operator, left)

    def iterate(self, space: Space, part: Rows, damping: float) -> Solution:
        scale = self.scale if self.scale is not None else self.largest() * 1.05 + damping
        batches = self._batches(space) if self.batch_size is not None else None
        if batches is None and isinstance(space, SpectralSpace):
            return self._warned(self._summed(space, damping, scale), damping)
        tries = 5 if self.scale is None and batches is not None else 1
        for attempt in range(tries):
            try:
                solution = lissa(space, damping, scale, self.depth, self.tolerance, batches)
                break
            except DivergenceError as error:
                # a batch may have larger eigenvalues than the whole: an automatic scale then doubles
                if attempt == tries - 1:
                    raise InputError("damping", str(error)) from error
                scale *= 2
        return solution if batches is not None else self._warned(solution, damping)

    def _summed(self, space: SpectralSpace, damping: float, scale: float) -> Solution:
        try:
            return lissa_on_spectrum(space, damping, scale, self.depth)
        except DivergenceError as error:
            raise InputError("scale", str(error)) from error

    def _warned(self, solution: Solution, damping: float) -> Solution:
        if bool((solution.residuals > self.tolerance).any()):
            log.warning(
                "LiSSA: the largest residual is %.2g of its right-hand side after %d steps (damping %.3g)",
                solution.residuals.max().item(),
                solution.iterations,
                damping,
            )
        return solution

    def largest(self) -> float:
        """Return a bound of the largest eigenvalue of the curvature (with batches: of any batch's)."""
        if self._largest is None:
            if self.batch_size is not None and self.by_rows:
                # |C_batch| <= the largest |A_i^T A_i| <= the largest squared norm of an instance's rows
                self._largest = self.rows.squared_norms().sum(1).max().item()
            elif self.by_rows and "spectrum" in self.__dict__:
                self._largest = self.spectrum.eigenvalues[-1].item()
            else:
                like = torch.zeros(self.operator.p, dtype=self.operator.dtype, device=self.operator.device)
                self._largest = largest_eigenvalue(self.operator.times, like)
                if self.batch_size is not None:
                    self._largest *= 2  # a batch's may be larger than the whole's
        return self._largest

    def _batches(self, space: Space) -> Callable[[int], Callable[[Tensor], Tensor]]:
        n, size = len(self.train), self.batch_size
        assert size is not None

        def batch(step: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            index = torch.randperm(n, generator=generator)[:size]
            if isinstance(space, KernelSpace):
                return lambda vectors: space.times_of_batch(vectors, index)
            chosen = self.train[index]
            if self.curvature == "hessian":
                return Hessian(self.final_model, chosen, count=self.gradients.count).times
            if self.by_rows:
                return RowsOperator(self.gradients.gauss_newton(chosen)).times
            return GaussNewton(self.final_model, chosen, count=self.gradients.count).times

        assert isinstance(space, KernelSpace | ParameterSpace)
        return batch


class LissaHessian(Lissa):
    """LiSSA with the Hessian of the training loss, as first proposed; see :class:`Lissa`.

    The Hessian of a network is indefinite, and the series then diverges unless the damping exceeds the most
    negative eigenvalue: ``auto`` is 0.1 times Gauss-Newton's mean eigenvalue plus 1.1 times the size of that
    eigenvalue, which Lanczos iterations find. A step's product is taken over a batch by default, as first
    proposed: over all instances it costs as much as an epoch for every test instance.
    """

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        depth: int = 200,
        scale: float | None = None,
        batch_size: int | None = 32,
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
            seed,
            memory_mb,
            storage,
            cache,
        )

    def mean_eigenvalue(self) -> float:
        """Return that of the Gauss-Newton matrix, plus ten times what makes the Hessian positive."""
        whole = (
            RowsOperator(self.rows)
            if hasattr(self, "rows")
            else GaussNewton(self.final_model, self.train, count=self.gradients.count)
        )
        generator = torch.Generator(self.operator.device).manual_seed(1)
        start = torch.randn(
            self.operator.p, generator=generator, dtype=self.operator.dtype, device=self.operator.device
        )
        values = lanczos(self.operator.times, start, 20)[0]
        negative = max(0.0, -values[0].item())
        return whole.trace() / self.final_model.size + 11 * negative
