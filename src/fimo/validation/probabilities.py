"""Whether a network's outputs are probabilities already where the loss takes logits."""

from __future__ import annotations

from torch import Tensor

from fimo.models.class_losses import CrossEntropy
from fimo.models.loss_function import Loss

TOLERANCE = 1e-4
"""By which a row of probabilities may miss 1: rounding in float32."""

PROBABILITIES = (
    "outputs look like probabilities (each row adds up to 1), but cross_entropy takes logits: leave out the "
    "last softmax, or take its logarithm"
)


def unlike_logits(loss: Loss, outputs: Tensor) -> str | None:
    """Return in one line that outputs are probabilities where logits are expected; None where they aren't.

    Nothing fails then: softmax is taken once more, and all effects are of another loss.

    Args:
        outputs: ``[n, ...]`` of some training instances.
    """
    if not isinstance(loss, CrossEntropy) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return None
    if (outputs < 0).any() or ((outputs.float().sum(1) - 1).abs() > TOLERANCE).any():
        return None
    return PROBABILITIES
