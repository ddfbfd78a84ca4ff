"""Detection of mislabelled instances: flip a share of the labels, and see who finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from fimo.errors import InputError
from fimo.evaluation.metrics import mean_and_sem


def flip_labels(
    targets: Tensor, share: float, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Give a share of the instances another class, drawn evenly from the others.

    Args:
        targets: ``[N]`` int64 class indices.

    Returns:
        the new targets ``[N]``, and which were flipped, ``[N]`` bool.
    """
    if targets.is_floating_point() or classes < 2:
        raise InputError("evaluation.mislabelled", "labels can only be flipped in classification")
    count = round(share * len(targets))
    if not 0 < count < len(targets):
        raise InputError(
            "evaluation.mislabelled.share",
            f"expected to flip some, not all of {len(targets)} but got {share}",
        )
    chosen = torch.randperm(len(targets), generator=generator)[:count]
    offset = torch.randint(1, classes, (count,), generator=generator)
    flipped = torch.zeros(len(targets), dtype=torch.bool)
    flipped[chosen] = True
    changed = targets.clone()
    changed[chosen] = (changed[chosen] + offset.to(targets)) % classes
    return changed, flipped


def suspicion(scores: Tensor) -> Tensor:
    """Return how harmful instances are on average: minus the mean score over test instances.

    Args:
        scores: ``[J, L]``, or ``[E, J, L]``, of which the last evaluation point counts.

    Returns:
        ``[L]``; test labels are taken to be right.
    """
    return -(scores[-1] if scores.ndim == 3 else scores).double().mean(0)


def detection(repeats: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> pd.DataFrame:
    """Average precision of finding flipped labels, over repeats with other flips.

    Args:
        repeats: for each: by method the suspicion ``[L]`` (of :func:`suspicion`, or a self-influence), and
            which of the same instances were flipped, ``[L]`` bool.

    Returns:
        ``method,repeats,mean,sem,chance``: mean ± SEM over repeats; ``chance`` is the share of flipped
        instances, the average precision to expect of a random order.
    """
    if not repeats:
        raise InputError("evaluation.mislabelled.repeats", "expected at least one")
    rows = []
    chance = torch.tensor([flipped.double().mean() for _, flipped in repeats]).mean().item()
    for method in repeats[0][0]:
        values = torch.stack([average_precision(found[method], flipped) for found, flipped in repeats])
        mean, sem = mean_and_sem(values)
        rows.append((method, len(repeats), mean.item(), sem.item(), chance))
    return pd.DataFrame(rows, columns=["method", "repeats", "mean", "sem", "chance"])


def average_precision(values: Tensor, flipped: Tensor) -> Tensor:
    """Return the average precision of an order by ``values [L]``; NaN where it is undefined."""
    if not values.isfinite().all() or not flipped.any():
        return torch.tensor(torch.nan)
    # torchmetrics takes values outside [0, 1] for logits, whose sigmoid would saturate: ranks keep the order
    ordered = torch.unique(values, return_inverse=True)[1].double()
    return binary_average_precision(ordered / max(1, len(values)), flipped.long())
