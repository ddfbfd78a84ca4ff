"""Which directions of the training outputs are followed, and the loss's derivatives in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.outputs import output_gradient
from fimo.data.instances import IGNORED
from fimo.errors import InputError
from fimo.models.losses import (
    Loss,
    binary_cross_entropy,
    cross_entropy,
    language_modelling,
    mean_squared_error,
    output_hessian,
)

MAX_OUTPUTS = 512


@dataclass(frozen=True)
class OutputSpace:
    """R orthonormal directions in the outputs of each of the training instances that are followed.

    Args:
        kept: ``[M]``, the followed instances among all N.
        directions: ``[M, R, D]``.
    """

    kept: Tensor
    directions: Tensor

    @classmethod
    def choose(
        cls, loss: Loss, outputs: Tensor, targets: Tensor, needed: Tensor, max_rows: int
    ) -> OutputSpace:
        """Choose the directions in which the loss is curved or steep.

        All of them where N·R <= ``max_rows`` allows it: one for a scalar output, D - 1 for cross-entropy
        (which ignores a common shift of the logits), else D. If not, each instance's leading ones, and if
        even one each is too many, the instances with the largest curvature and gradient.

        Args:
            outputs: ``[K, N, ...]``, D values each, at K points of the trajectory.
            needed: instances that must be kept, since they are left out.
        """
        n, d = outputs.shape[1], outputs.shape[2:].numel()
        if d > MAX_OUTPUTS:
            raise InputError("method.response", f"expected at most {MAX_OUTPUTS} outputs but got {d}")
        rank = _rank(loss, outputs.shape[2:])
        r = max(1, min(rank, max_rows // n))
        if r == d:
            eye = torch.eye(d, dtype=outputs.dtype, device=outputs.device)
            return cls(torch.arange(n, device=outputs.device), eye.expand(n, d, d))._within(
                max_rows, needed, lambda: _energy(loss, outputs, targets)
            )
        if r == 1 and d == 2 and loss is cross_entropy:
            half = torch.tensor([[0.5**0.5, -(0.5**0.5)]], dtype=outputs.dtype, device=outputs.device)
            return cls(torch.arange(n, device=outputs.device), half.expand(n, 1, 2))._within(
                max_rows, needed, lambda: _energy(loss, outputs, targets)
            )
        energy = _energy(loss, outputs, targets)
        vectors = torch.linalg.eigh(energy.double())[1][:, :, -r:].transpose(1, 2).to(outputs.dtype)
        return cls(torch.arange(n, device=outputs.device), vectors)._within(max_rows, needed, lambda: energy)

    def _within(self, max_rows: int, needed: Tensor, energy) -> OutputSpace:  # type: ignore[no-untyped-def]
        n, r, _ = self.directions.shape
        if n * r <= max_rows:
            return self
        weight = energy().diagonal(dim1=1, dim2=2).sum(1)
        weight[needed] = torch.inf
        most = max(max_rows // r, len(needed))
        kept = weight.topk(min(most, n)).indices.sort().values
        return OutputSpace(kept, self.directions[kept])

    def gradient(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's derivatives ``[M, R]`` along the directions, from outputs ``[N, ...]``."""
        found = output_gradient(loss, outputs[self.kept], targets[self.kept])
        return torch.einsum("nrd,nd->nr", self.directions, _flat(found))

    def hessian(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's second derivatives ``[M, R, R]`` between the directions."""
        if loss is mean_squared_error:
            gram = self.directions @ self.directions.transpose(1, 2)
            return gram * (2.0 / outputs.shape[1:].numel())
        found = output_hessian(loss, outputs[self.kept], targets[self.kept])
        return self.directions @ found @ self.directions.transpose(1, 2)


SATURATING = (cross_entropy, binary_cross_entropy, language_modelling)
"""Losses whose derivative in changed outputs is evaluated, not taken as linear in the change."""


def changed_gradient(
    loss: Loss, outputs: Tensor, targets: Tensor, directions: Tensor, change: Tensor
) -> Tensor:
    """Return a saturating loss's derivatives ``[Q, R, C]`` along directions, at changed outputs.

    Args:
        outputs: ``[Q, D]``, flattened.
        targets: ``[Q, ...]``.
        directions: ``[Q, R, D]``.
        change: ``[Q, R, C]``, of the outputs along the directions.
    """
    d = outputs.shape[1]
    if loss is cross_entropy and d == 2 and directions.shape[1] == 1:  # a sigmoid of the margin
        sign = directions[:, :, 0] - directions[:, :, 1]  # [Q, 1]
        margin = (outputs[:, :1] - outputs[:, 1:])[:, :, None] + sign[:, :, None] * change
        return sign[:, :, None] * (margin.sigmoid_() - (targets == 0).to(outputs.dtype)[:, None, None])
    changed = outputs[:, None] + change.transpose(1, 2) @ directions  # [Q, C, D]
    if loss is language_modelling:
        found = _token_gradients(changed, targets)
    elif loss is cross_entropy:
        found = changed.softmax(-1) - torch.nn.functional.one_hot(targets, d).to(outputs.dtype)[:, None]
    else:
        found = (changed.sigmoid() - _flat(targets).to(outputs.dtype)[:, None]) / d
    return directions @ found.transpose(1, 2)


def _token_gradients(logits: Tensor, targets: Tensor) -> Tensor:
    """Return language modelling's derivatives ``[Q, C, T·V]`` at logits of that shape; targets ``[Q, T]``."""
    tokens = targets != IGNORED
    by_token = logits.view(*logits.shape[:2], targets.shape[1], -1).softmax(-1)  # [Q, C, T, V]
    correct = torch.nn.functional.one_hot(targets.clamp(min=0), by_token.shape[-1])
    share = tokens.to(logits.dtype) / tokens.sum(1, keepdim=True).clamp(min=1)
    residual: Tensor = by_token - correct.to(logits.dtype)[:, None]
    return (residual * share[:, None, :, None]).flatten(2)


def _rank(loss: Loss, shape: torch.Size) -> int:
    """Return the rank of the loss's Hessian in an instance's outputs: softmax ignores a common shift."""
    d = shape.numel()
    if loss is cross_entropy and d > 1:
        return d - 1
    if loss is language_modelling and len(shape) == 2 and shape[1] > 1:
        return shape[0] * (shape[1] - 1)
    return d


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _energy(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``[N, D, D]``, the mean over points of H + g g^T."""
    d = outputs.shape[2:].numel()
    total = torch.zeros(outputs.shape[1], d, d).to(outputs)
    for at in outputs:
        g = _flat(output_gradient(loss, at, targets))
        total += output_hessian(loss, at, targets) + g[:, :, None] * g[:, None, :]
    return total / len(outputs)
