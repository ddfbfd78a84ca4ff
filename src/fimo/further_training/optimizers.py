"""Optimizers of stacked networks, in place, as torch.optim defines them for one network."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.further_training.networks import StackedNetwork
from fimo.further_training.protocol import Protocol


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
        self.scratch = torch.empty_like(network.flat) if names else network.flat

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
        if p.weight_decay and p.optimizer != "adamw":
            gradient.add_(parameters, alpha=p.weight_decay)
        if p.optimizer == "sgd":
            if p.momentum:
                momentum = self.state["momentum"].mul_(p.momentum).add_(gradient)
                gradient = gradient.add_(momentum, alpha=p.momentum) if p.nesterov else momentum
            parameters.sub_(gradient, alpha=lr)
            return
        if p.weight_decay and p.optimizer == "adamw":
            parameters.mul_(1 - lr * p.weight_decay)
        beta1, beta2 = p.betas
        first = self.state["first_moment"].lerp_(gradient, 1 - beta1)
        second = self.state["second_moment"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = torch.sqrt(second, out=self.scratch).div_((1 - beta2**self.steps) ** 0.5).add_(p.eps)
        parameters.addcdiv_(first, denominator, value=-lr / (1 - beta1**self.steps))
