"""The finite-time response in (E)K-FAC's eigenbasis, where the kernel of outputs is too large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.curvature.jacobian import Rows, split
from fimo.curvature.kronecker import KroneckerFactors
from fimo.curvature.spectrum import Phi


def kronecker_response(
    factors: KroneckerFactors, left: Rows, right: Rows, phis: Sequence[Phi], memory_mb: float = 1024
) -> Tensor:
    """Return ``left^T Q phi(Λ) Q^T right`` as ``[T, n, R, m]`` for T functions phi of the eigenvalues.

    Args:
        factors: Q and Λ, block by block.
        left: n instances with R rows, such as test outputs' Jacobians.
        right: m instances with one row, such as training losses' gradients.
        memory_mb: of vectors held at once.
    """
    shapes = factors.shapes
    found = []
    for piece in right.pieces(memory_mb / (2 + len(phis))):
        parts = split(piece.dense()[:, 0], shapes)
        moved: list[dict[str, Tensor]] = [{} for _ in phis]
        for block in factors.blocks:
            rotated, values = block.rotate(block.gather(parts)), block.values.double().clamp(min=0)
            for into, phi in zip(moved, phis, strict=True):
                scaled = rotated * phi(values).to(rotated.dtype)
                block.scatter(block.rotate_back(scaled), into, shapes)
        vectors = [torch.cat([m[name] for name in shapes], 1).T for m in moved]
        found.append(torch.stack([left.times(v) for v in vectors]))
    return torch.cat(found, 3)
