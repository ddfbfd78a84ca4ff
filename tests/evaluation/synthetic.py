"""Sensitivities of known signal and noise, and scores of known quality."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.further_training.sensitivity import Sensitivity


def synthetic(
    seeds: int = 6,
    points: int = 4,
    tests: int = 5,
    left_out: int = 30,
    noise: float = 1.0,
    scale: float = 1e-4,
) -> tuple[Sensitivity, Tensor]:
    """Return a sensitivity of signal + noise per seed, and its noiseless signal ``[E, J, L]``."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    drift = torch.linspace(0, 1, points, dtype=torch.float64)[:, None, None]
    start, later = normal(tests, left_out), normal(tests, left_out)
    signal = (1 - drift / 2) * start + drift * later
    raw = scale * (signal + noise * normal(seeds, points, tests, left_out) + 0.3)
    return (
        Sensitivity(
            raw=raw.float(),
            step=torch.arange(1, points + 1) * 8,
            epoch=torch.arange(1, points + 1),
            left_out=torch.arange(left_out) * 3,
            test=torch.arange(tests),
            seeds=torch.arange(seeds),
        ),
        scale * signal,
    )
