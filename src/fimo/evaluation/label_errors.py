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
        ``method,repeats,mean,sem,chance``: mean ± SEM over repeats; ``chance`` is the average precision to
        expect of a random order (:func:`chance_precision`).
    """
    if not repeats:
        raise InputError("evaluation.mislabelled.repeats", "expected at least one")
    rows = []
    levels = [chance_precision(int(flipped.sum()), len(flipped)) for _, flipped in repeats]
    chance = sum(levels) / len(levels)
    for method in repeats[0][0]:
        values = torch.stack([average_precision(found[method], flipped) for found, flipped in repeats])
        mean, sem = mean_and_sem(values)
        rows.append((method, len(repeats), mean.item(), sem.item(), chance))
    return pd.DataFrame(rows, columns=["method", "repeats", "mean", "sem", "chance"])


def chance_precision(flipped: int, instances: int) -> float:
    """Return the expected average precision of a random order.

    The instance at rank k is one of the R flipped ones with probability R/L, and then each of the k - 1
    before it with (R - 1)/(L - 1); the mean over k of 1/k + (1 - 1/k) (R - 1)/(L - 1) is

        (R - 1)/(L - 1) + (1 - (R - 1)/(L - 1)) H_L / L,

    with the harmonic number H_L: the share of flipped instances only where there are many.

    Args:
        flipped: R, at least 1 (NaN where there are none).
        instances: L.
    """
    if not flipped:
        return float("nan")
    others = (flipped - 1) / (instances - 1) if instances > 1 else 1.0
    harmonic = sum(1 / k for k in range(1, instances + 1))
    return others + (1 - others) * harmonic / instances


def average_precision(values: Tensor, flipped: Tensor) -> Tensor:
    """Return the average precision of an order by ``values [L]``; NaN where it is undefined."""
    if not values.isfinite().all() or not flipped.any():
        return torch.tensor(torch.nan)
    # torchmetrics takes values outside [0, 1] for logits, whose sigmoid would saturate: ranks keep the order
    ordered = torch.unique(values, return_inverse=True)[1].double()
    return binary_average_precision(ordered / max(1, len(values)), flipped.long())
