"""Functions of a symmetric matrix applied to many vectors at once, by block Lanczos.

With Q an orthonormal basis of span(G, C G, ..., C^(m-1) G), T = Q^T C Q and E = Q^T G, a function is
φ(C) G ≈ Q φ(T) E, exactly so for polynomials of degree below m (Golub and Underwood, 1977; Saad, 1992).
All right-hand sides share the space, so that a few products serve them all; and one space serves all
functions, as those of a sweep over damping. With one right-hand side it is Lanczos's method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fimo.curvature.jacobian import Rows
from fimo.curvature.krylov_spaces import ParameterSpace
from fimo.curvature.operators import Operator

Phi = Callable[[Tensor], Tensor]


class BlockLanczos:
    """A Krylov space of a symmetric matrix, grown one block of products at a time.

    Directions that are rounding errors of the ones before are dropped, so that blocks narrow as the space is
    exhausted. A block is orthogonalised against the last two, which a symmetric matrix reaches, and once more
    against all, so that rounding brings no copies of converged eigenvalues.

    Args:
        times: product of the matrix with vectors ``[P, k]``.
        right: ``[P, K]``, the right-hand sides.

    Attributes:
        values, vectors: ``[m]``, ``[m, m]`` float64, the Ritz values, ascending, and the projected matrix's
            eigenvectors; see :meth:`ritz_vectors`.
    """

    def __init__(self, times: Callable[[Tensor], Tensor], right: Tensor) -> None:
        self.times = times
        self.norms: Tensor = right.norm(dim=0)
        scaled = right / self.norms.where(self.norms > 0, 1)
        first, _ = _orthonormal(scaled, torch.finfo(right.dtype).eps * right.shape[1] ** 0.5)
        first, _ = _orthonormal(first, 0.5)
        self.start: Tensor = (first.T @ scaled).double()
        self.projected = torch.zeros(0, 0, dtype=torch.float64, device=right.device)
        self.basis = _Basis(right)
        self.largest = 0.0  # a bound of the matrix's norm from below
        self.outside: Tensor
        self._add(first)

    @property
    def size(self) -> int:
        """Number of vectors in the basis."""
        return len(self.projected)

    @property
    def width(self) -> int:
        """Number of vectors in the last block, and the most that the next one has."""
        return self.basis.last[-1].shape[1]

    @property
    def values(self) -> Tensor:
        return self._eigen[0]

    @property
    def vectors(self) -> Tensor:
        return self._eigen[1]

    @functools.cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.projected)
        return values, vectors

    @functools.cached_property
    def _next(self) -> Tensor:
        if not self.outside.shape[1]:
            return self.outside
        rounding = 10 * torch.finfo(self.outside.dtype).eps * self.largest
        found, rank = _orthonormal(self.outside, rounding)
        if rank:
            found, _ = _orthonormal(found - _projection(found, self.basis.parts())[0], 0.5)
        return found

    @functools.cached_property
    def _outside_gram(self) -> Tensor:
        wide = self.outside.double()
        return wide.T @ wide

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: what it gives is then exact, to rounding."""
        return self._next.shape[1] == 0

    def grow(self) -> None:
        """Add the next block, by one product with each of its vectors.

        Raises:
            ValueError: the space is exhausted.
        """
        if self.exhausted:
            raise ValueError("the Krylov space is exhausted")
        new = self._next
        del self._next
        for name in ("_eigen", "_outside_gram"):
            self.__dict__.pop(name, None)
        self._add(new)

    def _add(self, new: Tensor) -> None:
        self.basis.append(new)
        image = self.times(new) if new.shape[1] else new  # all right-hand sides are zero
        projection, coordinates = _projection(image, self.basis.last)
        self.outside = image - projection
        if k := new.shape[1]:
            norm = coordinates.norm() if k == 1 else torch.linalg.matrix_norm(coordinates, 2)
            self.largest = max(self.largest, norm.item())
        before, start = self.size, self.size + new.shape[1] - len(coordinates)
        projected = torch.nn.functional.pad(self.projected, (0, new.shape[1], 0, new.shape[1]))
        projected[start:, before:] = coordinates
        projected[before:, start:] = coordinates.T
        block = projected[before:, before:]
        block.copy_((block + block.T) / 2)
        self.projected = projected

    def coefficients(self, phi: Phi) -> Tensor:
        """Return φ(T) E ``[m, K]`` (float64), for right-hand sides of length 1.

        Args:
            phi: elementwise on float64.
        """
        rotated = self.vectors[: len(self.start)].T @ self.start
        return self.vectors @ (phi(self.values)[:, None] * rotated)

    def residuals(self, coefficients: Tensor) -> Tensor:
        """Return ``|C Q c - Q T c|`` ``[K]``: what products with the matrix leave outside the space."""
        last = coefficients[-self.outside.shape[1] :]
        return (last * (self._outside_gram @ last)).sum(0).clamp(min=0).sqrt()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``Q c`` ``[P, K]``, times the lengths of the right-hand sides."""
        return self._combined(coefficients.to(self.norms.dtype)) * self.norms

    def parts(self) -> list[Tensor]:
        """Return matrices ``[P, m_k]`` whose orthonormal columns are the basis."""
        return self.basis.parts()

    def ritz_vectors(self) -> Tensor:
        """Return the orthonormal vectors ``[P, m]`` that belong to the Ritz values."""
        return self._combined(self.vectors.to(self.norms.dtype))

    def _combined(self, coefficients: Tensor) -> Tensor:
        """Return ``Q c``, ``[P, k]``."""
        total, start = self.norms.new_zeros(len(self.outside), coefficients.shape[1]), 0
        for part in self.basis.parts():
            total.addmm_(part, coefficients[start : start + part.shape[1]])
            start += part.shape[1]
        return total


class _Basis:
    """Orthonormal columns, added in blocks; narrow ones share a matrix, so that products are of few parts.

    Args:
        like: ``[P, k]``.

    Attributes:
        last: up to two last blocks as they were added.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.last: list[Tensor] = []
        self._matrices: list[Tensor] = []
        self._used: list[int] = []

    def append(self, block: Tensor) -> None:
        self.last = [*self.last[-1:], block]
        k = block.shape[1]
        if not self._matrices or self._used[-1] + k > self._matrices[-1].shape[1]:
            narrow = 2 * k <= SHARED
            self._matrices.append(self.like.new_empty(len(block), SHARED) if narrow else block)
            self._used.append(0 if narrow else k)
            if not narrow:
                return
        self._matrices[-1][:, self._used[-1] : self._used[-1] + k] = block
        self._used[-1] += k

    def parts(self) -> list[Tensor]:
        """Return matrices ``[P, m_k]`` that are the basis side by side."""
        return [matrix[:, :used] for matrix, used in zip(self._matrices, self._used, strict=True)]


