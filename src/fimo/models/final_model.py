"""The final model: all that is given of a training run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs, Instances
from fimo.models.losses import Loss


@dataclass(frozen=True)
class FinalModel:
    """A trained network with the loss that its further training minimises.

    The network is copied, so that the user's own module is never put into another mode, frozen or
    changed; the copy stays in eval mode (no dropout, frozen batch statistics).

    Args:
        network: maps a batch of inputs to outputs ``[n, ...]``.
        loss: per-instance loss ``(outputs, targets) -> [n]``.
        measurement: what is explained on test instances, of the same form as ``loss``; the loss itself
            when None.
    """

    network: nn.Module
    loss: Loss
    measurement: Loss | None = field(default=None)

    def __post_init__(self) -> None:
        network = copy.deepcopy(self.network).eval()
        network.requires_grad_(False)
        object.__setattr__(self, "network", network)

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name (tied ones once), detached; θ^f."""
        return {name: p.detach() for name, p in self.network.named_parameters()}

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name (batch statistics, position indices)."""
        return {name: b.detach() for name, b in self.network.named_buffers()}

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FinalModel:
        """Return a copy on ``device`` in ``dtype``."""
        return FinalModel(
            copy.deepcopy(self.network).to(device=device, dtype=dtype), self.loss, self.measurement
        )

    @torch.no_grad()
    def outputs(self, instances: Instances, batch_size: int = 4096) -> Tensor:
        """Return the outputs ``[n, ...]``, computed in batches."""
        return torch.cat([apply(self.network, b.inputs) for b in instances.batches(batch_size)])

    @torch.no_grad()
    def losses(self, instances: Instances, batch_size: int = 4096) -> Tensor:
        """Return the per-instance losses ``[n]``, computed in batches."""
        return torch.cat(
            [self.loss(apply(self.network, b.inputs), b.targets) for b in instances.batches(batch_size)]
        )


def apply(network: nn.Module, inputs: Inputs) -> Tensor:
    """Call a network on a batch: a tensor as its one argument, a dict by names."""
    return network(**inputs) if isinstance(inputs, dict) else network(inputs)


def functional_apply(network: nn.Module, tensors: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Call a network with its parameters and buffers replaced by ``tensors``.

    Parameters missing from ``tensors`` keep the network's own values, so a method restricted to some
    parameters passes only those.
    """
    if isinstance(inputs, dict):
        return torch.func.functional_call(network, tensors, (), inputs)
    return torch.func.functional_call(network, tensors, (inputs,))
