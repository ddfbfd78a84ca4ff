"""Vectors in output space, to which instances' Jacobians are applied: what the kinds of rows differ in.

Cotangents that compare equal give equal vectors, so that rows of one are rows of the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fimo.models.losses import Loss

Cotangents = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[n, ...]``, targets ``[n, ...]``) -> vectors in output space ``[n, R, ...]``."""


class GradientOf:
    """The gradients of a loss: R = 1."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.gradient(outputs, targets)[:, None]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientOf) and other.loss is self.loss

    def __hash__(self) -> int:
        return id(self.loss)


class DrawnGradients:
    """Gradients for targets that the model draws, R of them for each instance, divided by the root of R.

    Args:
        loss: of the final model.
        samples: R.
        seed: of the draws, which :meth:`restart` begins anew.
        device: of the outputs.
    """

    def __init__(self, loss: Loss, samples: int, seed: int, device: torch.device) -> None:
        self.loss, self.samples, self.seed = loss, samples, seed
        self.generator = torch.Generator(device)

    def restart(self) -> None:
        self.generator.manual_seed(self.seed)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.sampled_gradients(outputs, targets, self.samples, self.generator)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DrawnGradients) or other.loss is not self.loss:
            return False
        return (other.samples, other.seed) == (self.samples, self.seed)

    def __hash__(self) -> int:
        return hash((id(self.loss), self.samples, self.seed))


def identity(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the unit vectors: R = D, the number of (flattened) outputs."""
    n, shape = outputs.shape[0], outputs.shape[1:]
    eye = torch.eye(shape.numel(), dtype=outputs.dtype, device=outputs.device)
    return eye.view(1, shape.numel(), *shape).expand(n, -1, *shape)
