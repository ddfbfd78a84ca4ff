"""Random projections of rows, in blocks: no P x k matrix is ever in memory."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.jacobian import Rows, StreamedRows

Projection = Literal["auto", "normal", "sign", "sparse"]

COLUMNS = 64
"""Columns of a projection that are drawn and used together, of rows in memory; else as many as fit."""

MAX_ENTRIES = 2**27
"""Entries of a projection above which ``auto`` is sparse."""


def project(rows: Rows, k: int, kind: Projection = "auto", seed: int = 0, memory_mb: float = 256) -> Tensor:
    """Return projected rows ``[n, R, k]``, whose inner products are unbiased (Johnson-Lindenstrauss).

    Args:
        kind: ``normal`` or ``sign``: independent entries of variance 1/k; ``sparse``: each of the P entries
            goes to one of k sums with a random sign, which costs P instead of P·k per row; ``auto``: sparse
            where P·k is above 2^27, else normal.
        seed: the same seed gives the same projection for all rows of P entries, whatever the blocks.
        memory_mb: of the part of the projection that is held at once.
    """
    if kind == "auto":
        kind = "normal" if rows.p * k <= MAX_ENTRIES else "sparse"
    if kind == "sparse":
        return _sparse(rows, k, seed)
    width = max(1, int(memory_mb * 2**20 / (rows.p * rows.dtype.itemsize)))
    if not isinstance(rows, StreamedRows):  # each band makes those anew
        width = min(COLUMNS, width)
    found = []
    for start in range(0, k, width):
        band = [_column(rows, c, kind, seed) for c in range(start, min(start + width, k))]
        found.append(rows.times(torch.stack(band, 1)))
    return torch.cat(found, 2) / math.sqrt(k)


def _column(rows: Rows, column: int, kind: str, seed: int) -> Tensor:
    """Return one column ``[P]``; it depends on the seed and its index alone.

    It is drawn on the CPU, so that scores are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + column)
    if kind == "sign":
        drawn = torch.randint(0, 2, (rows.p,), generator=generator, dtype=torch.int8)
        return (2 * drawn - 1).to(rows.device, rows.dtype)
    return torch.randn(rows.p, generator=generator).to(rows.device, rows.dtype)


def _sparse(rows: Rows, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randint(0, k, (rows.p,), generator=generator).to(rows.device)
    sign = (2 * torch.randint(0, 2, (rows.p,), generator=generator) - 1).to(rows.device, rows.dtype)
    found = []
    for piece in rows.pieces():
        sums = torch.zeros(piece.n, piece.r, k, dtype=rows.dtype, device=rows.device)
        found.append(sums.index_add_(2, bucket, piece.dense() * sign))
    return torch.cat(found)
