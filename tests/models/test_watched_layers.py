"""Networks of linear layers under a ``forward`` of the user's own: found where they are, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import fimo
from fimo.data.instances import Instances
from fimo.models.activations import RELU, TANH
from fimo.models.adapted import Adapted
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import Layer, forward, layers_on, linear_layers

WIDTH = 4


class Base(nn.Module):
    """Layers in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(5, 3), nn.Linear(WIDTH, 5)
        self.calls = 0


def network(forward: Callable[[Any, Tensor], Tensor], base: type[nn.Module] = Base) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = type("Own", (base,), {"forward": forward})()
    return made


FIRST, SECOND = ("first.weight", "first.bias"), ("second.weight", "second.bias")
RELUS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functional": lambda s, x: s.second(functional.relu(s.first(x))),
    "in place": lambda s, x: s.second(functional.relu(s.first(x), inplace=True)),
    "in place by position": lambda s, x: s.second(functional.relu(s.first(x), True)),
    "torch": lambda s, x: s.second(torch.relu(s.first(x))),
    "method": lambda s, x: s.second(s.first(x).relu()),
    "method in place": lambda s, x: s.second(s.first(x).relu_()),
    "by hand": lambda s, x: functional.linear(
        torch.relu(functional.linear(x, s.first.weight, s.first.bias)), s.second.weight, bias=s.second.bias
    ),
    "viewed": lambda s, x: s.second(s.first(x.view(x.size(0), -1)).relu()),
    "shape": lambda s, x: s.second(s.first(x.reshape(x.shape[0], -1)).relu()),
    "flattened": lambda s, x: s.second(s.first(torch.flatten(x, 1)).relu()),
    "flattened if need be": lambda s, x: s.second(s.first(x.flatten(1) if x.dim() > 2 else x).relu()),
    "no dropout": lambda s, x: s.second(functional.dropout(s.first(x).relu(), 0.0, s.training)),
}


