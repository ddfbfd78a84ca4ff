"""Per-instance losses, by the names that configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[n, ...]``, targets ``[n, ...]``) -> one loss per instance ``[n]``."""


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, averaged over an instance's outputs: ``[n, D], [n, D] -> [n]``."""
    return (outputs - targets).square().flatten(1).mean(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits ``[n, C]`` with class indices ``[n]``, per instance ``[n]``."""
    return F.cross_entropy(outputs, targets, reduction="none")


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits ``[n, D]`` with 0/1 targets ``[n, D]``, averaged over D: ``[n]``."""
    losses = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
    return losses.flatten(1).mean(1)


LOSSES: dict[str, Loss] = {
    "mse": mean_squared_error,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}


def loss_name(loss: Loss) -> str:
    """Return the configured name of a known loss, else the callable's qualified name."""
    for name, known in LOSSES.items():
        if loss is known:
            return name
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', repr(loss))}"


def output_hessian(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Second derivative of each instance's loss in its own outputs.

    Args:
        outputs: ``[n, D]``.
        targets: ``[n]`` or ``[n, D]``.

    Returns:
        ``[n, D, D]``; for cross-entropy ``diag(p) - p p^T``, for the mean squared error ``2 I / D``.
    """
    if loss is mean_squared_error:
        n, d = outputs.shape
        return (2.0 / d) * torch.eye(d, dtype=outputs.dtype, device=outputs.device).expand(n, d, d)
    if loss is cross_entropy:
        p = outputs.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def one(output: Tensor, target: Tensor) -> Tensor:
        return loss(output[None], target[None])[0]

    return torch.func.vmap(torch.func.hessian(one))(outputs, targets)
