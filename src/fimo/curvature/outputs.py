"""Derivatives of a loss in the network's outputs: the small end of every curvature matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fimo.data.instances import IGNORED
from fimo.models.losses import (
    Loss,
    binary_cross_entropy,
    cross_entropy,
    language_modelling,
    mean_squared_error,
    output_hessian,
)


def output_gradient(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each instance's derivative of its loss in its outputs, ``[n, ...]``."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, targets).sum(), leaf)[0]


def output_hessian_rows(loss: Loss, outputs: Tensor, targets: Tensor, tolerance: float = 1e-7) -> Tensor:
    """Return square roots of the loss's Hessians in the outputs.

    Args:
        outputs: ``[n, ...]``, D values for each instance.
        tolerance: eigenvalues of at most this share of an instance's largest count as zero. A loss whose
            Hessian has negative eigenvalues is not convex in the outputs; Gauss-Newton then leaves those
            directions out.

    Returns:
        ``[n, R, ...]`` with ``sum_r row_r row_r^T = H``; R is D, or D - 1 for cross-entropy.
    """
    n = outputs.shape[0]
    shape = outputs.shape[1:]
    if loss is mean_squared_error:
        d = shape.numel()
        identity = torch.eye(d, dtype=outputs.dtype, device=outputs.device).view(1, d, *shape)
        return (math.sqrt(2.0 / d) * identity).expand(n, -1, *shape)
    if loss is cross_entropy and outputs.dim() == 2 and shape[0] == 2:
        # diag(p) - p p^T = p_0 p_1 (1, -1)(1, -1)^T
        root = outputs.softmax(-1).prod(-1).sqrt()
        return torch.stack([root, -root], -1)[:, None]
    hessians = output_hessian(loss, outputs, targets)
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(hessians.double())
    largest = values.abs().amax(-1, keepdim=True)
    values = torch.where(values > tolerance * largest, values, torch.zeros_like(values))
    d = hessians.shape[-1]
    # cross-entropy's rank is D - 1 by its form, not by the data: R must not depend on the batch
    keep = d - 1 if loss is cross_entropy and d > 1 else d
    rows = (vectors * values.sqrt()[:, None, :]).transpose(1, 2)[:, d - keep :]
    return rows.to(outputs.dtype).reshape(n, keep, *shape)


DRAWN = (mean_squared_error, cross_entropy, binary_cross_entropy, language_modelling)
"""Losses under which targets can be drawn from the model's own prediction."""


def sampled_gradients(
    loss: Loss, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """Return loss derivatives for targets drawn from the model's own prediction.

    Cross-entropy draws classes (at each position of a sequence), binary cross-entropy draws 0/1; the mean
    squared error draws Gaussian targets with the variance for which the Fisher equals the Gauss-Newton
    matrix of the loss. Their outer products are unbiased for the loss's Hessian in the outputs.

    Returns:
        ``[n, samples, ...]``, each divided by ``sqrt(samples)``.
    """
    if loss is mean_squared_error:
        d = outputs.shape[1:].numel()
        shape = (outputs.shape[0], samples, *outputs.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return noise * math.sqrt(2.0 / d / samples)
    drawn = []
    for _ in range(samples):
        if loss is cross_entropy:
            labels = torch.multinomial(outputs.softmax(-1), 1, generator=generator)[:, 0]
            drawn.append(output_gradient(loss, outputs, labels))
        elif loss is binary_cross_entropy:
            labels = torch.bernoulli(outputs.sigmoid(), generator=generator)
            # losses are averaged over D outputs: rescaled so that the outer product is the Hessian
            d = outputs.shape[1:].numel()
            drawn.append(output_gradient(loss, outputs, labels) * math.sqrt(d))
        elif loss is language_modelling:
            classes = outputs.flatten(0, 1).softmax(-1)
            labels = torch.multinomial(classes, 1, generator=generator).view(targets.shape)
            kept = targets != IGNORED
            # averaged over tokens, which are drawn independently: rescaled likewise
            tokens = kept.sum(1).clamp(min=1)[:, None, None]
            labels = torch.where(kept, labels, IGNORED)
            drawn.append(output_gradient(loss, outputs, labels) * tokens**0.5)
        else:
            raise NotImplementedError(f"no sampling rule for the loss {loss!r}")
    return torch.stack(drawn, 1) / math.sqrt(samples)
