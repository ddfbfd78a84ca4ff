"""What is asked of a loss: values, derivatives in the outputs, targets that it takes.

:class:`Loss` answers by automatic differentiation, and takes nothing for granted: a function of the user's
own is wrapped once, by :meth:`Loss.of`. Known losses (:mod:`fimo.models.losses`) answer by formula.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.errors import InputError, reason
from fimo.models.own_tensors import FollowingOutputs, following_outputs
from fimo.models.own_tensors import LossFunction as LossFunction

Targets = Literal["classes", "tokens", "labels", "values", "probabilities", "quantities"]
"""``classes [n]`` of outputs ``[n, C]``; ``tokens [n, T]`` of ``[n, T, V]``; ``labels``: either of these;
``values`` in the outputs' shape; ``probabilities``: values from 0 to 1; ``quantities``: those of a loss, with
what is measured before them (:mod:`fimo.models.quantities`)."""


class Loss(ABC):
    """A loss of each instance, a function of its own outputs and targets: ``loss(outputs, targets) -> [n]``.

    A subclass gives :meth:`__call__`, and the formulas that it has; D is the number of an instance's outputs.

    Attributes:
        name: in configurations and messages.
        targets: that it takes; None where that isn't known, so that conversions are tried.
        convex: in the outputs. Else Gauss-Newton leaves directions of negative curvature out.
        quadratic: its Hessian in the outputs is the same everywhere.
        saturates: its derivative at changed outputs is evaluated, not taken as linear in the change.
        draws: :meth:`sampled_gradients` are defined.
        better: 1 where a smaller value is a better prediction, -1 where a larger one is; None: not known.
    """

    name: str
    targets: ClassVar[Targets | None] = None
    convex: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False
    saturates: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    better: ClassVar[int | None] = 1

    @staticmethod
    def of(function: LossFunction) -> Loss:
        """Return a function as a loss; a loss as it is, also inside a ``functools.partial`` of nothing."""
        bare = function
        while isinstance(bare, functools.partial) and not bare.args and not bare.keywords:
            bare = bare.func
        if isinstance(bare, Loss):
            return bare
        return OwnLoss(function)

    def following(self, device: torch.device, dtype: torch.dtype) -> Loss:
        """Return the loss with its own tensors, if any, in the dtype of the outputs that it is given."""
        found = following_outputs(self.definition, device, dtype)
        return self if found is self.definition else OwnLoss(found)

    @property
    def definition(self) -> LossFunction:
        """What defines it: the loss, or the function of the user's own."""
        return self

    @property
    def quantity(self) -> str:
        """What a value of it is called."""
        return self.name.replace("_", " ")

    @property
    def of_classes(self) -> bool:
        """Whether targets are class labels."""
        return self.targets in ("classes", "tokens", "labels")

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the losses ``[n]``."""

    def by_token(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return a sequence's losses ``[n, T]`` by token, NaN where nothing is predicted; None of others."""
        return None

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each instance's derivative in its outputs, ``[n, ...]``."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self(leaf, targets).sum(), leaf)[0]

    def stacked_gradient(self, outputs: Tensor, targets: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write the gradient of sum_b weight_b * loss_b in the outputs, of R replicas, feature-major.

        Args:
            outputs: ``[R, D, B]``.
            targets: ``[R or 1, B]`` class indices or ``[R or 1, B, D]`` values.
            weight: ``[R, B]``.
            out: ``[R, D, B]``.
        """
        r, d, b = outputs.shape
        with torch.enable_grad():
            rows = outputs.transpose(1, 2).reshape(r * b, d).requires_grad_()
            flat = targets.expand(r, *targets.shape[1:]).flatten(0, 1)
            total = (self(rows, flat) * weight.reshape(-1)).sum()
            (gradient,) = torch.autograd.grad(total, rows)
        out.copy_(gradient.view(r, b, d).transpose(1, 2))

    def changed_gradient(
        self, outputs: Tensor, targets: Tensor, directions: Tensor, change: Tensor
    ) -> Tensor:
        """Return derivatives ``[n, R, C]`` along directions, at each of C changes of the outputs.

        Args:
            outputs: ``[n, D]``, flattened.
            targets: ``[n, ...]``.
            directions: ``[n, R, D]``.
            change: ``[n, R, C]``, of the outputs along the directions.
        """
        changed = outputs[:, None] + change.transpose(1, 2) @ directions  # [n, C, D]
        return directions @ self._flat_gradient(changed, targets).transpose(1, 2)

    def _flat_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return derivatives at C outputs ``[n, C, D]`` of each instance, with targets ``[n, ...]``."""
        each = targets[:, None].expand(len(targets), outputs.shape[1], *targets.shape[1:]).flatten(0, 1)
        return self.gradient(outputs.flatten(0, 1), each).view_as(outputs)

    @torch.enable_grad()
    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return second derivatives ``[n, D, D]`` in the flattened outputs."""
        leaf, gradient = self._differentiable_gradient(outputs, targets)
        if not gradient.requires_grad:  # linear in the outputs
            d = outputs.shape[1:].numel()
            return outputs.new_zeros(len(outputs), d, d)
        return torch.stack([_derivative(column, leaf) for column in gradient.unbind(1)], 1)

    @torch.enable_grad()
    def hessian_times(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the Hessians' products with K vectors of each instance, ``[n, K, D]``.

        Args:
            vectors: ``[n, K, D]``.
        """
        if outputs.shape[1:].numel() <= vectors.shape[1]:
            return vectors @ self.hessian(outputs, targets)
        leaf, gradient = self._differentiable_gradient(outputs, targets)
        if not gradient.requires_grad:
            return torch.zeros_like(vectors)
        return torch.stack([_derivative(gradient, leaf, v) for v in vectors.unbind(1)], 1)

    def _differentiable_gradient(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs, and the derivative ``[n, D]`` in them as a function of them.

        Value i depends on outputs i alone, so that derivatives of sums are each one's; not by torch.func,
        whose vmap refuses losses that choose by a mask, and whose forward mode is the process's, not a
        thread's.
        """
        leaf = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self(leaf, targets).sum(), leaf, create_graph=True)
        return leaf, gradient.flatten(1)

    def hessian_between(self, outputs: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """Return second derivatives ``[n, R, R]`` between directions ``[n, R, D]``."""
        return directions @ self.hessian(outputs, targets) @ directions.transpose(1, 2)

    def hessian_root(self, outputs: Tensor, targets: Tensor, tolerance: float = 1e-7) -> Tensor:
        """Return square roots of the Hessians, without their negative part.

        Args:
            outputs: ``[n, ...]``.
            tolerance: eigenvalues of at most this share of an instance's largest count as zero.

        Returns:
            ``[n, R, ...]`` with ``sum_r row_r row_r^T = H``; R is :meth:`rank`.
        """
        shape = outputs.shape[1:]
        values: Tensor
        values, vectors = torch.linalg.eigh(self.hessian(outputs, targets).double())
        largest = values.abs().amax(-1, keepdim=True)
        values = torch.where(values > tolerance * largest, values, torch.zeros_like(values))
        # the rank is the loss's by its form, not by the data: R must not depend on the batch
        rows: Tensor = (vectors * values.sqrt()[:, None, :]).transpose(1, 2)
        rows = rows[:, shape.numel() - self.rank(shape) :]
        return rows.to(outputs.dtype).reshape(len(outputs), -1, *shape)

    def rank(self, shape: torch.Size) -> int:
        """Return the largest rank of the Hessian in an instance's outputs of some shape."""
        return shape.numel()

    def common_directions(self, d: int) -> Tensor | None:
        """Return orthonormal ``[R, D]``, R < D, that span all derivatives; None where none are known."""
        return None

    def sampled_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Return derivatives for targets drawn from the model's own prediction.

        Their outer products are unbiased for the Hessian in the outputs.

        Returns:
            ``[n, samples, ...]``, each divided by ``sqrt(samples)``.

        Raises:
            NotImplementedError: the loss says nothing about how targets are distributed.
        """
        raise NotImplementedError(f"no sampling rule for the loss {self.name}")

    def scalar_output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar f of the outputs that the loss is a function of, ``[n]``; else the loss."""
        return self(outputs, targets)

    def scalar_slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return dloss/df ``[n]`` in the scalar f."""
        return torch.ones(len(outputs), dtype=outputs.dtype, device=outputs.device)

    def best_constant(self, targets: Tensor, width: int) -> Tensor | None:
        """Return the outputs of one instance (or position) with the least mean loss; None: not known.

        Args:
            targets: ``[n, ...]`` in the loss's form.
            width: of the outputs' last axis.
        """
        return None


def _derivative(values: Tensor, leaf: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the derivative of sum(values * weights) in the leaf, ``[n, D]``."""
    weights = torch.ones_like(values) if weights is None else weights
    try:
        found = torch.autograd.grad(values, leaf, weights, retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):  # as torch says of an operation without a derivative
            raise
        raise InputError(
            "model.loss",
            f"the loss has no second derivative ({reason(error)}), which this method needs; write it in "
            "other operations of torch, or choose a method that takes gradients alone (mirrored, sketched, "
            "datainf, trak, logra, tracin, less, graddot, gradcos)",
        ) from error
    return found[0].flatten(1)


@dataclass(frozen=True)
class OwnLoss(Loss):
    """A function of the user's own as a loss: everything by automatic differentiation."""

    function: LossFunction

    @property
    def definition(self) -> LossFunction:
        return self.function

    @property
    def name(self) -> str:  # type: ignore[override]
        named = self._own
        return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', repr(named))}"

    @property
    def better(self) -> int | None:  # type: ignore[override]
        """As the function's attribute says, or that of what a partial calls; PyTorch's are losses."""
        called = _called(self._own)
        of_torch = getattr(called, "__module__", "") in ("torch.nn.modules.loss", "torch.nn.functional")
        return getattr(self._own, "better", getattr(called, "better", 1 if of_torch else None))

    @property
    def quantity(self) -> str:
        called = _called(self._own)
        return str(getattr(called, "__name__", type(called).__name__))

    @property
    def _own(self) -> LossFunction:
        return self.function.loss if isinstance(self.function, FollowingOutputs) else self.function

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.function(outputs, targets)


def _called(function: LossFunction) -> LossFunction:
    """Return what a ``functools.partial`` calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return function
