"""The Hessian of shallow piecewise-linear networks: Gauss-Newton by rows, and the rest as a sparse matrix.

With activations that are linear piece by piece (ReLU) and the slopes s of an instance's pieces fixed, an
output is linear in the parameters of each layer, so that second derivatives couple parameters of different
layers only, and along paths only. Of three layers with weights W_0 [i, d], W_1 [o, i], W_2 [p, o], where a is
what enters a layer (with a 1 for its bias) and δ the loss's derivative in what leaves it,

    X[o, i, d]    = sum_n δ_1[o] s_0[i] a_0[d]                      couples W_1[o, i] and W_0[i, d],
    Y[p, o, i]    = sum_n δ_2[p] s_1[o] a_1[i]                      couples W_2[p, o] and W_1[o, i],
    Z[p, o, i, d] = W_1[o, i] sum_n δ_2[p] s_1[o] s_0[i] a_0[d]     couples W_2[p, o] and W_0[i, d].

What the Hessian has beside Gauss-Newton, J^T (d²loss/dz²) J, is these sums, made once. With few inputs and
outputs they are a few times as large as the parameters, and a product costs no pass over the instances but
the two of Gauss-Newton's rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import split
from fimo.curvature.linear_products import PIECE, LinearHessian
from fimo.curvature.operators import RowsOperator
from fimo.data.instances import Instances
from fimo.models.activations import RELU
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import linear_layers

LARGEST = 32
"""The sums may have this many times P numbers: making them then costs a few of the products they replace."""


class PiecewiseLinearHessian(LinearHessian):
    """The Hessian of the mean training loss of two or three linear layers with piecewise-linear activations.

    Products with the matrix of a batch are those of :class:`LinearHessian`.

    Args:
        final_model, instances, count: as there; see :func:`is_shallow`.
    """

    def __init__(
        self, final_model: FinalModel, instances: Instances, count: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(final_model, instances, count)
        self.gauss_newton = RowsOperator(InstanceGradients(final_model).gauss_newton(instances))
        n = len(instances)
        at = self.linearised
        slopes = [torch.ones_like(d) if s is None else s for s, d in zip(at.slopes, at.deltas, strict=True)]
        entering = [
            a if layer.bias is None else torch.cat([a, a.new_ones(n, 1)], 1)
            for layer, a in zip(self.layers, at.entering, strict=True)
        ]
        self.pairs = [
            _path_sums(at.deltas[k + 1], slopes[k], entering[k]) / n for k in range(len(self.layers) - 1)
        ]
        self.far: Tensor | None = None
        if len(self.layers) == 3:
            p, o, i = (w.shape[0] for w in reversed(at.weights))
            through = (at.deltas[2][:, :, None] * slopes[1][:, None, :]).view(n, p * o)
            sums = _path_sums(through, slopes[0], entering[0]).view(p, o, i, -1) / n
            self.far = (sums * at.weights[1][:, :, None]).view(p * o, -1)

    def times(self, vectors: Tensor) -> Tensor:
        if self.count is not None:
            self.count(len(self.targets) * vectors.shape[1])
        total = self.gauss_newton.times(vectors).T
        k = vectors.shape[1]
        parts, into = split(vectors.T, self.shapes), split(total, self.shapes)
        for level, sums in enumerate(self.pairs):
            upper, lower = self.layers[level + 1], self.layers[level]
            o, i = sums.shape[:2]
            v = parts[upper.weight].reshape(k, o, i)
            below = torch.einsum("oid,koi->kid", sums, v)
            above = torch.einsum("oid,kid->koi", sums, _with_bias(parts, lower.weight, lower.bias, i))
            into[upper.weight].add_(above.reshape(k, o * i))
            _add_with_bias(into, lower.weight, lower.bias, below)
        if self.far is not None:
            upper, lower = self.layers[2], self.layers[0]
            i = self.linearised.weights[0].shape[0]
            into[upper.weight].add_(_with_bias(parts, lower.weight, lower.bias, i).flatten(1) @ self.far.T)
            below = (parts[upper.weight] @ self.far).view(k, i, -1)
            _add_with_bias(into, lower.weight, lower.bias, below)
        return total.T


def is_shallow(final_model: FinalModel, instances: Instances) -> bool:
    """Whether the products of :class:`PiecewiseLinearHessian` apply, and are cheaper than others."""
    layers = linear_layers(final_model.network)
    if layers is None or not 2 <= len(layers) <= 3 or not final_model.loss.convex:
        return False
    parameters = final_model.parameters()
    if len(parameters) != len(list(final_model.network.parameters())):
        return False
    if any(layer.activation not in (None, RELU) for layer in layers):
        return False
    shapes = [parameters[layer.weight].shape for layer in layers]
    size = shapes[0].numel() * shapes[1][0] * (shapes[2][0] if len(layers) == 3 else 1)
    p = sum(parameter.numel() for parameter in parameters.values())
    return size <= min(LARGEST, len(instances) // 4) * p


def _path_sums(above: Tensor, slopes: Tensor, entering: Tensor) -> Tensor:
    """Return ``sum_n above[n, o] slopes[n, i] entering[n, d]``, ``[o, i, d]``."""
    (n, o), i, d = above.shape, slopes.shape[1], entering.shape[1]
    total = torch.zeros(o, i * d, dtype=above.dtype, device=above.device)
    step = max(1, PIECE // (i * d))
    for start in range(0, n, step):
        at = slice(start, start + step)
        spread = slopes[at, :, None] * entering[at, None, :]
        total.addmm_(above[at].T, spread.view(-1, i * d))
    return total.view(o, i, d)


def _with_bias(parts: dict[str, Tensor], weight: str, bias: str | None, out: int) -> Tensor:
    """Return a layer's parts of vectors as ``[K, out, in (+ 1)]``."""
    matrix = parts[weight].reshape(len(parts[weight]), out, -1)
    return matrix if bias is None else torch.cat([matrix, parts[bias][:, :, None]], 2)


def _add_with_bias(into: dict[str, Tensor], weight: str, bias: str | None, values: Tensor) -> None:
    if bias is not None:
        into[bias].add_(values[:, :, -1])
        values = values[:, :, :-1]
    into[weight].add_(values.flatten(1))