@pytest.mark.parametrize("forward", RELUS.values(), ids=RELUS)
def test_layers_are_found_in_the_order_of_their_calls(forward: Callable[[Any, Tensor], Tensor]) -> None:
    net = network(forward)
    before = torch.get_rng_state()
    assert linear_layers(net) == [Layer(*FIRST, RELU), Layer(*SECOND)]
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "sigmoid": Tensor.sigmoid, "silu": functional.silu, "gelu": functional.gelu,
    "gelu by tanh": lambda z: functional.gelu(z, approximate="tanh"), "leaky relu": functional.leaky_relu,
    "leaky relu by position": lambda z: functional.leaky_relu(z, 0.3),
    "leaky relu by name": lambda z: functional.leaky_relu(z, negative_slope=0.3, inplace=True),
    "elu": lambda z: functional.elu(z, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_functions_are_the_activations_that_they_are(activation: Callable[[Tensor], Tensor]) -> None:
    net = network(lambda s, x: s.second(activation(s.first(x)))).double()
    layers = linear_layers(net)
    assert layers is not None
    rows = torch.randn(7, WIDTH, dtype=torch.float64)
    found = forward(layers, dict(net.named_parameters()), rows)
    torch.testing.assert_close(found.outputs, net(rows).detach(), rtol=1e-12, atol=1e-12)


def _grad_reversed(s: Any, x: Tensor) -> Tensor:
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return -g

    result: Tensor = s.second(Reversed.apply(s.first(x)))  # type: ignore[no-untyped-call]
    return result


def _catching(s: Any, x: Tensor) -> Tensor:
    try:
        x = s.first(2 * x)
    except Exception:  # of whatever kind
        x = s.first(x)
    result: Tensor = s.second(x)
    return result


def _frozen(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = s.first(x)
    result: Tensor = s.second(x)
    return result


def _in_turns(s: Any, x: Tensor) -> Tensor:
    s.calls += 1
    result: Tensor = s.second(s.first(x).relu() if s.calls % 2 else s.first(x))
    return result


def _halved(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result: Tensor = s.second(s.first(x))
    return result


OTHERWISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "residual": lambda s, x: s.second(s.first(x) + x[:, :1]),
    "scaled": lambda s, x: s.second(2 * s.first(x)),
    "scaled inputs": lambda s, x: s.second(s.first(x / 255)),
    "another activation": lambda s, x: s.second(functional.softplus(s.first(x))),
    "an activation whose side is lost": lambda s, x: s.second(functional.leaky_relu(s.first(x), -0.1)),
    "two activations": lambda s, x: s.second(s.first(x).relu().tanh()),
    "first an activation": lambda s, x: s.second(s.first(x.relu())),
    "softmax": lambda s, x: s.second(s.first(x)).log_softmax(-1),
    "squeezed": lambda s, x: s.second(s.first(x)).squeeze(-1),
    "in a row": lambda s, x: s.second(s.first(x)).flatten(),
    "one of the outputs": lambda s, x: s.second(s.first(x))[:, 0],
    "a layer apart": lambda s, x: (s.first(x), s.second(torch.zeros(len(x), 5)))[1],
    "detached": lambda s, x: s.second(s.first(x).detach()),
    "without gradients": _frozen,
    "catching errors": _catching,
    "reversed gradients": _grad_reversed,
    "dropout": lambda s, x: s.second(functional.dropout(s.first(x), 0.1, s.training)),
    "dropout in eval mode": lambda s, x: s.second(functional.dropout(s.first(x), 0.1)),
    "noise in train mode": lambda s, x: s.second(s.first(x + torch.randn(4) if s.training else x)),
    "otherwise in train mode": lambda s, x: s.second(s.first(x).relu() if s.training else s.first(x)),
    "by values": lambda s, x: s.second(s.first(x).relu() if x.sum() > 0 else s.first(x)),
    "by the batch's size": lambda s, x: s.second(s.first(x).relu() if x.size(0) > 1 else s.first(x)),
    "in turns": _in_turns,
    "halved": _halved,
    "only one of two": lambda s, x: s.first(x),
    "a matrix's own product": lambda s, x: s.second(x @ s.first.weight.T + s.first.bias),
    "through an image": lambda s, x: s.second(s.first(x.view(-1, 2, 2).transpose(1, 2).flatten(1))),
    "an error": lambda s, x: s.third(x),
    "no tensor": lambda s, x: (s.second(s.first(x)),),  # type: ignore[return-value]
}  # fmt: skip


@pytest.mark.parametrize("forward", OTHERWISE.values(), ids=OTHERWISE)
def test_whatever_else_a_network_does_is_no_sequence(forward: Callable[[Any, Tensor], Tensor]) -> None:
    net = network(forward)
    before = torch.get_rng_state()
    assert linear_layers(net) is None
    assert torch.equal(torch.get_rng_state(), before)


def _plain(s: Any, x: Tensor) -> Tensor:
    result: Tensor = s.second(s.first(x).relu())
    return result


def test_layers_that_are_more_than_linear_are_no_sequence() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Buffered(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

    class Normed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(5)

    assert linear_layers(network(_plain, Buffered)) is None
    assert linear_layers(network(lambda s, x: s.second(s.norm(s.first(x))), Normed)) is None
    for change in ("scaled", "weight norm", "tied", "hook", "lazy"):
        net = network(_plain)
        assert linear_layers(net) is not None
        net = network(_plain)
        if change == "scaled":
            net.first = Scaled(4, 5)
        elif change == "weight norm":
            weight_norm(net.first)  # type: ignore[arg-type]
        elif change == "tied":
            net.first = nn.Linear(4, 4)
            net.second = nn.Linear(4, 4)
            net.second.weight = net.first.weight
        elif change == "hook":
            net.first.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
        else:
            net.first = nn.LazyLinear(5)
        assert linear_layers(net) is None, change


def test_wrapped_and_nested_networks_and_lightning_modules() -> None:
    inner = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 3))

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = inner

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            result: Tensor = self.net(x if mask is None else x * mask)
            return result

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Nested()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x)
            return result

    assert linear_layers(Nested()) == [
        Layer("net.0.weight", "net.0.bias", TANH), Layer("net.2.weight", "net.2.bias"),
    ]  # fmt: skip
    found = linear_layers(Module())
    assert found is not None
    assert [layer.weight for layer in found] == ["net.net.0.weight", "net.net.2.weight"]


@torch.inference_mode()
def test_inference_mode_and_autocast_of_the_caller_change_nothing() -> None:
    with torch.inference_mode(False):
        net = network(_plain)
    assert linear_layers(net) is not None


LOOKING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "turned": lambda s, x: s.second(s.first(x.transpose(1, 2).flatten(1) if x.dim() == 3 else x).relu()),
    "clamped": lambda s, x: s.second(s.first(x.flatten(1).clamp(-1, 1) if x.dim() == 3 else x).relu()),
}


