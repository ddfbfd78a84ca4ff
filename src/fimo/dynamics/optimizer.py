"""The optimizer's part of the response, on coefficients of Jacobian rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.further_training.protocol import Protocol


class CoefficientOptimizer:
    """Moves coefficients c of a parameter change ``P A^T c`` as the optimizer moves the parameters.

    Every optimizer here is linear in the gradient but for Adam's division by the root of its second moment,
    which is the fixed diagonal P (of the full run); a change of the second moment itself is left out. L2
    regularisation is exact for SGD and left out for Adam; clipping is left out.

    Args:
        shape: of the coefficients.
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


def preconditioner(protocol: Protocol, second_moment: dict[str, Tensor] | None) -> Tensor | None:
    """Return Adam's diagonal ``[P]``, 1 / (sqrt(second moment) + eps); None for SGD."""
    if protocol.optimizer == "sgd" or second_moment is None:
        return None
    flat = torch.cat([v.flatten() for v in second_moment.values()])
    return 1 / (flat.sqrt() + protocol.eps)
