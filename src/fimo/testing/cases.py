"""The shared list of small cases: each a float64 final model with training and test instances.

    @pytest.mark.parametrize("name", CASES)
    def test_...(name: str) -> None:
        case = CASES[name]()

A case is built once per process; nothing may change it. ``case.to(torch.float32)`` is the same in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel, apply
from fimo.models.losses import Loss, cross_entropy, mean_squared_error


@dataclass(frozen=True)
class Case:
    """A final model in float64 with its data, small enough for dense P x P references."""

    name: str
    final_model: FinalModel
    train: Instances
    test: Instances

    def to(self, dtype: torch.dtype) -> Case:
        return Case(
            self.name, self.final_model.to(dtype=dtype), self.train.to(dtype=dtype), self.test.to(dtype=dtype)
        )


class ConvNet(nn.Module):
    """A convolution, frozen batch statistics, pooling and a linear layer: ``[n, 2, 6, 6] -> [n, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=1, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x)))
        x = F.gelu(self.conv2(x))
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


class Transformer(nn.Module):
    """Predicts the next token with the embedding as output weight: ``[n, T] int64 -> [n, V]``.

    Tied weights, LayerNorm, a learned position table, fused attention and a linear layer applied to
    ``[n, T, d]``; tokens equal to 0 are padding.
    """

    def __init__(self, vocabulary: int = 7, width: int = 4, length: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.3 * torch.randn(length, width))
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 6)
        self.down = nn.Linear(6, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.position
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        keep = (input_ids != 0)[:, None, None, :]
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=keep)[:, 0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        outputs: Tensor = self.head(x[:, -1])
        return outputs


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    """A plain MLP whose modules are Linear and ``activation`` in turn."""
    widths = (inputs, *hidden)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def mlp_regression() -> Case:
    """MLP 4-6-5-1, tanh, mean squared error; N = 23, J = 5, P = 71."""
    inputs = torch.randn(28, 4)
    targets = (inputs[:, :1] * inputs[:, 1:2] + inputs[:, 2:3]).sin() + 0.3 * torch.randn(28, 1)
    return trained("mlp_regression", mlp(4, (6, 5), 1, nn.Tanh), mean_squared_error, inputs, targets, 23)


def mlp_classification() -> Case:
    """MLP 4-6-5-3, ReLU, cross-entropy; N = 23, J = 5, P = 83."""
    inputs = torch.randn(28, 4)
    targets = (inputs @ torch.randn(4, 3) + 0.5 * torch.randn(28, 3)).argmax(-1)
    return trained("mlp_classification", mlp(4, (6, 5), 3, nn.ReLU), cross_entropy, inputs, targets, 23)


def conv_net() -> Case:
    """Convolutions and a BatchNorm with learned statistics, cross-entropy; N = 13, J = 4, P = 186."""
    inputs = torch.randn(17, 2, 6, 6)
    targets = torch.randint(3, (17,))
    network = ConvNet()
    network.norm.running_mean = 0.2 * torch.randn(3)
    network.norm.running_var = 0.5 + torch.rand(3)
    return trained("conv_net", network, cross_entropy, inputs, targets, 13)


def transformer() -> Case:
    """A transformer layer with tied embeddings, cross-entropy of the next token; N = 13, J = 4, P = 182."""
    inputs = torch.randint(1, 7, (17, 5))
    inputs[::3, :2] = 0  # some instances are padded on the left
    targets = torch.randint(1, 7, (17,))
    return trained("transformer", Transformer(), cross_entropy, inputs, targets, 13)


def trained(
    name: str, network: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, n: int, steps: int = 40
) -> Case:
    """Return a case with the first n instances for training, after a few steps of gradient descent."""
    train, test = Instances(inputs[:n], targets[:n]), Instances(inputs[n:], targets[n:])
    network.eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(apply(network, train.inputs), train.targets).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return Case(name, FinalModel(network, loss), train, test)


def _cached(make: Callable[[], Case], seed: int) -> Callable[[], Case]:
    @functools.cache
    def cached() -> Case:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return make()
        finally:
            torch.set_default_dtype(before)

    return cached


CASES: dict[str, Callable[[], Case]] = {
    make.__name__: _cached(make, seed)
    for seed, make in enumerate([mlp_regression, mlp_classification, conv_net, transformer])
}
LINEAR_CASES = ["mlp_regression", "mlp_classification"]
"""The cases whose networks are linear layers and activations only."""
