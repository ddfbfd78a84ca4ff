"""Gradient flow with constant curvature: how far a parameter has answered a constant force after a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.curvature.spectrum import Phi
from fimo.engine.protocol import Protocol


def relaxation(time: float, decay: float = 0.0) -> Phi:
    """Return phi(c) = (1 - exp(-(c + decay) time)) / (c + decay).

    For small ``time`` it is ``time`` (a gradient step), for large ``time`` 1 / (c + decay) (the influence
    function): gradient flow from a minimum along an eigenvector of curvature c, pushed by a force of 1.

    Args:
        time: the sum of learning rates.
        decay: a weight decay's coefficient, which acts like damping.
    """

    def phi(curvature: Tensor) -> Tensor:
        x = (curvature + decay) * time
        safe = torch.where(x > 1e-8, x, torch.ones_like(x))
        return time * torch.where(x > 1e-8, -torch.expm1(-safe) / safe, 1 - x / 2)

    return phi


def times(protocol: Protocol, steps: list[int] | tuple[int, ...]) -> list[float]:
    """Return the time of gradient flow after each number of steps: the optimizer's, of sums of rates."""
    total = steps[-1]
    rates = torch.tensor([protocol.learning_rate(t, total) for t in range(total)], dtype=torch.float64)
    sums = rates.cumsum(0)[torch.tensor(steps) - 1]
    return protocol.update_rule.time(sums).tolist()