SHARED = 32
"""Columns of a matrix that holds several narrow blocks."""


class KrylovSpace(ParameterSpace):
    """Parameter space with a Krylov space of its right-hand sides, made where it is used.

    Args:
        operator: the curvature matrix.
        right: the right-hand sides, K rows in all.
        max_vectors: the largest basis that memory allows.
    """

    def __init__(self, operator: Operator, right: Rows, max_vectors: int) -> None:
        super().__init__(operator, right)
        self.max_vectors = max_vectors
        self._krylov: BlockLanczos | None = None

    @property
    def krylov(self) -> BlockLanczos:
        if self._krylov is None:
            self._krylov = BlockLanczos(self.times, self.right_hand_sides())
        return self._krylov


def _projection(vectors: Tensor, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the projection of vectors on orthonormal blocks, and its coordinates ``[m, k]`` (float64)."""
    coordinates = [block.T @ vectors for block in blocks]
    total = torch.zeros_like(vectors)
    for block, part in zip(blocks, coordinates, strict=True):
        total.addmm_(block, part)
    return total, torch.cat(coordinates).double()


def _orthonormal(vectors: Tensor, smallest: float) -> tuple[Tensor, int]:
    """Return an orthonormal basis of ``[P, k]``, without singular values up to ``smallest``; its size.

    Below float64 from the Gram matrix in float64, which takes half the time of a QR decomposition. Rounding
    then leaves a vector orthogonal up to eps / its share of the largest singular value, and a second call on
    the basis up to eps.
    """
    if vectors.shape[1] == 1:
        length = vectors.norm()
        return (vectors / length, 1) if length > smallest else (vectors[:, :0], 0)
    if vectors.dtype == torch.float64:
        q, r = torch.linalg.qr(vectors)
        u, singular, _ = torch.linalg.svd(r)
        kept = u[:, : len(singular)][:, singular > smallest]
        return q @ kept, kept.shape[1]
    wide = vectors.double()
    squares, rotation = torch.linalg.eigh(wide.T @ wide)
    singular = squares.clamp(min=0).sqrt()
    large = singular > smallest
    return vectors @ (rotation[:, large] / singular[large]).to(vectors.dtype), int(large.sum())
