"""Batches of texts of several lengths: common padding is cut off, and like lengths are kept together.

A network says with an attribute ``trims`` that it cuts off columns which are padding in a whole batch, that
the lengths are those of its input ``attention_mask``, and that its outputs have no axis of that length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fimo.data.instances import Inputs

MASK = "attention_mask"
FEWEST = 8
"""Instances of a part. Of SST-2's phrases, of 13 tokens on average, in batches of 32, 39 columns are computed
for each in one part, 24 in two, 18 in four, 15 in eight; each part is more calls, and a sum of gradients."""


def trims(network: nn.Module) -> bool:
    """Return whether a network cuts off columns of padding."""
    return bool(getattr(network, "trims", False))


def by_length(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the instances' numbers in parts of about the same length, each ascending.

    One part where the network doesn't cut off padding, or where it makes no difference.

    Args:
        inputs: of n instances.
    """
    count = len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))
    whole = [torch.arange(count)]
    if not trims(network) or not isinstance(inputs, dict) or MASK not in inputs:
        return whole
    lengths = inputs[MASK].sum(1)
    order = lengths.argsort(stable=True)
    parts: list[Tensor] = []
    for part in order.split(FEWEST):
        if parts and lengths[parts[-1][-1]] == lengths[part[-1]]:
            parts[-1] = torch.cat([parts[-1], part])
        else:
            parts.append(part)
    return [part.sort().values for part in parts] if len(parts) > 1 else whole
