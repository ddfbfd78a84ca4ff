"""The final model: all that is given of a training run."""

from __future__ import annotations

import copy
import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs, Instances
from fimo.errors import InputError, shortened
from fimo.models.copied import copied
from fimo.models.losses import Loss


@dataclass(frozen=True)
class FinalModel:
    """A trained network with the loss that its further training minimises.

    The network is copied, so that the user's own module is never put into another mode, frozen or
    changed; the copy stays in eval mode (no dropout, frozen batch statistics). Further training's steps run
    in train mode, in copies of their own; see :class:`~fimo.models.train_mode.TrainMode`.

    Args:
        network: maps a batch of inputs to outputs ``[n, ...]``.
        loss: per-instance loss ``(outputs, targets) -> [n]``.
        measurement: what is explained on test instances, of the same form as ``loss``; the loss itself
            when None.
        trainable: name patterns (``fnmatch``) of the parameters that further training moves and that
            attribution differentiates; all when empty.

    Raises:
        InputError: no parameter's name matches a pattern of ``trainable``.
    """

    network: nn.Module
    loss: Loss
    measurement: Loss | None = None
    trainable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        network = copied(self.network).eval()
        network.requires_grad_(False)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "trainable", tuple(self.trainable))
        names = [name for name, _ in network.named_parameters()]
        for pattern in self.trainable:
            if not fnmatch.filter(names, pattern):
                raise InputError(
                    "model.trainable", f"no parameter matches {pattern!r}; there are {shortened(names)}"
                )

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name (tied ones once), detached; θ^f."""
        return {
            name: p.detach()
            for name, p in self.network.named_parameters()
            if not self.trainable or any(fnmatch.fnmatch(name, pattern) for pattern in self.trainable)
        }

    def state(self) -> dict[str, Tensor]:
        """Return everything that the outputs depend on by name, frozen parameters and buffers included."""
        return {name: t.detach() for name, t in self.network.state_dict().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name (batch statistics, position indices)."""
        return {name: b.detach() for name, b in self.network.named_buffers()}

    @property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return sum(p.numel() for p in self.parameters().values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FinalModel:
        """Return a copy on ``device`` in ``dtype``."""
        return FinalModel(
            copy.deepcopy(self.network).to(device=device, dtype=dtype),
            self.loss,
            self.measurement,
            self.trainable,
        )

    @torch.no_grad()
    def outputs(self, instances: Instances, batch_size: int | None = None) -> Tensor:
        """Return the outputs ``[n, ...]``, in batches (of a size that suits the inputs when None)."""
        size = batch_size or fitting_batch(instances)
        return torch.cat([apply(self.network, b.inputs) for b in instances.batches(size)])

    @torch.no_grad()
    def losses(self, instances: Instances, batch_size: int | None = None) -> Tensor:
        """Return the per-instance losses ``[n]``, computed in batches, as :meth:`outputs`."""
        size = batch_size or fitting_batch(instances)
        return torch.cat(
            [self.loss(apply(self.network, b.inputs), b.targets) for b in instances.batches(size)]
        )


def fitting_batch(instances: Instances) -> int:
    """Return how many instances to evaluate at once: 4,096 rows, some hundred images, about 64 sentences.

    A token stands for a vector of hundreds of numbers in every layer.
    """
    numbers = 1
    for name, tensor in instances.tensors().items():
        if name != "targets" and len(tensor):
            numbers += tensor[0].numel() * (1 if tensor.is_floating_point() else 256)
    return max(1, min(4096, 2**21 // numbers))


def apply(network: nn.Module, inputs: Inputs) -> Tensor:
    """Call a network on a batch: a tensor as its one argument, a dict by names."""
    outputs: Tensor = network(**inputs) if isinstance(inputs, dict) else network(inputs)
    return outputs


def functional_apply(network: nn.Module, tensors: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Call a network with its parameters and buffers replaced by ``tensors``.

    Parameters missing from ``tensors`` keep the network's own values, so a method restricted to some
    parameters passes only those.
    """
    positional, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    outputs: Tensor = torch.func.functional_call(network, tensors, positional, named)
    return outputs
