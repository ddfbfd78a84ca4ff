"""Products with the Hessian of networks of linear layers, by the R-operator, for many vectors at once.

See :mod:`fimo.models.linear_layers`. Every product is one matrix product over all instances and vectors of a
piece.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fimo.curvature.jacobian import split
from fimo.curvature.operators import Operator
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import Linearised, forward, linear_layers

PIECE = 2**20
"""Numbers of one layer's directional derivatives, instances x vectors x width, that are made at once."""


class LinearHessian(Operator):
    """The Hessian of the mean training loss of a network of linear layers and activations.

    Args:
        final_model: at whose parameters; see :func:`~fimo.models.linear_layers.linear_layers`.
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
        state = {name: p.detach() for name, p in final_model.network.named_parameters()}
        self.targets = instances.targets
        passed = forward(layers, state, instances.inputs.to(self.dtype).flatten(1))
        self.outputs = passed.outputs
        self.linearised = Linearised.at(layers, state, passed, self.loss.gradient(self.outputs, self.targets))

    def times(self, vectors: Tensor) -> Tensor:
        return self._times(vectors, None)

    def of_batch(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product with the Hessian of the mean loss over the instances ``index``."""
        return lambda vectors: self._times(vectors, index)

    def _times(self, vectors: Tensor, index: Tensor | None) -> Tensor:
        n = len(self.targets) if index is None else len(index)
        if self.count is not None:
            self.count(n * vectors.shape[1])
        width = max(max(w.shape) for w in self.linearised.weights)
        total = torch.empty(vectors.shape[1], vectors.shape[0], dtype=self.dtype, device=self.device)
        step = max(1, min(vectors.shape[1], PIECE // (width * min(n, 512))))
        rows = max(1, PIECE // (width * step))
        order = torch.arange(n, device=self.device) if index is None else index
        for first in range(0, vectors.shape[1], step):
            piece = vectors[:, first : first + step].T
            parts = {
                name: part.reshape(-1, *self.shapes[name]) for name, part in split(piece, self.shapes).items()
            }
            into: dict[str, Tensor] = {}
            for start in range(0, n, rows):
                whole = index is None and rows >= n
                found = self._products(parts, None if whole else order[start : start + rows])
                into = {name: into[name].add_(part) for name, part in found.items()} if into else found
            total[first : first + step] = torch.cat([into[name].flatten(1) for name in self.shapes], 1)
        return total.T / n

    def _products(self, parts: dict[str, Tensor], index: Tensor | None) -> dict[str, Tensor]:
        """Return the products ``[K, ...]`` by parameter, summed over the instances ``index``."""
        at, outputs, targets = self.linearised, self.outputs, self.targets
        if index is not None:
            at, outputs, targets = at[index], outputs[index], targets[index]
        pushed = at.push(parts)
        return at.pull(parts, pushed, self.loss.hessian_times(outputs, targets, pushed.outputs))
