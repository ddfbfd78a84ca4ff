"""Elementwise activations with their first and second derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise activation with its derivatives.

    Args:
        forward: ``(before, after)``, writes ``after``; they may be the same tensor.
        backward: ``(gradient, value)``, multiplies the gradient in place by the derivative at ``value``.
        slope: the derivative at ``value``.
        curvature: the second derivative at ``value``; None where it is zero almost everywhere.
        from_output: ``value`` is the activation's output, else its input.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor], object]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor] | None
    from_output: bool = True


RELU = Activation(
    lambda before, after: torch.clamp_min(before, 0, out=after),
    lambda g, after: aten.threshold_backward.grad_input(g, after, 0, grad_input=g),
    lambda after: (after > 0).to(after.dtype),
    None,
)
TANH = Activation(
    lambda before, after: torch.tanh(before, out=after),
    lambda g, after: aten.tanh_backward.grad_input(g, after, grad_input=g),
    lambda after: 1 - after * after,
    lambda after: -2 * after * (1 - after * after),
)
SIGMOID = Activation(
    lambda before, after: torch.sigmoid(before, out=after),
    lambda g, after: aten.sigmoid_backward.grad_input(g, after, grad_input=g),
    lambda after: after * (1 - after),
    lambda after: after * (1 - after) * (1 - 2 * after),
)


def _silu_slope(z: Tensor) -> Tensor:
    s = z.sigmoid()
    return s * (1 + z * (1 - s))


def _silu_curvature(z: Tensor) -> Tensor:
    s = z.sigmoid()
    return s * (1 - s) * (2 + z * (1 - 2 * s))


SILU = Activation(
    lambda before, after: aten.silu.out(before, out=after),
    lambda g, before: aten.silu_backward.grad_input(g, before, grad_input=g),
    _silu_slope,
    _silu_curvature,
    from_output=False,
)


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return t = tanh(u) of GELU's approximation z (1 + t) / 2, u' and u''."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z**3))
    return t, scale * (1 + 3 * cubic * z * z), scale * 6 * cubic * z


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    t, du, _ = _gelu_tanh(z)
    return (1 + t + z * (1 - t * t) * du) / 2


def _gelu_tanh_curvature(z: Tensor) -> Tensor:
    t, du, ddu = _gelu_tanh(z)
    return (1 - t * t) * (du + z * (ddu - 2 * t * du * du) / 2)


@functools.cache  # the same for the same argument
def _gelu(approximate: str) -> Activation:
    exact = approximate == "none"
    return Activation(
        lambda before, after: aten.gelu.out(before, approximate=approximate, out=after),
        lambda g, before: aten.gelu_backward.grad_input(g, before, approximate=approximate, grad_input=g),
        (lambda z: torch.special.ndtr(z) + z * _normal_density(z)) if exact else _gelu_tanh_slope,
        (lambda z: (2 - z * z) * _normal_density(z)) if exact else _gelu_tanh_curvature,
        from_output=False,
    )


@functools.cache
def _leaky(slope: float) -> Activation:
    return Activation(
        lambda before, after: aten.leaky_relu.out(before, slope, out=after),
        lambda g, after: aten.leaky_relu_backward.grad_input(g, after, slope, True, grad_input=g),
        lambda after: torch.where(after > 0, 1.0, slope).to(after.dtype),
        None,
    )


@functools.cache
def _elu(alpha: float) -> Activation:
    return Activation(
        lambda before, after: aten.elu.out(before, alpha, 1, 1, out=after),
        lambda g, after: aten.elu_backward.grad_input(g, alpha, 1, 1, True, after, grad_input=g),
        lambda after: torch.where(after > 0, 1, after + alpha),
        lambda after: torch.where(after > 0, 0, after + alpha),
    )


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module is; None for another module."""
    if type(module) is nn.GELU:
        return _gelu(module.approximate)
    if type(module) is nn.LeakyReLU and module.negative_slope > 0:  # else its output doesn't tell the side
        return _leaky(module.negative_slope)
    if type(module) is nn.ELU and module.alpha > 0:
        return _elu(module.alpha)
    return {nn.ReLU: RELU, nn.Tanh: TANH, nn.Sigmoid: SIGMOID, nn.SiLU: SILU}.get(type(module))
