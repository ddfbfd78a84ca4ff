"""Where iterative solvers keep their vectors: parameter space, or the span of a gradient and A's rows.

Krylov and Neumann iterates from a right-hand side g under C = A^T A / N stay in the span of g and the rows of
A. With x = s g + A^T c, a product needs only the kernel A A^T and A g, so that the same iteration as in
parameter space costs (N·R)^2 per step and right-hand side instead of N·R·P.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fimo.curvature.jacobian import Rows
from fimo.curvature.operators import Operator
from fimo.curvature.spectrum import KernelSpectrum


class Space(Protocol):
    """K right-hand sides and vectors ``[dimension, K]``, on which sums and multiples act elementwise."""

    def right_hand_sides(self) -> Tensor:
        """Return the right-hand sides as vectors ``[dimension, K]``."""
        ...

    def times(self, vectors: Tensor) -> Tensor:
        """Return the products with the curvature matrix, ``[dimension, K]``."""
        ...

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner products ``[K]`` in parameter space of corresponding vectors."""
        ...

    def against(self, vectors: Tensor, rows: Rows) -> Tensor:
        """Return the inner products ``[K, m, S]`` with rows in parameter space."""
        ...


class ParameterSpace:
    """Vectors of length P.

    Args:
        operator: the curvature matrix.
        right: the right-hand sides, K rows in all.
    """

    def __init__(self, operator: Operator, right: Rows) -> None:
        self.operator, self.rows = operator, right

    def right_hand_sides(self) -> Tensor:
        return self.rows.dense().flatten(0, 1).T.contiguous()

    def times(self, vectors: Tensor) -> Tensor:
        return self.operator.times(vectors)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(0)

    def against(self, vectors: Tensor, rows: Rows) -> Tensor:
        return rows.times(vectors).permute(2, 0, 1)


class SpectralSpace:
    """Vectors as coordinates along the eigenvectors of C, and a multiple of what of g is orthogonal to them.

    The same iterates as in parameter space, in float64, at a cost per step of one multiplication for each
    eigenvalue and right-hand side, once the matrix is decomposed.

    Args:
        spectrum: of C.
        right: the right-hand sides g, K rows in all.
    """

    def __init__(self, spectrum: KernelSpectrum, right: Rows) -> None:
        self.spectrum, self.right = spectrum, right
        self.coordinates = spectrum.coordinates(right).flatten(0, 1).T  # [eigenvalues, K]
        squares = right.to(torch.float64).squared_norms().flatten()
        self.rest = (squares - self.coordinates.square().sum(0)).clamp(min=0)

    def right_hand_sides(self) -> Tensor:
        return torch.cat([self.coordinates, torch.ones_like(self.rest)[None]])

    def times(self, vectors: Tensor) -> Tensor:
        return torch.cat([self.spectrum.eigenvalues[:, None] * vectors[:-1], torch.zeros_like(vectors[-1:])])

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return (left[:-1] * right[:-1]).sum(0) + left[-1] * right[-1] * self.rest

    def against(self, vectors: Tensor, rows: Rows) -> Tensor:
        k, theirs = vectors.shape[1], self.spectrum.coordinates(rows)
        wide = rows.to(torch.float64)
        inner = self.right.to(torch.float64).gram(wide).view(k, rows.n, rows.r)
        outside = inner - (theirs @ self.coordinates).permute(2, 0, 1)
        return (theirs @ vectors[:-1]).permute(2, 0, 1) + vectors[-1][:, None, None] * outside


class KernelSpace:
    """Vectors ``s g + A^T c``, kept as ``[s; c; A (s g + A^T c)]`` of length 1 + 2 N·R.

    The third part makes an inner product free of matrix products: <u, v> = s_u (s_v g·g + c_v·Ag) + c_u·(Av).

    Args:
        rows: A.
        right: the right-hand sides g, K rows in all.
        n: N.
        kernel: ``A A^T`` ``[N·R, N·R]``, if known.
    """

    def __init__(self, rows: Rows, right: Rows, n: int, kernel: Tensor | None = None) -> None:
        self.rows, self.right, self.n = rows, right, n
        self.size = rows.n * rows.r
        self.kernel = rows.kernel() if kernel is None else kernel
        self.images = rows.gram(right).view(self.size, right.n * right.r)
        self.norms = right.squared_norms().flatten()

    def right_hand_sides(self) -> Tensor:
        zeros = torch.zeros_like(self.images)
        return torch.cat([torch.ones_like(self.images[:1]), zeros, self.images])

    def times(self, vectors: Tensor) -> Tensor:
        m = self.size
        weights = vectors[1 + m :] / self.n
        return torch.cat([torch.zeros_like(vectors[:1]), weights, self.kernel @ weights])

    def times_of_batch(self, vectors: Tensor, index: Tensor) -> Tensor:
        """Return the products with the matrix of the instances ``index``, averaged over them."""
        m, r = self.size, self.rows.r
        chosen = (index[:, None] * r + torch.arange(r, device=index.device)).flatten()
        weights = vectors[1 + m :][chosen] / len(index)
        whole = torch.zeros_like(vectors[: 1 + m])
        whole[1 + chosen] = weights
        return torch.cat([whole, self.kernel[:, chosen] @ weights])

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        m = self.size
        a, b = left[0], right[0]
        return a * (b * self.norms + (right[1 : 1 + m] * self.images).sum(0)) + (
            left[1 : 1 + m] * right[1 + m :]
        ).sum(0)

    def against(self, vectors: Tensor, rows: Rows) -> Tensor:
        k = vectors.shape[1]
        direct = self.right.gram(rows).view(k, rows.n, rows.r)
        through = rows.gram(self.rows).view(rows.n, rows.r, self.size)
        return vectors[0][:, None, None] * direct + (through @ vectors[1 : 1 + self.size]).permute(2, 0, 1)
