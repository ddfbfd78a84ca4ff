"""Influence in the span of the curvature's leading eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.hessian import hessian
from fimo.curvature.jacobian import Rows
from fimo.curvature.operators import GaussNewton, Operator, RowsOperator
from fimo.curvature.solvers import lanczos
from fimo.curvature.spectrum import MAX_DIMENSION
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.cg import MAX_ROWS, gauss_newton_trace
from fimo.methods.damping import Damping, DampingValue
from fimo.methods.gradient import CurvatureMethod, FittedCurvature, Solved
from fimo.models.final_model import FinalModel


class Arnoldi(CurvatureMethod):
    """Influence restricted to the leading eigenvectors, found by Arnoldi iterations (Schioppa et al., 2022).

    score[j, i] = (1/N) sum_k (g_j·v_k)(v_k·g_i) / (λ_k + damping) over the ``rank`` Ritz pairs (λ_k, v_k) of
    largest |λ_k|, from ``iterations`` products with the curvature. (For a symmetric matrix
    Arnoldi's method is Lanczos's; every vector is orthogonalised against all others.) What the gradients have
    outside the span is dropped, as the authors do.

    Args:
        rank: number of eigenvectors kept.
        iterations: dimension of the Krylov space.
        damping: null for none, as the authors; else see :class:`~fimo.methods.damping.Damping`; ``auto``
            with the Hessian takes its trace, estimated from 32 random vectors (as does the Gauss-Newton
            matrix's above 1,024 outputs).
        propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`.
        curvature: ``gauss_newton`` or ``hessian``.
        seed: of the start vector.
    """

    needs = "nothing else"
    cost = "some hundred products with the curvature, once"
    use = "many left-out instances with the same few leading directions"

    def __init__(
        self,
        rank: int = 100,
        iterations: int = 200,
        damping: DampingValue | None = None,
        propagate: Literal["loss", "outputs"] = "loss",
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__("auto" if damping is None else damping, propagate, memory_mb, storage, cache)
        if damping is None:
            self.damping = Damping("absolute", 0.0)
        if not 1 <= rank <= iterations:
            raise InputError("rank", f"expected 1 to iterations={iterations} but got {rank}")
        if curvature not in ("gauss_newton", "hessian"):
            raise InputError("curvature", f"expected one of gauss_newton, hessian but got {curvature!r}")
        self.rank, self.iterations, self.curvature, self.seed = rank, iterations, curvature, seed

    def fit(self, final_model: FinalModel, train: Instances) -> LeadingEigenvectors:
        gradients = self.gradients(final_model)
        n, outputs = len(train), final_model.outputs(train[:1])[0].numel()
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(final_model.size, generator=generator, dtype=torch.float32)
        start = start.to(gradients.device, gradients.dtype)  # drawn on the CPU: the same on every device
        hessian_wanted = self.curvature == "hessian"
        kernel_rows: Rows | None = None
        if not hessian_wanted and outputs <= MAX_ROWS:
            rows = gradients.gauss_newton(train)
            operator: Operator = RowsOperator(rows)
            size = rows.n * rows.r
            if size < final_model.size and size <= MAX_DIMENSION:
                # the same Krylov space through the kernel: A C^k start = (A A^T / N)^k A start
                kernel = rows.gram(rows).view(size, size) / n
                image = rows.times(start[:, None]).flatten()
                values, vectors = lanczos(lambda v: kernel @ v, image, self.iterations)
                kernel_rows = rows
        elif not hessian_wanted:
            operator = GaussNewton(final_model, train, count=gradients.count)
        else:
            operator = hessian(final_model, train, count=gradients.count)
        if kernel_rows is None:
            values, vectors = lanczos(operator.times, start, self.iterations)
        chosen = self._leading(values)
        fitted = LeadingEigenvectors(
            gradients, train, operator, hessian_wanted, values[chosen], vectors[:, chosen], kernel_rows
        )
        if not len(chosen) and fitted.mean_squared_gradient() > 0:
            raise InputError("curvature", "all its eigenvalues are zero, so that there are no leading ones")
        return fitted

    def _leading(self, values: Tensor, smallest: float = 1e-6) -> Tensor:
        # eigenvalues that are rounding errors of zero would dominate their own inverse
        sizes = values.abs()
        order = sizes.argsort(descending=True)[: self.rank]
        return order[sizes[order] > smallest * sizes.amax()] if len(order) else order

    def dampings(self, curvature: FittedCurvature, further_training: FurtherTraining | None) -> Tensor:
        if self.damping == Damping("absolute", 0.0):
            return torch.zeros(1, dtype=torch.float64)
        return super().dampings(curvature, further_training)


@dataclass(frozen=True)
class LeadingEigenvectors(FittedCurvature):
    """A curvature restricted to some of its eigenvectors.

    Args:
        operator: the whole matrix, by products.
        of_hessian: whether it is the Hessian.
        values: ``[rank]``.
        vectors: ``[P, rank]``, or ``[N·R, rank]`` of the kernel of ``kernel_rows``.
        kernel_rows: where the kernel's eigenvectors stand for the matrix's own.
    """

    operator: Operator
    of_hessian: bool
    values: Tensor
    vectors: Tensor
    kernel_rows: Rows | None

    def mean_eigenvalue(self) -> float:
        if self.of_hessian:
            return self.operator.trace() / self.final_model.size
        return gauss_newton_trace(self.gradients, self.train, self.operator) / self.final_model.size

    def coordinates(self, rows: Rows) -> Tensor:
        """Return ``[n, R, rank]``, the rows' products with the eigenvectors."""
        if self.kernel_rows is None:
            return rows.times(self.vectors)
        products = rows.gram(self.kernel_rows).flatten(2) @ self.vectors
        return products / (len(self.train) * self.values).sqrt()

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        a, b = self.coordinates(left), self.coordinates(right)[:, 0]
        return Solved(torch.stack([(a / (self.values + d)) @ b.T for d in dampings.tolist()]))
