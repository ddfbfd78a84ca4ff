"""Stacked networks of linear layers, by batched matrix products written out.

Activations are kept feature-major, ``[R, features, B]``: with weights as torch keeps them, ``[R, out, in]``,
every product then has an operand layout that the matrix library runs near its peak, also for the one or few
outputs of the last layer, where the instance-major form is up to ten times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs, Instances
from fimo.further_training.networks import StackedNetwork
from fimo.further_training.schedule import Batch
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, mean_squared_error

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise activation with its derivative in place.

    Args:
        forward: ``(before, after)``, writes ``after``; they are the same tensor if ``from_output``.
        backward: ``(gradient, value)``, multiplies the gradient in place by the derivative at ``value``.
        from_output: the derivative is a function of the activation's output.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor], object]
    from_output: bool = True


RELU = Activation(
    lambda before, after: torch.clamp_min(before, 0, out=after),
    lambda g, after: aten.threshold_backward.grad_input(g, after, 0, grad_input=g),
)
TANH = Activation(
    lambda before, after: torch.tanh(before, out=after),
    lambda g, after: aten.tanh_backward.grad_input(g, after, grad_input=g),
)
SIGMOID = Activation(
    lambda before, after: torch.sigmoid(before, out=after),
    lambda g, after: aten.sigmoid_backward.grad_input(g, after, grad_input=g),
)
SILU = Activation(
    lambda before, after: aten.silu.out(before, out=after),
    lambda g, before: aten.silu_backward.grad_input(g, before, grad_input=g),
    from_output=False,
)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda before, after: aten.gelu.out(before, approximate=approximate, out=after),
        lambda g, before: aten.gelu_backward.grad_input(g, before, approximate=approximate, grad_input=g),
        from_output=False,
    )


def _activation(module: nn.Module) -> Activation | None:
    if type(module) is nn.GELU:
        return _gelu(module.approximate)
    return {nn.ReLU: RELU, nn.Tanh: TANH, nn.Sigmoid: SIGMOID, nn.SiLU: SILU}.get(type(module))


@dataclass(frozen=True)
class Layer:
    """A linear layer (names of its parameters) and the activation after it."""

    weight: str
    bias: str | None
    activation: Activation | None = None


def linear_layers(network: nn.Module) -> list[Layer] | None:
    """Return a network's layers if it is a sequence of linear layers and activations, else None.

    Nested ``nn.Sequential``, a leading ``nn.Flatten``, identities and dropout with rate 0 are seen through.
    Layers with hooks, tied parameters or a type of the user's own are not.
    """
    if not _is_sequence(network):
        return None
    layers: list[Layer] = []
    parameters = 0
    for name, module in network.named_modules(remove_duplicate=False):
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if _is_sequence(module) or _passes_through(module) or (type(module) is nn.Flatten and not layers):
            continue
        if type(module) is nn.Linear:
            bias = f"{name}.bias" if module.bias is not None else None
            layers.append(Layer(f"{name}.weight", bias))
            parameters += 1 + (bias is not None)
        elif (activation := _activation(module)) and layers and layers[-1].activation is None:
            layers[-1] = Layer(layers[-1].weight, layers[-1].bias, activation)
        else:
            return None
    tied = parameters != len(list(network.parameters()))
    return None if tied or not layers else layers


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _passes_through(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


class _Workspace:
    """Buffers of one batch size, so that a step allocates nothing of size."""

    def __init__(self, network: LinearNetwork, instances: int) -> None:
        def empty(rows: int) -> Tensor:
            return torch.empty(network.replicas, rows, instances, dtype=network.dtype, device=network.device)

        rows = [network.parameters[layer.weight].shape[1] for layer in network.layers]
        self.before = [empty(n) for n in rows]
        self.after = [
            b if layer.activation is None or layer.activation.from_output else torch.empty_like(b)
            for layer, b in zip(network.layers, self.before, strict=True)
        ]
        self.delta = [empty(n) for n in rows]
        width = network.parameters[network.layers[0].weight].shape[2]
        self.inputs = torch.empty(
            network.replicas, instances, width, dtype=network.dtype, device=network.device
        )


class LinearNetwork(StackedNetwork):
    """R copies of a network of linear layers: one batched product per layer and direction."""

    def __init__(self, final_model: FinalModel, replicas: int, evaluation_model: FinalModel) -> None:
        super().__init__(final_model, replicas, evaluation_model)
        layers = linear_layers(final_model.network)
        if layers is None:
            raise ValueError("not a sequence of linear layers and activations")
        self.layers = layers
        first = self.parameters[layers[0].weight]
        self.dtype, self.device = first.dtype, first.device
        evaluation = next(iter(evaluation_model.parameters().values()))
        self.evaluation_dtype = evaluation.dtype
        self._workspaces: dict[int, _Workspace] = {}

    def differentiate(self, train: Instances, batch: Batch, seed: int) -> None:
        self._forward_and_deltas(train, batch)
        for k, layer in enumerate(self.layers):
            delta, entering = self._delta_and_input(k)
            torch.bmm(delta, entering.transpose(1, 2), out=self.gradients[layer.weight])
            if layer.bias is not None:
                torch.sum(delta, 2, out=self.gradients[layer.bias])
            self._backward(k)

    def descend(self, train: Instances, batch: Batch, lr: float, weight_decay: float) -> None:
        """Make a step of plain SGD, the update fused into the products (no gradient is stored)."""
        self._forward_and_deltas(train, batch)
        keep = 1 - lr * weight_decay
        for k in reversed(range(len(self.layers))):
            layer = self.layers[k]
            delta, entering = self._delta_and_input(k)
            self._backward(k)  # before this layer's weights change
            self.parameters[layer.weight].baddbmm_(delta, entering.transpose(1, 2), beta=keep, alpha=-lr)
            if layer.bias is not None:
                bias = self.parameters[layer.bias]
                if weight_decay:
                    bias.mul_(keep)
                bias.sub_(delta.sum(2), alpha=lr)

    def outputs(self, inputs: Inputs) -> Tensor:
        assert isinstance(inputs, Tensor)
        after = inputs.to(self.evaluation_dtype).flatten(1).T.expand(self.replicas, -1, -1)
        for layer in self.layers:
            weight = self.parameters[layer.weight].to(self.evaluation_dtype)
            if layer.bias is None:
                after = torch.bmm(weight, after)
            else:
                bias = self.parameters[layer.bias].to(self.evaluation_dtype)
                after = torch.baddbmm(bias[:, :, None].expand(-1, -1, after.shape[2]), weight, after)
            if layer.activation is not None:
                layer.activation.forward(after, after)
        return after.transpose(1, 2)
