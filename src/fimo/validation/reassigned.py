"""Whether a forward pass puts other tensors in the place of parameters' own: it is tried.

A constraint on weights written ``self.weight.data = renorm(self.weight.data)`` does. Steps of further
training are made on tensors of the engine's own, which a network is called with: what is put in their place
is lost after the call, and steps would start from weights without the constraint. Written in place
(``self.weight.data.copy_``) it is kept.
"""

from __future__ import annotations

import torch

from fimo.data.instances import Inputs
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel, apply
from fimo.models.train_mode import TrainMode, seeded

SCALES = (1.0, 10.0)
"""Of parameters: a constraint may act on large ones alone."""


def reassigned(final_model: FinalModel, inputs: Inputs) -> list[str]:
    """Return the names of trainable parameters whose data a forward pass, in any mode, assigns anew.

    Args:
        inputs: of a few instances; a network that fails on them is left to other checks.
    """
    network = duplicate(final_model.network)
    trained = final_model.parameters()
    moving = {n: p for n, p in network.named_parameters() if n in trained and p.is_floating_point()}
    if not moving:
        return []
    device = next(iter(moving.values())).device
    held = {name: p.data for name, p in moving.items()}  # while they are, no address is given again
    with torch.no_grad():
        for scale in SCALES:
            for p in moving.values():
                p.mul_(scale)
            for mode in (network.eval(), TrainMode().set(network)):
                try:
                    with seeded(0, device):
                        apply(mode, inputs)
                except Exception:  # whatever a network raises
                    continue
                now = dict(network.named_parameters())
                if found := [n for n, t in held.items() if n not in now or now[n].data_ptr() != t.data_ptr()]:
                    return found
    return []
