"""Per-instance losses, by the names that configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.data.instances import IGNORED
from fimo.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``[n, ...]``, targets ``[n, ...]``) -> one loss per instance ``[n]``."""


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, averaged over an instance's outputs: ``[n, D], [n, D] -> [n]``."""
    return (outputs - like(outputs, targets)).square().flatten(1).mean(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits ``[n, C]`` with class indices ``[n]``, per instance ``[n]``."""
    return F.cross_entropy(outputs, targets, reduction="none")


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits ``[n, D]`` with 0/1 targets ``[n, D]``, averaged over D: ``[n]``."""
    targets = like(outputs, targets).to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).mean(1)


def like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return values in the outputs' shape, where that only adds or drops axes of size one (``[n]``).

    Raises:
        InputError: the shapes differ otherwise: they would be broadcast, and losses would mix instances.
    """
    if outputs.shape == targets.shape:
        return targets
    (n, *ours), (m, *theirs) = outputs.shape, targets.shape
    if n == m and [d for d in ours if d != 1] == [d for d in theirs if d != 1]:
        return targets.reshape(outputs.shape)
    raise InputError(
        "model.loss",
        f"outputs of shape {tuple(ours)} for each instance don't go with targets of shape {tuple(theirs)}",
    )


def language_modelling(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position's token, averaged over an instance's tokens.

    Args:
        outputs: logits ``[n, T, V]``; position t predicts ``targets[:, t]`` (the data set shifts them).
        targets: token indices ``[n, T]`` int64; -100 where there is nothing to predict.

    Returns:
        ``[n]``; 0 for an instance without tokens.
    """
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def logit_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-odds of the correct class, ``log p / (1 - p)`` (Park et al., 2023): ``[n, C], [n] -> [n]``.

    Sequences ``[n, T, V], [n, T]`` are averaged over their tokens. It rises as the loss falls, so a training
    instance that helps has a negative score.
    """

    def margin(logits: Tensor, correct: Tensor) -> Tensor:
        own = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, correct[..., None], True)
        others = logits.masked_fill(own, -torch.inf).logsumexp(-1)
        return logits.gather(-1, correct[..., None])[..., 0] - others

    return _over_tokens(margin, outputs, targets)


def correct_probability(outputs: Tensor, targets: Tensor) -> Tensor:
    """Probability of the correct class: ``[n, C], [n] -> [n]``, or averaged over tokens, as in a margin."""

    def probability(logits: Tensor, correct: Tensor) -> Tensor:
        return logits.softmax(-1).gather(-1, correct[..., None])[..., 0]

    return _over_tokens(probability, outputs, targets)


def _over_tokens(value: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``value`` per instance, averaged over the tokens of sequences."""
    if outputs.dim() == 2:
        return value(outputs, targets)
    kept = targets != IGNORED
    values = value(outputs, targets.clamp(min=0))
    return torch.where(kept, values, 0).sum(1) / kept.sum(1).clamp(min=1)


LOSSES: dict[str, Loss] = {
    "mse": mean_squared_error,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "language_modelling": language_modelling,
}

CONVEX = (mean_squared_error, cross_entropy, binary_cross_entropy, language_modelling)
"""Losses whose Hessian in the outputs has no negative part, which Gauss-Newton's rows would leave out."""

MEASUREMENTS: dict[str, Loss] = {
    **LOSSES,
    "logit_margin": logit_margin,
    "correct_probability": correct_probability,
}
"""What may be explained on test instances, by name."""


def loss_name(loss: Loss) -> str:
    """Return the configured name of a known loss, else the callable's qualified name."""
    loss = getattr(loss, "loss", loss)  # where it follows its outputs
    for name, known in MEASUREMENTS.items():
        if loss is known:
            return name
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', repr(loss))}"


def output_hessian(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Second derivative of each instance's loss in its own outputs.

    Args:
        outputs: ``[n, ...]``, D values for each instance.
        targets: ``[n, ...]``.

    Returns:
        ``[n, D, D]`` of the flattened outputs; for cross-entropy ``diag(p) - p p^T``, for the mean squared
        error ``2 I / D``.
    """
    n, shape = len(outputs), outputs.shape[1:]
    if loss is mean_squared_error:
        d = shape.numel()
        return (2.0 / d) * torch.eye(d, dtype=outputs.dtype, device=outputs.device).expand(n, d, d)
    if loss is cross_entropy:
        p = outputs.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    # value i depends on outputs i alone, so a derivative of the sum is each one's; not by torch.func, whose
    # vmap refuses losses that choose by a mask
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, targets).sum(), leaf, create_graph=True)
        if not gradient.requires_grad:  # linear in the outputs
            return outputs.new_zeros(n, shape.numel(), shape.numel())
        rows = [
            torch.autograd.grad(column.sum(), leaf, retain_graph=True, materialize_grads=True)[0].flatten(1)
            for column in gradient.flatten(1).unbind(1)
        ]
    return torch.stack(rows, 1)
