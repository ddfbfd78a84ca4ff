"""A user's module, whose parts tests change: a network, losses, and settings that they read."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests import own_settings as settings

GAMMA = 0.0
CONFIG = SimpleNamespace(gamma=[0.0, 1.0])


class Helper:
    """An object that a forward pass uses."""

    def __init__(self) -> None:
        self.power, self.names, self.table = 2, ["a", "b"], {"a": 1, "b": 2}

    def __call__(self, x: Tensor) -> Tensor:
        return x**self.power


class Block(nn.Module):
    """A part of a network, with everything that a forward pass can read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.helper = Helper()
        self.gain: Any = 1
        self.maybe: Any = None
        self.flag = True
        self.widths: Any = [1, 2, 3]
        self.pair: Any = (1, 2)
        self.table: Any = {"first": 1, "second": [2, 3]}
        self.names: Any = {"x", "y", "z"}
        self.text = "mean"
        self.act: Any = torch.tanh
        self.scale: Any = functools.partial(torch.mul, torch.ones(2000))
        self.plain = torch.arange(5000.0)
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) * self.gain


class Net(nn.Module):
    """Two blocks."""

    hidden = 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.again = self.first  # registered twice

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    return squared(outputs, targets) ** GAMMA


def configured(outputs: Tensor, targets: Tensor) -> Tensor:
    return squared(outputs, targets) ** CONFIG.gamma[0]


def elsewhere(outputs: Tensor, targets: Tensor) -> Tensor:
    return focal(outputs, targets) * settings.SCALE


def weighted(outputs: Tensor, targets: Tensor, weight: Any = None) -> Tensor:
    return squared(outputs, targets) * weight.sum()


def raised(power: Any) -> Any:
    def loss(outputs: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * squared(outputs, targets) ** power

    return loss


class Loss:
    """A loss with a state."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return squared(outputs, targets) * self.weight
