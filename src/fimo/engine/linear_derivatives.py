"""Second-order derivatives of networks of linear layers, by products written out.

Directions are stacked in front, activations instance-major, ``[M, B, features]``: the products with the
network's own weights are then one matrix product for all directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from fimo.engine.linear import Layer
from fimo.models.loss_function import Loss

Tensors = dict[str, Tensor]


def gradient_and_tangents(
    layers: Sequence[Layer],
    loss: Loss,
    parameters: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor,
    weight_directions: Tensor,
) -> tuple[Tensors, Tensors, Tensor]:
    """Return the gradient of sum_b weight_b loss_b, its directional derivatives, and those of the losses.

    Args:
        directions: of the parameters, ``[M, ...]`` by name.
        inputs, targets: ``[B, ...]``.
        weight, weight_directions: ``[B]``, ``[M, B]``.

    Returns:
        Gradient by name; its derivative along each direction ``[M, ...]`` by name (the Hessian's product,
        plus what the weights' change contributes); derivatives of the losses ``[M, B]``.
    """
    entering, d_entering = [inputs.flatten(1)], [None]
    slopes: list[tuple[Tensor, Tensor] | None] = []
    d_sums: list[Tensor] = []
    for layer in layers:
        sums = torch.nn.functional.linear(
            entering[-1], parameters[layer.weight], parameters[layer.bias] if layer.bias else None
        )
        d_sum = _product(entering[-1], directions[layer.weight].transpose(1, 2))
        if layer.bias:
            d_sum += directions[layer.bias][:, None]
        if d_entering[-1] is not None:
            d_sum += d_entering[-1] @ parameters[layer.weight].T
        d_sums.append(d_sum)
        if layer.module is None:
            slopes.append(None)
            entering.append(sums)
            d_entering.append(d_sum)  # type: ignore[arg-type]
        else:
            after, first, second = elementwise_derivatives(layer.module, sums)
            slopes.append((first, second))
            entering.append(after)
            d_entering.append(d_sum * first)  # type: ignore[arg-type]
    outputs, d_outputs = entering[-1], d_entering[-1]
    assert d_outputs is not None
    slope = loss.gradient(outputs, targets)
    d_losses = torch.einsum("bd,mbd->mb", slope, d_outputs)
    curved = loss.hessian_times(outputs, targets, d_outputs.transpose(0, 1)).transpose(0, 1)
    delta = weight[:, None] * slope
    d_delta = weight_directions[:, :, None] * slope + weight[:, None] * curved
    gradient: Tensors = {}
    d_gradient: Tensors = {}
    for k in reversed(range(len(layers))):
        layer = layers[k]
        if (slope_k := slopes[k]) is not None:
            first, second = slope_k
            d_delta = d_delta * first + d_sums[k] * (delta * second)
            delta = delta * first
        gradient[layer.weight] = delta.T @ entering[k]
        d_weight = d_delta.transpose(1, 2) @ entering[k].expand(len(d_delta), -1, -1)
        if (d_in := d_entering[k]) is not None:
            d_weight += _product(delta.T, d_in)
        d_gradient[layer.weight] = d_weight
        if layer.bias:
            gradient[layer.bias], d_gradient[layer.bias] = delta.sum(0), d_delta.sum(1)
        if k:
            d_delta = d_delta @ parameters[layer.weight]
            d_delta += _product(delta, directions[layer.weight])
            delta = delta @ parameters[layer.weight]
    names = list(parameters)
    return {n: gradient[n] for n in names}, {n: d_gradient[n] for n in names}, d_losses


def elementwise_derivatives(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an elementwise function's values, and its first and second derivatives."""
    ones = torch.ones_like(x)

    def value_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
        return along(module, (z,), (ones,))

    (value, slope), (_, curvature) = along(value_and_slope, (x,), (ones,))
    return value, slope, curvature


def along(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Return a function's value and its derivative along tangents (``torch.func.jvp``)."""
    value, derivative = jvp(function, primals, tangents)  # type: ignore[misc]
    return value, derivative


def _product(shared: Tensor, each: Tensor) -> Tensor:
    """Return ``shared [a, b] @ each [M, b, c]`` as ``[M, a, c]``."""
    return torch.bmm(shared.expand(len(each), -1, -1), each)
