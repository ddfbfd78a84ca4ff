"""Optimizers of stacked networks, in place, as torch.optim defines them for one network."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.engine.stacked import StackedNetwork


class StackedOptimizer:
    """Moves a stacked network's R copies, each by its own gradient.

    Args:
        network: whose ``flat`` parameters are moved along its ``flat_gradient``.
        protocol: optimizer, momentum, weight decay and clipping.
    """

    def __init__(self, network: StackedNetwork, protocol: Protocol) -> None:
        self.network, self.protocol = network, protocol
        self.state: dict[str, Tensor] = {}
        self.steps = 0
        names: tuple[str, ...] = ("momentum",) if protocol.momentum else ()
        if protocol.optimizer in ("adam", "adamw"):
            names = ("first_moment", "second_moment")
        for name in names:
            self.state[name] = torch.zeros_like(network.flat)

    @property
    def fusible(self) -> bool:
        """Whether a step is parameters - lr * (gradient + decay * parameters), with no state."""
        return (
            self.protocol.optimizer == "sgd"
            and not self.protocol.momentum
            and self.protocol.clip_norm is None
        )

    def step(self, lr: float) -> None:
        """Make one step along the network's gradient, which is overwritten."""
        p = self.protocol
        parameters, gradient = self.network.flat, self.network.flat_gradient
        self.steps += 1
        if p.clip_norm is not None:
            scale = (p.clip_norm / (self.network.norms(gradient) + 1e-6)).clamp_(max=1.0)
            for block in self.network.blocks(gradient):
                block.mul_(scale[:, None])
        # torch.optim's fused kernels: one pass over parameters, gradient and state
        if p.optimizer == "sgd":
            momentum = [self.state["momentum"]] if p.momentum else []
            torch._fused_sgd_(
                [parameters], [gradient], momentum, weight_decay=p.weight_decay, momentum=p.momentum, lr=lr,
                dampening=0.0, nesterov=p.nesterov, maximize=False, is_first_step=False,
            )  # fmt: skip
            return
        step = torch._fused_adam_ if p.optimizer == "adam" else torch._fused_adamw_
        made = torch.full((), float(self.steps), dtype=torch.float32, device=parameters.device)
        step(
            [parameters], [gradient], [self.state["first_moment"]], [self.state["second_moment"]], [], [made],
            lr=lr, beta1=p.betas[0], beta2=p.betas[1], weight_decay=p.weight_decay, eps=p.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
