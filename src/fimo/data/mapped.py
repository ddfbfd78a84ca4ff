"""Arrays that may be larger than the memory: large ones are in a temporary file that is deleted already."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

MAPPED_BYTES = 2**28
"""Size from which an array is in a file, whose parts the system holds in memory as long as there is room."""


def array(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an array that is to be filled; NaN before that, or 0, where it is small."""
    size = torch.Size(shape).numel()
    if dtype.itemsize * size < MAPPED_BYTES:
        return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="fimo-array-") as file:
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
