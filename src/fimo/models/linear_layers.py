"""Networks of linear layers and activations: their one forward pass, backward pass and R-operator.

Of layers z = W a + b, a' = f(z), with e the derivative of a sum of losses in a', activations instance-major:

    forward     a' = f(W a + b),
    backward    δ = f'(z) e  (the derivative in z),     e of the layer before = W^T δ,
                derivatives  dW = sum_n δ a^T,          db = sum_n δ.

Pearlmutter's R-operator (1994) is the derivative of that gradient along a direction (V, c) of the parameters,
by one more pass in each direction (:class:`Linearised`):

    push        R z = W R a + V a + c,                  R a' = f'(z) R z,
    pull        R δ = f'(z) R e + f''(z) e R z,         R e of the layer before = W^T R δ + V^T δ,
                R dW = sum_n (R δ) a^T + δ (R a)^T,     R db = sum_n R δ.

What doesn't depend on the direction (a, f', δ and e f'') is computed once for all directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.models.activations import Activation, activation_of
from fimo.models.final_model import FinalModel
from fimo.models.watched_layers import watched_layers


@dataclass(frozen=True)
class Layer:
    """A linear layer (names of its parameters) and the activation after it."""

    weight: str
    bias: str | None
    activation: Activation | None = None


def linear_layers(network: nn.Module) -> list[Layer] | None:
    """Return a network's layers if it is a sequence of linear layers and activations, or one; else None.

    A leading flattening, identities and dropout with rate 0 are seen through, and so is a ``forward`` of the
    user's own that only hands one layer's outputs to the next. Layers with hooks or tied parameters are not.
    """
    if any(m._forward_hooks or m._forward_pre_hooks for m in network.modules()):
        return None
    if layers := _in_sequence(network):
        return layers
    return [Layer(*of_layer) for of_layer in watched_layers(network) or ()] or None


def _in_sequence(network: nn.Module) -> list[Layer] | None:
    """Return the layers of (nested) ``nn.Sequential`` of known modules, or of one ``nn.Linear``."""
    if not _is_sequence(network) and type(network) is not nn.Linear:
        return None
    layers: list[Layer] = []
    parameters = 0
    for name, module in network.named_modules(remove_duplicate=False):
        if _is_sequence(module) or _passes_through(module) or (type(module) is nn.Flatten and not layers):
            continue
        if type(module) is nn.Linear:
            inside = f"{name}." if name else ""
            bias = f"{inside}bias" if module.bias is not None else None
            layers.append(Layer(f"{inside}weight", bias))
            parameters += 1 + (bias is not None)
        elif (activation := activation_of(module)) and layers and layers[-1].activation is None:
            layers[-1] = Layer(layers[-1].weight, layers[-1].bias, activation)
        else:
            return None
    tied = parameters != len(list(network.parameters()))
    return None if tied or not layers else layers


def layers_on(final_model: FinalModel, instances: Instances) -> list[Layer] | None:
    """Return the layers of a network that maps flattened instances to outputs ``[n, D]``, else None.

    Without a leading ``nn.Flatten``, linear layers map the last axis of inputs with more than two: the
    outputs then have as many axes, also where all but the last are of size one.
    """
    layers, inputs = linear_layers(final_model.network), instances.inputs
    if layers is None or not isinstance(inputs, Tensor) or inputs.ndim < 2:
        return None
    width = final_model.network.get_parameter(layers[0].weight).shape[1]
    if inputs[:1].flatten(1).shape[1] != width:
        return None
    if inputs.ndim == 2:
        return layers
    network = final_model.network
    if final_model.outputs(instances[:1]).ndim != 2:
        return None
    if _in_sequence(network) is not None:
        return layers
    # a forward of the user's own was watched with flat rows, and may do otherwise with others
    return layers if watched_layers(network, tuple(inputs.shape[1:])) == watched_layers(network) else None


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _passes_through(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


@dataclass(frozen=True)
class Passed:
    """What a forward pass leaves, each ``[..., n, width]``.

    Args:
        entering: each layer's inputs.
        values: at which each activation's derivatives are taken.
        outputs: of the last layer.
    """

    entering: list[Tensor]
    values: list[Tensor]
    outputs: Tensor


@torch.no_grad()
def forward(
    layers: Sequence[Layer], parameters: Mapping[str, Tensor], rows: Tensor, keep: bool = True
) -> Passed:
    """Run the forward pass.

    Args:
        parameters: by name, ``[...]`` or, of K networks at once, ``[K, ...]``.
        rows: ``[n, in]``, or ``[K, n, in]``.
        keep: what the backward pass needs; else only the outputs.
    """
    entering: list[Tensor] = []
    values: list[Tensor] = []
    after = rows
    for layer in layers:
        if keep:
            entering.append(after)
        value = before = _sums(
            after, parameters[layer.weight], parameters[layer.bias] if layer.bias else None
        )
        after = before
        if (f := layer.activation) is not None:
            after = before if f.from_output else torch.empty_like(before)
            f.forward(before, after)
            value = after if f.from_output else before
        if keep:
            values.append(value)
    return Passed(entering, values, after)


def _sums(entering: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W a + b."""
    if weight.ndim == 2:
        return torch.nn.functional.linear(entering, weight, bias)
    if bias is None:
        return entering @ weight.transpose(1, 2)
    return torch.baddbmm(bias[:, None], entering, weight.transpose(1, 2))


