"""Spectral functions of the Gauss-Newton matrix: φ(G) for any φ, by one eigendecomposition.

G = A^T A / N with the N·R rows A of :meth:`InstanceGradients.gauss_newton`. Where N·R < P the smaller kernel
K = A A^T / N is decomposed, which has the same nonzero eigenvalues: with K = U diag(λ) U^T, the vectors
V = A^T U / sqrt(N λ) are G's eigenvectors, and G is zero on their complement, so that

    φ(G) = φ(0) I + V diag(φ(λ) - φ(0)) V^T,

and only inner products of rows are needed, never a vector of length P. Where V has all P eigenvectors of G
itself, φ(G) = V diag(φ(λ)) V^T: a φ(0) much larger than the rest, as 1 / damping, would cost digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel

Phi = Callable[[Tensor], Tensor]
"""A function of eigenvalues, elementwise on float64 tensors, defined at 0."""

MAX_DIMENSION = 6000
"""Largest eigenproblem that is tried by default: 6000 takes about two minutes on two cores and 1 GB."""


class KernelSpectrum:
    """The eigendecomposition of a Gauss-Newton matrix (or Fisher, by ``rows``) of the mean training loss.

    Args:
        final_model: at whose parameters.
        train: the N instances.
        gradients: shared with the caller; made when None.
        rows: A, with G = A^T A / N; the Gauss-Newton rows of ``train`` when None.
        column_scale: ``[P]``, an optional diagonal preconditioner's inverse square root s: everything is
            as if parameters were measured in units of s, that is G = S A^T A S / N and gradients S g.
        route: ``kernel`` (N·R x N·R), ``parameters`` (P x P), or ``auto``, the smaller.

    Attributes:
        eigenvalues: ``[K]`` float64, ascending, those of the decomposed matrix that are not zero to rounding
            (of G, its other eigenvalues are zero, on the kernel route).
        dimension: of the decomposed matrix.
    """

    def __init__(
        self,
        final_model: FinalModel,
        train: Instances,
        gradients: InstanceGradients | None = None,
        rows: Rows | None = None,
        column_scale: Tensor | None = None,
        route: Literal["auto", "kernel", "parameters"] = "auto",
    ) -> None:
        self.gradients = gradients or InstanceGradients(final_model)
        self.rows = (rows if rows is not None else self.gradients.gauss_newton(train)).to(torch.float64)
        self.n = len(train)
        self.scale = None if column_scale is None else column_scale.double()
        size = self.rows.n * self.rows.r
        self.by_kernel = route == "kernel" or (route == "auto" and size < self.rows.p)
        if self.by_kernel:
            weight = self._weight
            kernel = self.rows.kernel() if weight is None else self.rows.gram(self.rows, weight)
            matrix = kernel.view(size, size) / self.n
        else:
            matrix = second_moment(self.rows) / self.n
            if self.scale is not None:
                matrix = matrix * self.scale[:, None] * self.scale
        self.dimension = len(matrix)
        self.trace = matrix.diagonal().sum().item()
        values: Tensor
        vectors: Tensor
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        keep = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        self.eigenvalues, self.vectors = values[keep], vectors[:, keep]

    @property
    def _weight(self) -> Tensor | None:
        return None if self.scale is None else self.scale.square()

    @property
    def mean_eigenvalue(self) -> float:
        """The mean of all P eigenvalues of G."""
        return self.trace / self.rows.p

    @property
    def complete(self) -> bool:
        """Whether the eigenvectors span all of parameter space."""
        return not self.by_kernel and len(self.eigenvalues) == self.rows.p

    def coordinates(self, rows: Rows) -> Tensor:
        """Return the coordinates ``[n, R, K]`` of vectors in parameter space along G's eigenvectors."""
        rows = rows.to(torch.float64)
        if not self.by_kernel:
            scaled = self.vectors if self.scale is None else self.vectors * self.scale[:, None]
            return rows.times(scaled)
        products = rows.gram(self.rows, self._weight).flatten(2)
        return (products @ self.vectors) / (self.n * self.eigenvalues).sqrt()

    def pair(self, left: Rows, right: Rows) -> SpectralPair:
        """Return what all spectral functions between two sets of vectors share, computed once."""
        inner = None
        if not self.complete:
            inner = left.to(torch.float64).gram(right.to(torch.float64), self._weight)
        return SpectralPair(self.eigenvalues, self.coordinates(left), self.coordinates(right), inner)

    def apply(self, phi: Phi, left: Rows, right: Rows) -> Tensor:
        """Return ``left^T φ(G) right`` as ``[n, R, m, S]`` (float64)."""
        return self.pair(left, right).apply(phi)

    def parameter_change(self, phi: Phi, rows: Rows) -> Tensor:
        """Return φ(G) applied to each vector, ``[P, n·R]``, in the scaled units if there are any."""
        coordinates = self.coordinates(rows).flatten(0, 1).T
        values, zero = phi(self.eigenvalues), phi(self.eigenvalues.new_zeros(1))
        if self.complete:
            return self.vectors @ (values[:, None] * coordinates)
        dense = rows.to(torch.float64).dense().flatten(0, 1).T
        if self.scale is not None:
            dense = dense * self.scale[:, None]
        change = (values - zero)[:, None] * coordinates
        if not self.by_kernel:
            return zero * dense + self.vectors @ change
        weights = self.vectors @ (change / (self.n * self.eigenvalues).sqrt()[:, None])
        combined = self.rows.transposed_times(weights.view(self.rows.n, self.rows.r, -1))
        return zero * dense + (combined if self.scale is None else combined * self.scale[:, None])


@dataclass(frozen=True)
class SpectralPair:
    """Two sets of vectors along a matrix's eigenvectors.

    Args:
        eigenvalues: ``[K]``.
        left, right: coordinates ``[n, R, K]`` and ``[m, S, K]``.
        inner: the vectors' inner products ``[n, R, m, S]``; None where the eigenvectors span all.
    """

    eigenvalues: Tensor
    left: Tensor
    right: Tensor
    inner: Tensor | None

    def apply(self, phi: Phi) -> Tensor:
        """Return ``left^T φ(G) right`` as ``[n, R, m, S]``."""
        values = phi(self.eigenvalues)
        if self.inner is None:
            whole: Tensor = torch.tensordot(self.left * values, self.right, dims=([2], [2]))
            return whole
        zero = phi(torch.zeros(1, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device))
        inside: Tensor = torch.tensordot(self.left * (values - zero), self.right, dims=([2], [2]))
        return inside.add_(zero * self.inner)


def second_moment(rows: Rows) -> Tensor:
    """Return ``A^T A`` ``[P, P]``, piece by piece."""
    total = torch.zeros(rows.p, rows.p, dtype=rows.dtype, device=rows.device)
    for piece in rows.pieces():
        dense = piece.dense().flatten(0, 1)
        total.addmm_(dense.T, dense)
    return total


def kernel_dimension(final_model: FinalModel, train: Instances) -> int:
    """Return the size of the smaller of G and the kernel K, an upper bound, from one instance's outputs."""
    outputs = final_model.outputs(train[:1])[0].numel()
    return min(final_model.size, len(train) * outputs)
