"""Products with the Hessian of networks of linear layers, written out for many vectors at once.

Pearlmutter's R-operator (1994): the derivative of the gradient along a vector, by one forward and one
backward pass of directional derivatives. What doesn't depend on the vectors (activations a, their slopes, the
loss's derivatives δ) is computed once for all products; with R the derivative along v = (V, c) and layers
z = W a + b, a' = f(z),

    R z = W R a + V a + c,          R a' = f'(z) R z,
    R e = W^T R δ + V^T δ,          R δ  = f'(z) R e + f''(z) e R z      (e: the loss's derivative in a'),
    (H v)_W = sum (R δ) a^T + δ (R a)^T,    (H v)_b = sum R δ.

Every product is one matrix product over all instances and vectors of a piece.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from fimo.curvature.jacobian import split
from fimo.curvature.operators import Operator
from fimo.data.instances import Instances
from fimo.engine.linear import Layer, linear_layers
from fimo.models.final_model import FinalModel

PIECE = 2**20
"""Numbers of one layer's directional derivatives, instances x vectors x width, that are made at once."""


class LinearHessian(Operator):
    """The Hessian of the mean training loss of a network of linear layers and activations.

    Args:
        final_model: at whose parameters; see :func:`~fimo.engine.linear.linear_layers`.
        instances: over which the loss is averaged.
        count: called with the number of products of one instance and one vector, as they are made.

    Raises:
        ValueError: the network is of another kind.
    """

    def __init__(
        self, final_model: FinalModel, instances: Instances, count: Callable[[int], None] | None = None
    ) -> None:
        layers = linear_layers(final_model.network)
        if layers is None or not isinstance(instances.inputs, Tensor):
            raise ValueError("not a sequence of linear layers and activations")
        self.layers, self.loss, self.count = layers, final_model.loss, count
        parameters = final_model.parameters()
        self.shapes = {name: p.shape for name, p in parameters.items()}
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        state = dict(final_model.network.named_parameters())
        self.weights = [state[layer.weight].detach() for layer in layers]
        self.targets = instances.targets
        after = instances.inputs.to(self.dtype).flatten(1)
        self.entering: list[Tensor] = []
        slopes: list[tuple[Tensor | None, Tensor | None]] = []
        for layer, weight in zip(layers, self.weights, strict=True):
            self.entering.append(after)
            before = torch.nn.functional.linear(
                after, weight, state[layer.bias].detach() if layer.bias else None
            )
            after = before if layer.module is None else layer.module(before)
            slopes.append(_slopes(layer, before))
        self.outputs = after
        self.slopes = [first for first, _ in slopes]
        # δ of every layer, and e f''(z), the loss's derivative times the activation's curvature
        self.deltas: list[Tensor] = [after] * len(layers)
        self.bends: list[Tensor | None] = [None] * len(layers)
        e = self.loss.gradient(self.outputs, self.targets)
        for k in reversed(range(len(layers))):
            slope, curved = slopes[k]
            self.bends[k] = None if curved is None else e * curved
            self.deltas[k] = e if slope is None else e * slope
            e = self.deltas[k] @ self.weights[k]

    def times(self, vectors: Tensor) -> Tensor:
        return self._times(vectors, None)

    def of_batch(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product with the Hessian of the mean loss over the instances ``index``."""
        return lambda vectors: self._times(vectors, index)

    def _times(self, vectors: Tensor, index: Tensor | None) -> Tensor:
        n = len(self.targets) if index is None else len(index)
        if self.count is not None:
            self.count(n * vectors.shape[1])
        width = max(max(w.shape) for w in self.weights)
        total = torch.empty(vectors.shape[1], vectors.shape[0], dtype=self.dtype, device=self.device)
        step = max(1, min(vectors.shape[1], PIECE // (width * min(n, 512))))
        rows = max(1, PIECE // (width * step))
        order = torch.arange(n, device=self.device) if index is None else index
        for first in range(0, vectors.shape[1], step):
            piece = vectors[:, first : first + step].T
            parts = {name: part.contiguous() for name, part in split(piece, self.shapes).items()}
            into = {name: torch.zeros_like(part) for name, part in parts.items()}
            for start in range(0, n, rows):
                whole = index is None and rows >= n
                self._add(parts, into, None if whole else order[start : start + rows])
            total[first : first + step] = torch.cat([into[name] for name in self.shapes], 1)
        return total.T / n

    def _add(self, parts: dict[str, Tensor], into: dict[str, Tensor], index: Tensor | None) -> None:
        """Add the products ``[K, numel]`` of each parameter, summed over the instances ``index``."""

        def of(tensor: Tensor) -> Tensor:
            return tensor if index is None else tensor[index]

        k = next(iter(parts.values())).shape[0]
        n = len(self.targets) if index is None else len(index)
        entering: list[Tensor | None] = [None]  # R a, [n, K, in]
        leaving: list[Tensor] = []  # R z, [n, K, out]
        pushed: Tensor | None = None
        for layer, weight, a, slope in zip(
            self.layers, self.weights, self.entering, self.slopes, strict=True
        ):
            out = weight.shape[0]
            if layer.weight in parts:
                z = of(a) @ parts[layer.weight].view(k * out, -1).T
            else:
                z = torch.zeros(n, k * out, dtype=self.dtype, device=self.device)
            z = z.view(n * k, out)
            if pushed is not None:
                z.addmm_(pushed.view(n * k, -1), weight.T)
            z = z.view(n, k, out)
            if layer.bias in parts:
                z += parts[layer.bias]
            leaving.append(z)
            pushed = z if slope is None else z * of(slope)[:, None]
            entering.append(pushed)
        assert pushed is not None
        e = self._output_curvature(pushed, index)
        for level in reversed(range(len(self.layers))):
            layer, weight, slope, bend = (
                self.layers[level],
                self.weights[level],
                self.slopes[level],
                self.bends[level],
            )
            if slope is not None:
                e = e * of(slope)[:, None]
            if bend is not None:
                e = e.addcmul(leaving[level], of(bend)[:, None])
            out, width = weight.shape
            delta, a, ra = of(self.deltas[level]), of(self.entering[level]), entering[level]
            if layer.weight in parts:
                into[layer.weight].view(k, out, width).add_((e.view(n, k * out).T @ a).view(k, out, width))
                if ra is not None:
                    crossed = (delta.T @ ra.view(n, k * width)).view(out, k, width)
                    into[layer.weight].view(k, out, width).add_(crossed.transpose(0, 1))
            if layer.bias in parts:
                into[layer.bias].add_(e.sum(0))
            if level:
                back = e.view(n * k, out) @ weight
                if layer.weight in parts:
                    vector = parts[layer.weight].view(k, out, width).transpose(0, 1).reshape(out, k * width)
                    back.view(n, k * width).addmm_(delta, vector)
                e = back.view(n, k, width)

    def _output_curvature(self, pushed: Tensor, index: Tensor | None) -> Tensor:
        """Return the loss's Hessians in the outputs times their directional derivatives ``[n, K, D]``."""
        outputs = self.outputs if index is None else self.outputs[index]
        targets = self.targets if index is None else self.targets[index]
        return self.loss.hessian_times(outputs, targets, pushed)


def _slopes(layer: Layer, before: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return f'(z) and f''(z) of an activation, None for f'' where it is zero everywhere (ReLU)."""
    if layer.module is None:
        return None, None
    module = layer.module
    first = grad(lambda z: module(z).sum())
    second = grad(lambda z: first(z).sum())(before)
    return first(before), second if bool(second.any()) else None
