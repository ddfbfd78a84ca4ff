"""Whether two computations of the same tensors differ by more than rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Of a tensor's norm: what rounding may make it differ by."""

LOWER = 0.1
"""The same of types and products of lower precision, as a GPU's of float32 may be (TF32)."""


def tolerance_of(dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None = None) -> float:
    """Return what two computations may differ by."""
    if autocast is not None or (device.type != "cpu" and dtype != torch.float64):
        return LOWER
    return TOLERANCE.get(dtype, LOWER)


def alike(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Return whether tensors are the same but for rounding; of all together, where one is next to nothing.

    Expected tensors that are not finite tell nothing.
    """
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.isfinite().all()]
    size = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
    return all(
        a.shape == b.shape
        and float((a - b).double().norm()) <= tolerance * (float(b.double().norm()) + 0.01 * size)
        for a, b in pairs
    )
