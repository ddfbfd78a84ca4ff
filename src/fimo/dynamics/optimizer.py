"""The optimizer's part of the response, on coefficients of Jacobian rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.curvature.rows import FactoredRows, LayerFactors, Rows
from fimo.further_training.protocol import Protocol


class CoefficientOptimizer:
    """Moves coefficients c of a parameter change ``P A^T c`` as the optimizer moves the parameters.

    Every optimizer here is linear in the gradient but for Adam's division by the root of its second moment,
    which is the fixed diagonal P (of the full run); a change of the second moment itself is left out. L2
    regularisation is exact for SGD and left out for Adam; clipping is left out.

    Args:
        shape: of the coefficients, their rows first.
    """

    def __init__(self, protocol: Protocol, shape: tuple[int, ...], like: Tensor) -> None:
        self.protocol, self.taken = protocol, 0
        self.coefficients = torch.zeros(shape, dtype=like.dtype, device=like.device)
        adaptive = protocol.optimizer != "sgd"
        stateful = adaptive or protocol.momentum > 0
        self.average = torch.zeros_like(self.coefficients) if stateful else None

    def step(self, index: Tensor, gradient: Tensor, lr: float) -> None:
        """Take a step along the change of a batch's gradient, whose coefficients at ``index`` are given."""
        p, c = self.protocol, self.coefficients
        self.taken += 1
        if p.optimizer == "sgd":
            if p.weight_decay and self.average is None:
                c.mul_(1 - lr * p.weight_decay)
            if self.average is None:
                c.index_add_(0, index, gradient, alpha=-lr)
                return
            self.average.mul_(p.momentum).add_(c, alpha=p.weight_decay).index_add_(0, index, gradient)
            if p.nesterov:
                c.mul_(1 - lr * p.weight_decay).index_add_(0, index, gradient, alpha=-lr)
                c.sub_(self.average, alpha=lr * p.momentum)
            else:
                c.sub_(self.average, alpha=lr)
            return
        assert self.average is not None
        beta1 = p.betas[0]
        self.average.mul_(beta1).index_add_(0, index, gradient, alpha=1 - beta1)
        if p.optimizer == "adamw" and p.weight_decay:
            c.mul_(1 - lr * p.weight_decay)
        c.sub_(self.average, alpha=lr / (1 - beta1**self.taken))


class Inertia:
    """What becomes of a parameter change and of its momentum while nothing else acts on them.

    Args:
        taken: optimizer steps before (Adam's bias correction counts them).

    Attributes:
        change: ``(of the change, of the momentum)``, what the change is a sum of, as shares of both at first.
        momentum: the same of the momentum.
    """

    def __init__(self, protocol: Protocol, taken: int) -> None:
        self._optimizer = CoefficientOptimizer(protocol, (2, 1), torch.zeros(1, dtype=torch.float64))
        self._optimizer.taken = taken
        self._optimizer.coefficients[0] = 1.0
        if self._optimizer.average is not None:
            self._optimizer.average[1] = 1.0
        self.change, self.momentum = (1.0, 0.0), (0.0, 1.0)

    def step(self, lr: float) -> None:
        """Take an optimizer step."""
        nothing = torch.zeros(0, dtype=torch.int64)
        self._optimizer.step(nothing, torch.zeros(0, 1, dtype=torch.float64), lr)
        self.change = tuple(self._optimizer.coefficients[:, 0].tolist())
        if self._optimizer.average is not None:
            self.momentum = tuple(self._optimizer.average[:, 0].tolist())


def preconditioner(protocol: Protocol, second_moment: dict[str, Tensor] | None) -> Tensor | None:
    """Return Adam's diagonal ``[P]``, 1 / (sqrt(second moment) + eps); None for SGD."""
    if protocol.optimizer == "sgd" or second_moment is None:
        return None
    flat = torch.cat([v.flatten() for v in second_moment.values()])
    return 1 / (flat.sqrt() + protocol.eps)


def scaled(rows: Rows, second_moment: dict[str, Tensor], protocol: Protocol) -> Rows | None:
    """Return factored rows times the square root of a preconditioner that keeps them factored.

    Each weight's diagonal D [out, in] is replaced by a b^T with the same energy in every row and column,
    sum_i D v = sum_i a b v and sum_o D v = sum_o a b v with v the second moment (by proportional fitting), so
    that inner products cost as little as without it. None for rows that aren't factored.
    """
    if not isinstance(rows, FactoredRows):
        return None
    layers = []
    for layer in rows.layers:
        if layer.weight:
            v = second_moment[layer.weight].double()
            left, right = _proportional_fit(v, v / (v.sqrt() + protocol.eps))
            left, right = left.sqrt().to(rows.dtype), right.sqrt().to(rows.dtype)
            layers.append(LayerFactors(layer.weight, None, layer.entering * right, layer.delta * left))
        if layer.bias:
            diagonal = 1 / (second_moment[layer.bias].sqrt() + protocol.eps)
            layers.append(LayerFactors(None, layer.bias, layer.entering, layer.delta * diagonal.sqrt()))
    return FactoredRows(tuple(layers), rows.shapes)


def _proportional_fit(base: Tensor, target: Tensor, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Return a ``[m]`` and b ``[n]`` for which a base b^T has target's row and column sums (nearly)."""
    left, right = torch.ones_like(base[:, 0]), torch.ones_like(base[0])
    tiny = torch.finfo(base.dtype).tiny
    for _ in range(rounds):
        left = target.sum(1) / (base @ right).clamp(min=tiny)
        right = target.sum(0) / (left @ base).clamp(min=tiny)
    return left, right
