"""ResNet-9: the small residual network with which CIFAR-10 is usually trained fast."""

from __future__ import annotations

from collections import OrderedDict

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
        change: Tensor = self.second(self.first(x))
        return x + change


def resnet9(outputs: int, channels: int = 3, width: int = 64) -> nn.Sequential:
    """Return eight convolutions with two residual blocks, and a linear head: ``[n, c, h, w]`` to logits.

    6,573,130 parameters at width 64 for ten classes (He et al., 2016, in the form of the DAWNBench entries);
    the paper's own image network was not released. Further training keeps the batch statistics frozen.

    Args:
        outputs: classes.
        channels: c.
        width: of the first layer; later ones are 2, 4 and 8 times as wide.

    Raises:
        InputError: a width or a number of channels below 1.
    """
    if width < 1 or channels < 1:
        raise InputError("model.network.width", f"expected at least 1 but got {width} ({channels} channels)")
    return nn.Sequential(
        OrderedDict(
            prepare=convolution(channels, width),
            layer1=nn.Sequential(convolution(width, 2 * width, pool=True), Residual(2 * width)),
            layer2=convolution(2 * width, 4 * width, pool=True),
            layer3=nn.Sequential(convolution(4 * width, 8 * width, pool=True), Residual(8 * width)),
            pool=nn.AdaptiveMaxPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(8 * width, outputs),
        )
    )
