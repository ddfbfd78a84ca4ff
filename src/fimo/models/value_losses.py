"""Losses of outputs that are compared with values: a function of each output, averaged over them."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.errors import InputError
from fimo.models.loss_function import Loss, Targets


class MeanOfOutputs(Loss):
    """A convex function of each output and its target, averaged over an instance's D outputs.

    Attributes:
        factor: what :meth:`slope` and :meth:`curvature` leave out of the derivatives.
    """

    targets: ClassVar[Targets | None] = "values"
    convex = True
    draws = True
    factor: ClassVar[float] = 1.0

    @abstractmethod
    def slope(self, outputs: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the function's derivative in each output; of any shape, and in a tensor that is given."""

    @abstractmethod
    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return its second derivative in each output."""

    def _second(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the diagonals of the Hessians ``[n, D]``."""
        curvature = self.curvature(outputs, _of(outputs, targets)).expand_as(outputs).flatten(1)
        return curvature.to(outputs.dtype) * (self.factor / curvature.shape[1])

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        slope = self.slope(outputs.detach(), _of(outputs, targets))
        return slope.mul_(self.factor / outputs.shape[1:].numel())

    def stacked_gradient(self, outputs: Tensor, targets: Tensor, weight: Tensor, out: Tensor) -> None:
        self.slope(outputs, targets.transpose(1, 2), out)
        out.mul_((weight * (self.factor / outputs.shape[1]))[:, None])

    def _flat_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        slope = self.slope(outputs, targets.reshape(len(targets), 1, -1).to(outputs.dtype))
        return slope.mul_(self.factor / outputs.shape[2])

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.diag_embed(self._second(outputs, targets))

    def hessian_times(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return vectors * self._second(outputs, targets)[:, None]

    def hessian_root(self, outputs: Tensor, targets: Tensor, tolerance: float = 1e-7) -> Tensor:
        rows = torch.diag_embed(self._second(outputs, targets).sqrt())
        return rows.view(*rows.shape[:2], *outputs.shape[1:])

    def sampled_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Draw Gaussian targets, with the variance for which the Fisher is the Gauss-Newton matrix."""
        shape = (outputs.shape[0], samples, *outputs.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        root = (self._second(outputs, targets) / samples).sqrt()
        return noise * root.view(outputs.shape)[:, None]

    def scalar_output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._is_scalar(outputs):
            return outputs.flatten(1)[:, 0]
        return super().scalar_output(outputs, targets)

    def scalar_slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._is_scalar(outputs):
            return self.gradient(outputs, targets).flatten()
        return super().scalar_slope(outputs, targets)

    def _is_scalar(self, outputs: Tensor) -> bool:
        return self.targets == "values" and outputs.shape[1:].numel() == 1


@dataclass(frozen=True)
class MeanSquaredError(MeanOfOutputs):
    """Squared error, averaged over an instance's outputs: ``[n, D], [n, D] -> [n]``."""

    name = "mse"
    quadratic = True
    factor = 2.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - like(outputs, targets)).square().flatten(1).mean(1)

    def slope(self, outputs: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.sub(outputs, targets, out=out)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.new_ones(())

    def hessian_between(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        gram = directions @ directions.transpose(1, 2)
        return gram * (self.factor / directions.shape[2])

    def hessian_root(self, outputs: Tensor, targets: Tensor, tolerance: float = 1e-7) -> Tensor:
        d = outputs.shape[1:].numel()
        rows = math.sqrt(self.factor / d) * torch.eye(d, dtype=outputs.dtype, device=outputs.device)
        return rows.view(1, d, *outputs.shape[1:]).expand(len(outputs), -1, *outputs.shape[1:])

    def best_constant(self, targets: Tensor, width: int) -> Tensor:
        return targets.double().mean(0)


@dataclass(frozen=True)
class Huber(MeanOfOutputs):
    """Half the squared error up to ``delta``, linear beyond (Huber, 1964), averaged over outputs.

    Args:
        delta: where an error begins to count linearly, in units of the targets.

    Raises:
        InputError: ``delta`` is not positive.

    Example:
        >>> Huber(delta=2.0)(torch.tensor([[1.0], [5.0]]), torch.zeros(2, 1)).tolist()
        [0.5, 8.0]
    """

    delta: float = 1.0
    name = "huber"
    saturates = True

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise InputError("model.loss.delta", f"expected a positive number but got {self.delta}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # by operations that have derivatives of all kinds, which torch's own has not
        error = outputs - like(outputs, targets)
        within = error.clamp(-self.delta, self.delta)
        return (within * (error - within / 2)).flatten(1).mean(1)

    def slope(self, outputs: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.sub(outputs, targets, out=out).clamp_(-self.delta, self.delta)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs() < self.delta

    def best_constant(self, targets: Tensor, width: int) -> Tensor:
        """Bisect for the root of the mean slope, which rises between the smallest and largest target."""
        values = targets.double()
        low, high = values.amin(0), values.amax(0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.slope(middle.expand_as(values), values).mean(0) > 0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


@dataclass(frozen=True)
class BinaryCrossEntropy(MeanOfOutputs):
    """Binary cross-entropy of logits ``[n, D]`` with 0/1 targets ``[n, D]``, averaged over D: ``[n]``."""

    name = "binary_cross_entropy"
    targets = "probabilities"
    saturates = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = _of(outputs, targets)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)

    def slope(self, outputs: Tensor, targets: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.sigmoid(outputs, out=out).sub_(targets)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p)

    def sampled_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        # losses are averaged over D outputs: rescaled so that the outer product is the Hessian
        scale = math.sqrt(outputs.shape[1:].numel())
        p = outputs.sigmoid()
        drawn = [torch.bernoulli(p, generator=generator) for _ in range(samples)]
        return torch.stack([self.gradient(outputs, y) * scale for y in drawn], 1) / math.sqrt(samples)

    def best_constant(self, targets: Tensor, width: int) -> Tensor:
        return torch.logit(targets.double().mean(0), eps=1e-6)


def like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return values in the outputs' shape, where that only adds or drops axes of size one (``[n]``).

    Raises:
        InputError: the shapes differ otherwise: they would be broadcast, and losses would mix instances.
    """
    if outputs.shape == targets.shape:
        return targets
    (n, *ours), (m, *theirs) = outputs.shape, targets.shape
    if n == m and [d for d in ours if d != 1] == [d for d in theirs if d != 1]:
        return targets.reshape(outputs.shape)
    raise InputError(
        "model.loss",
        f"outputs of shape {tuple(ours)} for each instance don't go with targets of shape {tuple(theirs)}",
    )


def _of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the shape and dtype of outputs."""
    return like(outputs, targets).to(outputs.dtype)
