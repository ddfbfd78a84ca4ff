"""Stacked networks of linear layers, by batched matrix products written out.

Activations are kept feature-major, ``[R, features, B]``: with weights as torch keeps them, ``[R, out, in]``,
every product then has an operand layout that the matrix library runs near its peak, also for the one or few
outputs of the last layer, where the instance-major form is up to ten times slower. A step works in place, in
tensors that are kept between steps, and may fuse the update into the products. So the passes of training are
written here once more (:func:`_forward` and :meth:`LinearNetwork._backward`); all else shares those of
:mod:`fimo.models.linear_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fimo.data.instances import Inputs, Instances
from fimo.engine.leave_out import Batch
from fimo.engine.stacked import ALIGNED, StackedNetwork
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import Layer, linear_layers


class _Workspace:
    """Buffers of one batch size, so that a step allocates nothing of size."""

    def __init__(self, network: LinearNetwork, instances: int, shared: bool) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=network.dtype, device=network.device)

        r = network.replicas
        rows = [network.parameters[layer.weight].shape[1] for layer in network.layers]
        self.before = [empty(r, n, instances) for n in rows]
        self.after = [
            b if layer.activation is None or layer.activation.from_output else torch.empty_like(b)
            for layer, b in zip(network.layers, self.before, strict=True)
        ]
        self.delta = [empty(r, n, instances) for n in rows]
        width = network.parameters[network.layers[0].weight].shape[2]
        self.gathered = empty((1 if shared else r) * instances, width)
        # instance-major: rows are copied from the data as they lie
        self.inputs = self.gathered.view(-1, instances, width).expand(r, -1, -1)


class LinearNetwork(StackedNetwork):
    """R copies of a network of linear layers: one batched product per layer and direction.

    Batches are padded to a multiple of 16 with instances of weight zero, which keeps every matrix aligned
    (see :class:`StackedNetwork`); R is at least 2, since the matrix library treats a single product
    otherwise.
    """

    def __init__(self, final_model: FinalModel, replicas: int, evaluation_model: FinalModel) -> None:
        if replicas < 2:
            raise ValueError(f"expected at least 2 replicas but got {replicas}")
        super().__init__(final_model, replicas, evaluation_model)
        layers = linear_layers(final_model.network)
        if layers is None:
            raise ValueError("not a sequence of linear layers and activations")
        self.layers = layers
        self._workspaces: dict[tuple[int, bool], _Workspace] = {}
        self._evaluations: dict[int, list[Tensor]] = {}
        self._data: tuple[Instances, Tensor] | None = None

    def differentiate(self, train: Instances, batch: Batch, seed: int) -> None:
        space = self._forward_and_deltas(train, batch)
        for k in reversed(range(len(self.layers))):
            layer = self.layers[k]
            torch.bmm(space.delta[k], self._entering(space, k), out=self.gradients[layer.weight])
            if layer.bias is not None:
                torch.sum(space.delta[k], 2, out=self.gradients[layer.bias])
            self._backward(space, k)

    def descend(self, train: Instances, batch: Batch, lr: float, weight_decay: float) -> None:
        """Make a step of plain SGD, the update fused into the products (no gradient is stored)."""
        space = self._forward_and_deltas(train, batch)
        keep = 1 - lr * weight_decay
        for k in reversed(range(len(self.layers))):
            layer = self.layers[k]
            self._backward(space, k)  # before this layer's weights change
            self.parameters[layer.weight].baddbmm_(
                space.delta[k], self._entering(space, k), beta=keep, alpha=-lr
            )
            if layer.bias is not None:
                bias = self.parameters[layer.bias]
                if weight_decay:
                    bias.mul_(keep)
                bias.sub_(space.delta[k].sum(2), alpha=lr)

    def _entering(self, space: _Workspace, k: int) -> Tensor:
        """Return what enters layer k, ``[R, B, in]``."""
        return space.after[k - 1].transpose(1, 2) if k else space.inputs

    def _forward_and_deltas(self, train: Instances, batch: Batch) -> _Workspace:
        """Run the forward pass, and the gradient of the weighted loss in the last layer's sums."""
        index, weight = _padded(batch)
        shared = len(index) == 1
        key = (index.shape[1], shared)
        if key not in self._workspaces:
            self._workspaces[key] = _Workspace(self, *key)
        space = self._workspaces[key]
        torch.index_select(self._rows(train), 0, index.reshape(-1), out=space.gathered)
        rows = self._entering(space, 0).transpose(1, 2)
        _forward(self.layers, self.parameters, rows, space.before, space.after)
        self.loss.stacked_gradient(space.after[-1], train.targets[index], weight, space.delta[-1])
        last = self.layers[-1].activation
        if last is not None:
            last.backward(space.delta[-1], space.before[-1])
        return space

    def _backward(self, space: _Workspace, k: int) -> None:
        """Carry the gradient in layer k's sums to those of the layer before."""
        if k:
            torch.bmm(
                self.parameters[self.layers[k].weight].transpose(1, 2), space.delta[k], out=space.delta[k - 1]
            )
            activation = self.layers[k - 1].activation
            if activation is not None:
                activation.backward(space.delta[k - 1], space.before[k - 1])

    def _rows(self, train: Instances) -> Tensor:
        """Return the training inputs as rows ``[N, in]``."""
        if self._data is None or self._data[0] is not train:
            assert isinstance(train.inputs, Tensor)
            self._data = (train, train.inputs.to(self.dtype).flatten(1).contiguous())
        return self._data[1]

    def outputs(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """See :class:`StackedNetwork`; valid until the next call with equally many instances."""
        assert isinstance(inputs, Tensor)
        rows = inputs.to(self.evaluation_dtype).flatten(1)
        n = len(rows)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -n % ALIGNED))
        width = len(padded)
        if width not in self._evaluations:
            self._evaluations[width] = [
                padded.new_empty(self.replicas, self.parameters[layer.weight].shape[1], width)
                for layer in self.layers
            ]
        rows = padded.expand(self.replicas, -1, -1).transpose(1, 2)
        sums = self._evaluations[width]
        _forward(self.layers, parameters, rows, sums, sums)
        return sums[-1].transpose(1, 2)[:, :n]


def _forward(
    layers: Sequence[Layer],
    parameters: Mapping[str, Tensor],
    rows: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> None:
    """Write each layer's sums and activations, ``[R, out, B]``; the same tensors where nothing is kept.

    Args:
        rows: ``[R, in, B]``.
    """
    entering = rows
    for layer, sums, activations in zip(layers, before, after, strict=True):
        weight = parameters[layer.weight]
        if layer.bias is None:
            torch.bmm(weight, entering, out=sums)
        else:
            bias = parameters[layer.bias][:, :, None].expand_as(sums)
            torch.baddbmm(bias, weight, entering, out=sums)
        if layer.activation is not None:
            layer.activation.forward(sums, activations)
        entering = activations


def _padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return index ``[R or 1, B']`` and weight ``[R, B']`` with extra instances, B' a multiple of 16."""
    index, weight = batch.index, batch.weight
    if batch.extra is not None and batch.extra_weight is not None:
        index = torch.cat([index.expand(len(batch.extra), -1), batch.extra], 1)
        weight = torch.cat([weight, batch.extra_weight], 1)
    missing = -index.shape[1] % ALIGNED
    if missing:
        index = torch.cat([index, index[:, :1].expand(-1, missing)], 1)
        weight = torch.nn.functional.pad(weight, (0, missing))
    return index, weight
