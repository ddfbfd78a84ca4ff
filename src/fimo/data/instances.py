"""Instances in memory: inputs and targets with one leading axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.errors import InputError

Inputs = Tensor | dict[str, Tensor]

IGNORED = -100
"""Target of a position without a loss."""


@dataclass(frozen=True)
class Instances:
    """A set of n instances.

    Args:
        inputs: ``[n, ...]``, or a dict of such tensors (a tokenizer's output) passed to the network by name.
        targets: class indices ``[n]`` (int64), or values ``[n, D]`` (floating point).

    Raises:
        InputError: something else than tensors, or numbers of instances that differ.
    """

    inputs: Inputs
    targets: Tensor

    def __post_init__(self) -> None:
        for name, part in self.tensors().items():
            if not isinstance(part, Tensor) or part.ndim == 0:
                kind = "a single number" if isinstance(part, Tensor) else type(part).__name__
                raise InputError(
                    "dataset",
                    f"{name}: expected a tensor [n, ...] but got {kind}; to_instances((X, y)) takes arrays",
                )
        sizes = {len(part) for part in self.tensors().values()}
        if len(sizes) != 1:
            shown = ", ".join(f"{name} {len(part)}" for name, part in self.tensors().items())
            raise InputError("dataset", f"inputs and targets differ in their number of instances: {shown}")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Tensor | slice | list[int]) -> Instances:
        """Return the instances at ``index`` (an index tensor of any shape, a slice, or a list)."""
        if isinstance(self.inputs, Mapping):
            return Instances({k: v[index] for k, v in self.inputs.items()}, self.targets[index])
        return Instances(self.inputs[index], self.targets[index])

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name: what is hashed and moved."""
        inputs = self.inputs if isinstance(self.inputs, Mapping) else {"inputs": self.inputs}
        return {**inputs, "targets": self.targets}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Instances:
        """Return the instances on ``device``, with floating-point tensors as ``dtype``."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        if isinstance(self.inputs, Mapping):
            return Instances({k: move(v) for k, v in self.inputs.items()}, move(self.targets))
        return Instances(move(self.inputs), move(self.targets))

    def detached(self) -> Instances:
        """Return the instances as constants, where they are a network's outputs; else the same ones.

        Of tensors that were made in ``torch.inference_mode``, copies.
        """

        def constant(t: Tensor) -> Tensor:
            return t.detach().clone() if t.is_inference() else t.detach()

        if not any(t.requires_grad or t.is_inference() for t in self.tensors().values()):
            return self
        if isinstance(self.inputs, Mapping):
            return Instances({k: constant(v) for k, v in self.inputs.items()}, constant(self.targets))
        return Instances(constant(self.inputs), constant(self.targets))

    def batches(self, size: int) -> Iterator[Instances]:
        """Yield consecutive batches of at most ``size`` instances."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