def backward(
    layers: Sequence[Layer],
    parameters: Mapping[str, Tensor],
    slopes: Sequence[Tensor | None],
    cotangents: Tensor,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run the backward pass: yield (k, e, δ) of each layer k from the last.

    Args:
        slopes: f'(z) of each layer, see :func:`slopes_of`; of a shape that goes with the cotangents'.
        cotangents: e at the outputs, ``[..., out]``.
    """
    e = cotangents
    for k in reversed(range(len(layers))):
        slope = slopes[k]
        delta = e if slope is None else e * slope
        yield k, e, delta
        if k:
            e = delta @ parameters[layers[k].weight]


def slopes_of(layers: Sequence[Layer], passed: Passed) -> list[Tensor | None]:
    """Return f'(z) of each layer, ``[n, out]``; None for 1."""
    return [
        None if layer.activation is None else layer.activation.slope(value)
        for layer, value in zip(layers, passed.values, strict=True)
    ]


@dataclass(frozen=True)
class Linearised:
    """The gradient of a sum of losses, and its derivatives along directions of the parameters.

    Args:
        weights: W of each layer.
        entering, slopes, deltas, bends: a, f', δ and e f'' of each layer, ``[n, width]``; None for f' = 1
            and for f'' = 0.
    """

    layers: Sequence[Layer]
    weights: list[Tensor]
    entering: list[Tensor]
    slopes: list[Tensor | None]
    deltas: list[Tensor]
    bends: list[Tensor | None]

    @classmethod
    def at(
        cls, layers: Sequence[Layer], parameters: Mapping[str, Tensor], passed: Passed, cotangents: Tensor
    ) -> Linearised:
        """Run the backward pass from derivatives of the losses ``[n, D]`` in the outputs.

        Of several networks at once all have a leading axis, of which :meth:`gradient` makes sense too.
        """
        slopes = slopes_of(layers, passed)
        deltas: list[Tensor] = list(passed.values)
        bends: list[Tensor | None] = [None] * len(layers)
        for k, e, delta in backward(layers, parameters, slopes, cotangents):
            f = layers[k].activation
            deltas[k] = delta
            bends[k] = None if f is None or f.curvature is None else e * f.curvature(passed.values[k])
        weights = [parameters[layer.weight] for layer in layers]
        return cls(layers, weights, passed.entering, slopes, deltas, bends)

    def __getitem__(self, index: Tensor) -> Linearised:
        """Return the same of some instances."""

        def some(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else t[index] for t in tensors]

        entering, deltas = [a[index] for a in self.entering], [d[index] for d in self.deltas]
        return Linearised(self.layers, self.weights, entering, some(self.slopes), deltas, some(self.bends))

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient by parameter."""
        found = {}
        for layer, a, delta in zip(self.layers, self.entering, self.deltas, strict=True):
            found[layer.weight] = delta.mT @ a
            if layer.bias:
                found[layer.bias] = delta.sum(-2)
        return found

    def push(self, directions: Mapping[str, Tensor]) -> Pushed:
        """Return the forward pass's derivatives along K directions.

        Args:
            directions: ``[K, ...]`` by parameter; those that are not named don't move.
        """
        k, n = len(next(iter(directions.values()))), len(self.deltas[0])
        pushed: Tensor | None = None
        entering, sums = [], []
        for layer, weight, a, slope in zip(
            self.layers, self.weights, self.entering, self.slopes, strict=True
        ):
            entering.append(pushed)
            out, width = weight.shape
            if layer.weight in directions:
                z = a @ directions[layer.weight].reshape(k * out, width).T
            else:
                z = a.new_zeros(n, k * out)
            z = z.view(n * k, out)
            if pushed is not None:
                z.addmm_(pushed.view(n * k, width), weight.T)
            z = z.view(n, k, out)
            if layer.bias is not None and layer.bias in directions:
                z += directions[layer.bias]
            sums.append(z)
            pushed = z if slope is None else z * slope[:, None]
        assert pushed is not None
        return Pushed(entering, sums, pushed)

    def pull(self, directions: Mapping[str, Tensor], pushed: Pushed, cotangents: Tensor) -> dict[str, Tensor]:
        """Return the gradient's derivatives along K directions, ``[K, ...]`` by their parameters.

        Args:
            pushed: of the directions, see :meth:`push`.
            cotangents: derivatives of those in the outputs ``[n, K, D]`` along the directions.
        """
        found: dict[str, Tensor] = {}
        e = cotangents.contiguous()
        n, k, _ = e.shape
        for level in reversed(range(len(self.layers))):
            layer, weight, slope, bend = (
                self.layers[level], self.weights[level], self.slopes[level], self.bends[level],
            )  # fmt: skip
            if slope is not None:
                e = e * slope[:, None]
            if bend is not None:
                e = e.addcmul(pushed.sums[level], bend[:, None])
            out, width = weight.shape
            delta, a, ra = self.deltas[level], self.entering[level], pushed.entering[level]
            flat = e.view(n, k * out)
            if layer.weight in directions:
                product = (flat.T @ a).view(k, out, width)
                if ra is not None:
                    crossed = (delta.T @ ra.view(n, k * width)).view(out, k, width)
                    product.add_(crossed.transpose(0, 1))
                found[layer.weight] = product
            if layer.bias is not None and layer.bias in directions:
                found[layer.bias] = e.sum(0)
            if level:
                back = flat.view(n * k, out) @ weight
                if layer.weight in directions:
                    moved = directions[layer.weight].reshape(k, out, width).transpose(0, 1)
                    back.view(n, k * width).addmm_(delta, moved.reshape(out, k * width))
                e = back.view(n, k, width)
        return found


@dataclass(frozen=True)
class Pushed:
    """Derivatives along K directions, ``[n, K, width]``.

    Args:
        entering, sums: R a and R z of each layer; None where nothing moves.
        outputs: of the network's outputs.
    """

    entering: list[Tensor | None]
    sums: list[Tensor]
    outputs: Tensor
