"""ResNet-9: the small residual network with which CIFAR-10 is usually trained fast."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fimo.errors import InputError


def convolution(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    """Return a 3 by 3 convolution, batch normalisation, ReLU, and 2 by 2 max pooling where asked."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class Residual(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = convolution(width, width), convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ResNet9(nn.Module):
    """Eight convolutions with two residual blocks, and a linear head: images ``[n, c, h, w]`` to logits.

    6,573,130 parameters at width 64 for ten classes (He et al., 2016, in the form of the DAWNBench entries);
    the paper's own image network was not released. Further training keeps the batch statistics frozen.

    Args:
        outputs: classes.
        channels: c.
        width: of the first layer; later ones are 2, 4 and 8 times as wide.
        scale: factor of the logits.
    """

    def __init__(self, outputs: int, channels: int = 3, width: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        if width < 1 or channels < 1:
            raise InputError(
                "model.network.width", f"expected at least 1 but got {width} ({channels} channels)"
            )
        self.prepare = convolution(channels, width)
        self.layer1 = nn.Sequential(convolution(width, 2 * width, pool=True), Residual(2 * width))
        self.layer2 = convolution(2 * width, 4 * width, pool=True)
        self.layer3 = nn.Sequential(convolution(4 * width, 8 * width, pool=True), Residual(8 * width))
        self.head = nn.Linear(8 * width, outputs)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prepare(x))))
        return self.scale * self.head(F.adaptive_max_pool2d(x, 1).flatten(1))
