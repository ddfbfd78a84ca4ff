"""Damped inverses of C = A^T A / N between two sets of rows, for many dampings, from one Krylov space.

The iterates of block conjugate gradients (O'Leary, 1980) are the Galerkin solutions in the block Krylov space
of all right-hand sides, which is the same space whatever the damping. So a few products with the matrix serve
every right-hand side and every damping. The space is one of parameter vectors, or, where rows are few enough
for their kernel, of vectors that have a number for each row:

    (C + λ)^-1 g = (g - A^T (A A^T / N + λ)^-1 A g / N) / λ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fimo.curvature.jacobian import FactoredRows, Rows
from fimo.curvature.krylov import BlockLanczos
from fimo.curvature.operators import Operator

BLOCKS = 10
"""Blocks of a Krylov space that are reckoned with where two ways to make it are compared."""

DECOMPOSED = 500
"""Largest projected matrix that is decomposed, once for all dampings, instead of solved with for each."""


class KrylovInverse(ABC):
    """``left^T (C + damping)^-1 right`` by a Krylov space of the rows on the left.

    Args:
        right: m instances with S rows each.

    Attributes:
        krylov: the space, which grows until the residuals are small enough.
    """

    krylov: BlockLanczos

    def __init__(self, right: Rows) -> None:
        self.right = right

    @abstractmethod
    def residuals(self, damping: float) -> Tensor:
        """Return bounds ``[K]`` of ``|g - (C + damping) x| / |g|`` (float64)."""

    @abstractmethod
    def against(self, vectors: Tensor) -> Tensor:
        """Return inner products ``[k, m S]`` of the space's vectors ``[., k]`` with what is on the right."""

    @abstractmethod
    def assembled(self, inner: Tensor, damping: float) -> Tensor:
        """Return what inner products ``[K, m S]`` with the solutions in the space make."""

    def grow(self, dampings: list[float], tolerance: float, max_blocks: int, max_vectors: int) -> int:
        """Grow until all residuals are within the tolerance, or as long as blocks or memory allow.

        Returns:
            the number of blocks, a product with each vector of which was made.
        """
        hardest_first, blocks = sorted(dampings), 1
        while (
            blocks < max_blocks
            and not self.krylov.exhausted
            and self.krylov.size + self.krylov.width <= max_vectors
            and not all(bool((self.residuals(d) <= tolerance).all()) for d in hardest_first)
        ):
            self.krylov.grow()
            blocks += 1
        return blocks

    def products(self, dampings: list[float]) -> Tensor:
        """Return ``[E, K, m, S]``."""
        krylov, sides, m = self.krylov, self.right.n * self.right.r, self.krylov.size
        each = [self.coefficients(damping) for damping in dampings]
        columns = len(each) * krylov.norms.shape[0]
        if m * sides < columns * (m + sides):  # fewer than the solutions are the basis's vectors
            along = torch.cat([self.against(part) for part in krylov.parts()])
            inner = [(along.T @ c.to(along.dtype)).T * krylov.norms[:, None] for c in each]
        else:
            inner = [self.against(krylov.combine(c)) for c in each]
        found = [self.assembled(i, damping) for i, damping in zip(inner, dampings, strict=True)]
        products: Tensor = torch.stack(found)
        return products.view(*products.shape[:2], self.right.n, self.right.r)

    def coefficients(self, damping: float) -> Tensor:
        """Return ``(T + damping)^-1 E`` ``[m, K]`` (float64), for right-hand sides of length 1."""
        krylov = self.krylov
        if krylov.size <= DECOMPOSED:
            return krylov.coefficients(lambda c: 1 / (c.clamp(min=0) + damping))
        start = torch.nn.functional.pad(krylov.start, (0, 0, 0, krylov.size - len(krylov.start)))
        damped = krylov.projected.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:  # rounding made an eigenvalue more negative than the damping
            return krylov.coefficients(lambda c: 1 / (c.clamp(min=0) + damping))
        return torch.cholesky_solve(start, factor)

    def left_over(self, damping: float) -> Tensor:
        """Return what the space's solutions leave of right-hand sides of length 1, ``[K]``."""
        if not self.krylov.size:  # they are all zero
            return torch.zeros_like(self.krylov.norms, dtype=torch.float64)
        return self.krylov.residuals(self.coefficients(damping))


class ParameterInverse(KrylovInverse):
    """By parameter vectors.

    Args:
        operator: C by products.
        left, right: rows in parameter space.
    """

    def __init__(self, operator: Operator, left: Rows, right: Rows) -> None:
        super().__init__(right)
        self.krylov = BlockLanczos(operator.times, left.dense().flatten(0, 1).T.contiguous())

    def residuals(self, damping: float) -> Tensor:
        return self.left_over(damping)

    def against(self, vectors: Tensor) -> Tensor:
        return self.right.times(vectors).flatten(0, 1).T

    def assembled(self, inner: Tensor, damping: float) -> Tensor:
        return inner


class KernelInverse(KrylovInverse):
    """By the kernel of rows that fit into memory.

    Args:
        rows: A.
        kernel: ``A A^T`` ``[N·R, N·R]``.
        left, right: rows in parameter space.
    """

    def __init__(self, rows: Rows, kernel: Tensor, left: Rows, right: Rows) -> None:
        super().__init__(right)
        self.n, k = rows.n, left.n * left.r
        self.direct = left.gram(right).view(k, -1)
        self.through = rows.gram(right).view(len(kernel), -1)
        self.lengths = left.squared_norms().flatten().sqrt().double()
        self.krylov = BlockLanczos(lambda v: kernel @ v / rows.n, rows.gram(left).view(len(kernel), k))

    def residuals(self, damping: float) -> Tensor:
        # g - (C + λ) x is -A^T r / (λ N), r being what is left of the solution with the kernel, and
        # |A^T r|^2 / N is at most the largest eigenvalue, which the first blocks show, times |r|^2
        left = self.left_over(damping) * self.krylov.norms.double()
        lengths = self.lengths.where(self.lengths > 0, 1)
        return left * math.sqrt(self.krylov.largest / self.n) / (damping * lengths)

    def against(self, vectors: Tensor) -> Tensor:
        return vectors.T @ self.through

    def assembled(self, inner: Tensor, damping: float) -> Tensor:
        return (self.direct - inner / self.n) / damping


def kernel_pays(rows: Rows, columns: int, memory: float) -> bool:
    """Return whether a kernel of rows, made once, saves more than it takes, and fits into memory.

    Args:
        columns: right-hand sides.
        memory: in bytes, for the kernel and the basis of a Krylov space.
    """
    if not isinstance(rows, FactoredRows):
        return False  # inner products of other rows take a product for each entry
    size = rows.n * rows.r
    pair = sum(layer.entering.shape[1] + layer.delta.shape[2] for layer in rows.layers)
    by_kernel = size * (pair / 2 + BLOCKS * columns)
    return by_kernel < 2 * rows.p * BLOCKS * columns and 2 * size**2 * rows.dtype.itemsize <= memory
