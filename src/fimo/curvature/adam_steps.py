"""Steps of Adam that single instances' gradients make, where parameters have hardly moved for long (LESS)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.jacobian import INSTANCES, DenseRows, Rows
from fimo.curvature.projection import RandomProjection

STEPS_MB = 24
"""Of gradients whose steps are made together; larger pieces of memory are slow, being given back."""


@dataclass(frozen=True)
class Moments:
    """Adam's, each ``[P]``.

    Args:
        first: the mean gradient.
        second: the mean square of a batch's gradient.
    """

    first: Tensor
    second: Tensor


def moments_of(rows: Rows, batch_size: int) -> Moments:
    """Return the moments that Adam's averages have as expectation where parameters hardly move.

    Args:
        rows: the N training gradients.
        batch_size: B; the mean of B of N gradients drawn without replacement has the variance
            (N - B) / (B (N - 1)) times that of one.
    """
    n = rows.n
    batch = min(batch_size, n)
    mean, square = torch.zeros(2, rows.p, dtype=rows.dtype, device=rows.device)
    for block in rows.blocks():
        for start in range(0, block.n, INSTANCES):
            part = block.part(start, start + INSTANCES) if block.n > INSTANCES else block
            ones = torch.ones(part.n, 1, 1, dtype=rows.dtype, device=rows.device)
            mean += part.transposed_times(ones)[:, 0] / n
            square += part.squares().transposed_times(ones)[:, 0] / n
    variance = (square - mean.square()).clamp(min=0)
    return Moments(mean, mean.square() + variance * ((n - batch) / (batch * max(1, n - 1))))


@dataclass(frozen=True)
class AdamSteps:
    """Γ = (β1 m + (1 - β1) g) / (sqrt(β2 v + (1 - β2) g^2) + eps), Adam's step along a gradient g.

    Args:
        beta1, beta2, eps: of Adam.
        moments: m and v.
    """

    beta1: float
    beta2: float
    eps: float
    moments: Moments

    def of(self, gradients: Tensor) -> Tensor:
        """Return Γ ``[n, P]`` of gradients ``[n, P]``."""
        first = torch.add(self.beta1 * self.moments.first, gradients, alpha=1 - self.beta1)
        second = torch.addcmul(self.beta2 * self.moments.second, gradients, gradients, value=1 - self.beta2)
        return first.div_(second.sqrt_().add_(self.eps))

    def directions(
        self, rows: Rows, projection: RandomProjection | None, memory_mb: float
    ) -> Iterator[Tensor]:
        """Yield Γ of unit length, ``[n, P]`` or projected ``[n, k]``, of consecutive gradients; zeros stay.

        Args:
            rows: gradients, R = 1.
            memory_mb: of which a quarter may be formed at once.
        """
        for piece in rows.pieces(min(STEPS_MB, memory_mb / 4)):
            steps = self.of(piece.dense()[:, 0])
            if projection is not None:
                steps = projection(DenseRows(steps[:, None], rows.shapes))[:, 0]
            lengths = steps.norm(dim=1, keepdim=True)
            yield steps.div_(lengths.where(lengths > 0, 1))
