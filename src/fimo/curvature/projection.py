"""Random projections of rows, in blocks: no P x k matrix is ever in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.jacobian import INSTANCES, Rows

Projection = Literal["auto", "normal", "sign", "sparse"]

COLUMNS = 64
"""Most columns of a projection that are drawn and used together."""

PIECE_MB = 256
"""Most memory of rows that are formed together, to be added up."""

MAX_ENTRIES = 2**27
"""Entries of a projection above which ``auto`` is sparse."""


class RandomProjection:
    """A random projection of rows of P entries to k numbers, the same for all rows that it is given.

    Args:
        p, k: numbers of entries and of sums.
        kind: ``normal`` or ``sign``: independent entries of variance 1/k; ``sparse``: each of the P entries
            goes to one of k sums with a random sign, which costs P instead of P·k per row; ``auto``: sparse
            where P·k is above 2^27, else normal.
        seed: the same seed gives the same projection for all rows of P entries, whatever the blocks.
        memory_mb: of the part of the projection that is held at once. Where that is all, it is drawn once;
            else for every block of rows.

    Attributes:
        kind: ``normal``, ``sign`` or ``sparse``.
    """

    def __init__(
        self, p: int, k: int, kind: Projection = "auto", seed: int = 0, memory_mb: float = 256
    ) -> None:
        if kind == "auto":
            kind = "normal" if p * k <= MAX_ENTRIES else "sparse"
        self.p, self.k, self.kind, self.seed, self.memory_mb = p, k, kind, seed, memory_mb
        self._held: tuple[Tensor, ...] = ()

    def blocks(self, rows: Rows) -> Iterator[Tensor]:
        """Yield the projected rows ``[n, R, k]`` of consecutive instances."""
        if self.kind == "sparse":
            yield from self._sparse_blocks(rows)
            return
        for block in rows.blocks():
            for start in range(0, block.n, INSTANCES):
                part = block.part(start, start + INSTANCES) if block.n > INSTANCES else block
                yield torch.cat([part.times(band) for band in self._bands(rows)], 2) / math.sqrt(self.k)

    def __call__(self, rows: Rows) -> Tensor:
        """Return projected rows ``[n, R, k]``, whose inner products are unbiased (Johnson-Lindenstrauss)."""
        return torch.cat(list(self.blocks(rows)))

    def _bands(self, rows: Rows) -> Iterable[Tensor]:
        """Return matrices ``[P, m]`` of consecutive columns."""
        width = int(self.memory_mb * 2**20 / (self.p * rows.dtype.itemsize))
        columns = torch.arange(self.k).split(min(COLUMNS, max(1, width)))
        made = (
            torch.stack([_column(rows, c, self.kind, self.seed) for c in band.tolist()], 1)
            for band in columns
        )
        if width < self.k:
            return made
        if not self._held or self._held[0].dtype != rows.dtype or self._held[0].device != rows.device:
            self._held = tuple(made)
        return self._held

    def _sparse_blocks(self, rows: Rows) -> Iterator[Tensor]:
        if not self._held:
            generator = torch.Generator().manual_seed(self.seed)
            bucket = torch.randint(0, self.k, (self.p,), generator=generator)
            drawn = torch.randint(0, 2, (self.p,), generator=generator)
            self._held = (bucket, (2 * drawn - 1).to(torch.int8))
        bucket, sign = self._held[0].to(rows.device), self._held[1].to(rows.device, rows.dtype)
        for piece in rows.pieces(min(PIECE_MB, self.memory_mb / 4)):
            sums = torch.zeros(piece.n, piece.r, self.k, dtype=rows.dtype, device=rows.device)
            yield sums.index_add_(2, bucket, piece.dense() * sign)


def project(rows: Rows, k: int, kind: Projection = "auto", seed: int = 0, memory_mb: float = 256) -> Tensor:
    """Return projected rows ``[n, R, k]``; see :class:`RandomProjection`."""
    return RandomProjection(rows.p, k, kind, seed, memory_mb)(rows)


def _column(rows: Rows, column: int, kind: str, seed: int) -> Tensor:
    """Return one column ``[P]``; it depends on the seed and its index alone.

    It is drawn on the CPU, so that scores are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + column)
    if kind == "sign":
        drawn = torch.randint(0, 2, (rows.p,), generator=generator, dtype=torch.int8)
        return (2 * drawn - 1).to(rows.device, rows.dtype)
    return torch.randn(rows.p, generator=generator, dtype=torch.float32).to(rows.device, rows.dtype)
