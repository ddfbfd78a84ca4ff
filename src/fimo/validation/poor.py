"""Whether a final model predicts worse than one that ignores its inputs: then something is mixed up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import reason
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss

MOST = 512
"""Instances of each part, evenly spaced."""

MARGIN = 0.01
"""Losses above the constant's by this share of it are worse."""

MOST_NUMBERS = 2**20
"""Outputs of the training part among which a constant is looked for under a loss of the user's own."""

AT_ONCE = 2**22
"""Outputs that a loss is evaluated on at a time."""

FEWEST = 16
"""Instances that must fit into that."""


@dataclass(frozen=True)
class Comparison:
    """A final model's losses and those of the best constant outputs, the same for all instances.

    Args:
        own, constant: ``[n]`` each, float64, of the training part.
        own_test, constant_test: the same of the test part.
    """

    own: Tensor
    constant: Tensor
    own_test: Tensor
    constant_test: Tensor

    @property
    def poor(self) -> str | None:
        """That the model is worse in one line, and why that may be; None where it is not.

        It must be worse on both parts: a model that predicts its training instances well and others badly is
        overfitted, but it is the model that was trained.
        """
        own, constant, own_test, constant_test = (
            float(losses.mean()) for losses in (self.own, self.constant, self.own_test, self.constant_test)
        )
        for ours, best in ((own, constant), (own_test, constant_test)):
            if ours <= best + MARGIN * abs(best):
                return None
        return (
            f"the final model predicts worse than constant outputs: mean loss {own:.4g} against "
            f"{constant:.4g} on training instances, {own_test:.4g} against {constant_test:.4g} on test "
            "instances; are features or targets prepared otherwise than when it was trained (scaling, order "
            "of columns), is the split or the order of labels another, or did training diverge or hardly "
            "begin?"
        )


def untold(why: str) -> str:
    """Return in one line that a model was not compared with constant outputs."""
    return f"whether the final model predicts better than constant outputs can't be told: {why}"


@torch.no_grad()
def compared(model: FinalModel, train: Instances, test: Instances) -> Comparison | str:
    """Compare a final model with the constant outputs that are best on the training part.

    Returns:
        The losses; in one line why it can't be told where the best constant under a loss of the user's own
        is not known: outputs too many, or losses of constants that are not finite.
    """
    train, test = _some(train, MOST), _some(test, MOST)
    shape, theirs = (model.outputs(part[:1]).shape[1:] for part in (train, test))
    best: Tensor | str | None = model.loss.best_constant(train.targets, shape[-1])
    if best is None:
        best = (
            best_mixture(model, train) if shape == theirs else "test instances have outputs of another shape"
        )
    if isinstance(best, str):
        return best
    best = best.cpu()  # where constants' losses are computed
    try:
        constant, constant_test = (_losses(model.loss, best, part) for part in (train, test))
    except Exception as error:  # whatever a loss of the user's own raises
        if model.loss.targets is not None:
            raise
        return f"the loss of constant outputs fails: {reason(error)}"
    if not (constant.isfinite().all() and constant_test.isfinite().all()):
        return "losses of constant outputs are not finite"
    own, own_test = (model.losses(part).double().cpu() for part in (train, test))
    return Comparison(own, constant, own_test, constant_test)


def best_mixture(model: FinalModel, instances: Instances) -> Tensor | str:
    """Return the constant outputs of least mean loss among mixtures of those that there are, by L-BFGS.

    Mixtures of the model's own outputs, and of targets that have their shape, stay within the range of its
    last layer: under a loss of probabilities, say, outputs beyond 1 have a smaller loss than any that a
    network can give, and would make every model a poor one. Any mixture that is found is a constant, so a
    model that is worse than it is worse than the best one too.

    Returns:
        Outputs ``[...]`` of one instance, float64 on the CPU; in one line why they are not known.
    """
    numbers = model.outputs(instances[:1]).numel()
    most = MOST_NUMBERS // numbers
    if most < min(FEWEST, len(instances)):
        return f"{numbers:,} outputs for each instance are too many to look for the best constant among them"
    instances = _some(instances, most)
    outputs, targets = model.outputs(instances).double().cpu(), _wide(instances.targets)
    points = outputs
    if targets.is_floating_point() and targets.shape == points.shape:
        points = torch.cat([points, targets])
    if not points.isfinite().all():
        return "outputs are not finite"
    weights = torch.zeros(len(points), dtype=torch.float64, requires_grad=True)
    best, least = points.mean(0), torch.inf
    optimizer = torch.optim.LBFGS([weights], max_iter=40, max_eval=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        nonlocal best, least
        optimizer.zero_grad()
        constant = torch.einsum("k,k...->...", weights.softmax(0), points)
        value = model.loss(constant.expand_as(outputs), targets).mean()
        if (found := float(value.detach())) < least:
            best, least = constant.detach(), found
        value.backward()
        return value

    try:
        with torch.enable_grad():
            optimizer.step(closure)
    except Exception as error:  # whatever a loss of the user's own raises
        return f"the loss of constant outputs fails: {reason(error)}"
    return best


def _losses(loss: Loss, constant: Tensor, part: Instances) -> Tensor:
    """Return the losses ``[n]`` of constant outputs ``[...]``; a language model's ``[V]`` everywhere."""
    positions = part.targets.shape[1:] if loss.targets == "tokens" else ()  # each part has its own
    shape = (*positions, *constant.shape)
    at_once = max(1, AT_ONCE // max(1, torch.Size(shape).numel()))
    return torch.cat([loss(constant.expand(len(b), *shape), _wide(b.targets)) for b in part.batches(at_once)])


def _wide(targets: Tensor) -> Tensor:
    return targets.cpu().double() if targets.is_floating_point() else targets.cpu()


def _some(instances: Instances, most: int) -> Instances:
    n = min(most, len(instances))
    return instances[
        torch.tensor([k * len(instances) // n for k in range(n)], device=instances.targets.device)
    ]
