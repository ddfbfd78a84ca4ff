"""From changes of a final model's outputs to those of its losses, or of what is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fimo.models.final_model import FinalModel

LossChanges = Callable[[FinalModel, Tensor, Tensor, Tensor], Tensor]
"""Of a model, outputs, targets and changes of the outputs, see :func:`loss_changes`."""

AT_ONCE = 2**24
"""Changed outputs that are held at once, float64."""


def loss_changes_by(propagate: Literal["outputs", "loss"]) -> LossChanges:
    """Return how changes of outputs become changes of losses: exactly, or to first order."""
    return loss_changes if propagate == "outputs" else linear_loss_changes


def loss_changes(final_model: FinalModel, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
    """Return the change ``[J, L]`` of losses (or measurements) when outputs change.

    It is float64, in which the losses are taken: their difference survives there.

    Args:
        outputs: ``[J, ...]``, as the loss expects them.
        change: ``[J·D, L]``, of an instance's D values, flattened.
    """
    measure = final_model.measurement or final_model.loss
    wide, goal = outputs.double(), _wide(targets)
    before, found = measure(wide, goal), []
    for columns in change.split(max(1, AT_ONCE // max(1, wide.numel())), 1):
        shift = columns.double().T.reshape(-1, *wide.shape)  # [L', J, ...]
        moved = (wide + shift).flatten(0, 1)
        repeated = goal.expand(len(shift), *goal.shape).flatten(0, 1)
        found.append((measure(moved, repeated).view(len(shift), -1) - before).T)
    return torch.cat(found, 1)


def linear_loss_changes(final_model: FinalModel, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
    """Return the same to first order in the change."""
    measure = final_model.measurement or final_model.loss
    gradient = measure.gradient(outputs.double(), _wide(targets)).flatten(1)
    return torch.einsum("jd,jdl->jl", gradient, change.double().view(*gradient.shape, -1))


def _wide(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets
