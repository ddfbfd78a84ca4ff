"""Whether a final model predicts worse than one that ignores its inputs: then something is mixed up."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.data.instances import IGNORED, Instances
from fimo.models.final_model import FinalModel
from fimo.models.losses import (
    Loss,
    binary_cross_entropy,
    cross_entropy,
    language_modelling,
    mean_squared_error,
)

MOST = 512
"""Instances of each part, evenly spaced."""

MARGIN = 1.01
"""Losses above the constant's by this factor are worse."""


@torch.no_grad()
def poor(model: FinalModel, train: Instances, test: Instances) -> str | None:
    """Return in one line that a model is worse than a constant, and why that may be; None where it is not.

    It must be worse on both parts, each with the constant outputs that are best on the training part: a model
    that predicts its training instances well and others badly is overfitted, but it is the model that was
    trained. A loss of the user's own is not judged, as no best constant is known for it.
    """
    parts = [_some(part) for part in (train, test)]
    outputs = constant_outputs(model.loss, parts[0].targets, model.outputs(parts[0][:1]).shape[-1])
    if outputs is None:
        return None
    found = []
    for part in parts:
        shape = (*part.targets.shape, len(outputs)) if _classes(model.loss) else part.targets.shape
        constant = outputs.to(part.targets.device).expand(shape)
        targets = part.targets.to(constant.dtype) if not _classes(model.loss) else part.targets
        found.append((_mean(model.losses(part)), _mean(model.loss(constant, targets))))
    if any(own <= MARGIN * constant for own, constant in found):
        return None
    (train_loss, train_constant), (test_loss, test_constant) = found
    return (
        f"the final model predicts worse than constant outputs: mean loss {train_loss:.4g} against "
        f"{train_constant:.4g} on training instances, {test_loss:.4g} against {test_constant:.4g} on test "
        "instances; are features or targets prepared otherwise than when it was trained (scaling, order of "
        "columns), is the split or the order of labels another, or did training diverge or hardly begin?"
    )


def constant_outputs(loss: Loss, targets: Tensor, width: int) -> Tensor | None:
    """Return the outputs of one instance (or position) that have the least mean loss; None for other losses.

    Args:
        targets: ``[n, ...]`` in the loss's form.
        width: of the outputs' last axis.
    """
    if _classes(loss):
        shown = targets[targets != IGNORED]
        share = torch.bincount(shown, minlength=width).double() + 1e-12
        return (share / share.sum()).log()
    mean = targets.double().mean(0)
    if loss is mean_squared_error:
        return mean
    return torch.logit(mean, eps=1e-6) if loss is binary_cross_entropy else None


def _classes(loss: Loss) -> bool:
    return loss is cross_entropy or loss is language_modelling


def _some(instances: Instances) -> Instances:
    n = min(MOST, len(instances))
    return instances[
        torch.tensor([k * len(instances) // n for k in range(n)], device=instances.targets.device)
    ]


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())