@pytest.mark.parametrize("name", LOOKING)
def test_a_network_that_does_otherwise_with_instances_of_more_axes_is_no_sequence(name: str) -> None:
    model = FinalModel(network(LOOKING[name]), "cross_entropy", accept_poor=True)
    inputs = 3 * torch.randn(6, 2, 2)
    inputs[0] = 0  # an instance with which both ways agree
    assert layers_on(model, Instances(inputs, torch.arange(6) % 3)) is None
    assert layers_on(model, Instances(inputs.flatten(1), torch.arange(6) % 3)) is not None


def test_of_images_the_layers_hold_where_they_are_only_flattened() -> None:
    images = Instances(torch.randn(6, 1, 2, 2), torch.zeros(6, dtype=torch.long))

    def turned(s: Any, x: Tensor) -> Tensor:
        if x.dim() > 2:
            x = x.transpose(2, 3).flatten(1)
        result: Tensor = s.second(s.first(x))
        return result

    flat = FinalModel(network(RELUS["flattened"]), "cross_entropy", accept_poor=True)
    other = FinalModel(network(turned), "cross_entropy", accept_poor=True)
    assert layers_on(flat, images) is not None
    assert linear_layers(other.network) is not None  # of flat rows
    assert layers_on(other, images) is None


class Single(nn.Module):
    """One output for each instance, ``[n]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 5), nn.Linear(5, 1)


SQUEEZED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "last": lambda s, x: s.last(s.first(x).relu()).squeeze(-1),
    "second": lambda s, x: torch.squeeze(s.last(s.first(x).relu()), 1),
    "viewed": lambda s, x: s.last(s.first(x).relu()).view(-1),
    "flattened": lambda s, x: s.last(s.first(x).relu()).flatten(),
    "taken": lambda s, x: s.last(s.first(x).relu())[:, 0],
}


@pytest.mark.parametrize("forward", SQUEEZED.values(), ids=SQUEEZED)
def test_a_squeezed_output_that_is_made_a_column_again_is_seen_through(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    net = network(forward, Single)
    assert linear_layers(net) is None
    found = linear_layers(Adapted(net, column=True))
    assert found == [
        Layer("network.first.weight", "network.first.bias", RELU),
        Layer("network.last.weight", "network.last.bias"),
    ]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.sigmoid(s.last(s.first(x)).squeeze(-1)),
        lambda s, x: s.last(s.first(x))[:1, 0],
        lambda s, x: s.last(s.first(x)).squeeze(),  # of a batch of one a number
        lambda s, x: s.last(s.first(x)).squeeze(-1) + 1,
    ],
)
def test_what_else_happens_to_a_squeezed_output_is_not(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert linear_layers(Adapted(network(forward, Single), column=True)) is None


FOLLOWING = ["exact", "cg", "lissa", "source", "response", "calibrated", "best", "unrolled", "mirrored",
             "sketched", "daunce"]  # fmt: skip
METHODS = ["graddot", "datainf", "ekfac", "kfac", "arnoldi", "less", "logra", "unlearning", *FOLLOWING]
"""But those whose random directions depend on the order of parameters."""


@pytest.mark.parametrize("method", METHODS)
def test_the_answer_is_that_of_the_same_layers_in_a_row(method: str) -> None:
    own = network(_plain).double()
    row = nn.Sequential(own.first, nn.ReLU(), own.second)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    train, test = Instances(inputs[:30], targets[:30]), Instances(inputs[30:], targets[30:])
    protocol = fimo.Protocol(lr=0.02, batch_size=10, epochs=2, dtype="float64")
    follows = {"further_training": protocol, "seeds": range(4)} if method in FOLLOWING else {}
    models = [FinalModel(net, "mse", accept_poor=True) for net in (own, row)]
    found = [fimo.attribute(m, train, test, method, list(range(9)), **follows).values for m in models]
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-12)


def test_further_training_is_that_of_the_same_layers_in_a_row() -> None:
    own = network(_plain)
    row = nn.Sequential(own.first, nn.ReLU(), own.second)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    data = Instances(torch.randn(30, WIDTH, generator=generator), torch.randn(30, 3, generator=generator))
    protocol = fimo.Protocol(optimizer="adam", lr=1e-3, batch_size=10, epochs=2)
    models = [FinalModel(net, "mse", accept_poor=True) for net in (own, row)]
    truth = [fimo.further_train(m, data, data[:5], protocol, range(2), list(range(5))).raw for m in models]
    assert torch.equal(*truth)
