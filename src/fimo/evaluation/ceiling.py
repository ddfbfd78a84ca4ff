"""The noise ceiling: what agreement a perfect method could show, the gold standard being a finite mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.metrics import MetricName
from fimo.evaluation.resampling import seed_means, subset_weights


def noise_ceiling(
    raw: Tensor,
    metric: MetricName = "cosine",
    subtract_mean: bool = True,
    seed_counts: Sequence[int] | None = None,
    splits: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Agreement that the noiseless sensitivity would show with its mean over k seeds.

    The seeds are split into two halves of h seeds at random, many times; the agreement r of the halves'
    means, averaged over splits, is the reliability of a mean over h seeds. For k seeds (Spearman and
    Brown, 1910), and for the agreement with the noiseless truth (attenuation, Spearman, 1904):

    .. math::
        r_k = \frac{(k/h) \, r}{1 + (k/h - 1) \, r}, \qquad \mathrm{ceiling}_k = \sqrt{r_k}

    per test instance, then averaged over test instances as the agreement itself is. Both formulas are
    exact in expectation for ``pearson``, and for ``cosine`` (of centred vectors the same); for ``spearman``
    they are the usual approximation. A reliability below zero counts as zero.

    Args:
        raw: ``[S, E, J, L]``.
        subtract_mean: adjust as the sensitivity is adjusted.
        seed_counts: the K numbers of seeds averaged; 1…S when None.
        splits: most random splits; all distinct ones when they are fewer.

    Returns:
        ``[E, K]``; NaN with one seed, see :func:`ceiling_undefined`.
    """
    return instance_ceiling(raw, metric, subtract_mean, seed_counts, splits, generator).nanmean(1)


def instance_ceiling(
    raw: Tensor,
    metric: MetricName = "cosine",
    subtract_mean: bool = True,
    seed_counts: Sequence[int] | None = None,
    splits: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the ceiling of each test instance, ``[E, J, K]``; arguments as :func:`noise_ceiling`."""
    seeds, points, tests, _ = raw.shape
    counts = torch.tensor(list(seed_counts or range(1, seeds + 1)), dtype=torch.float64)
    if counts.numel() and (counts.min() < 1 or counts.max() > seeds):
        raise InputError(
            "evaluation.seed_counts", f"expected 1 to {seeds} (the seeds there are) but got {counts.tolist()}"
        )
    if ceiling_undefined(seeds) is not None:
        return torch.full((points, tests, len(counts)), torch.nan)
    half = seeds // 2
    chosen = half_splits(seeds, splits, generator)
    weights = subset_weights([side for split in zip(*chosen, strict=True) for side in split], seeds)
    total = torch.empty(points, tests, dtype=torch.float64)
    for e, block, means in seed_means(raw, weights, metric, subtract_mean):
        first, second = means.split(len(chosen))
        total[e, block] = (first * second).sum(-1).double().sum(0)
    reliability = (total / len(chosen)).clamp(0, 1)[..., None]
    ratio = counts / half
    return torch.sqrt(ratio * reliability / (1 + (ratio - 1) * reliability)).float()


def ceiling_undefined(seeds: int) -> str | None:
    """Return why there is no ceiling, or None."""
    if seeds < 2:
        return "the noise ceiling is undefined with one seed: it compares halves of the seeds"
    return None


def half_splits(
    seeds: int, most: int, generator: torch.Generator | None = None
) -> list[tuple[list[int], list[int]]]:
    """Return splits of ``range(seeds)`` into two halves of ``seeds // 2``: all, or ``most`` random ones."""
    half = seeds // 2
    distinct = math.comb(seeds, half) // 2 if seeds % 2 == 0 else seeds * math.comb(seeds - 1, half) // 2
    if distinct <= most:
        kept = itertools.combinations(range(seeds), 2 * half)
        return [
            (list(first), [s for s in among if s not in first])
            for among in kept
            for first in itertools.combinations(among, half)
            if among[0] in first  # each unordered split once
        ]
    generator = generator or torch.Generator().manual_seed(0)
    orders = [torch.randperm(seeds, generator=generator).tolist() for _ in range(most)]
    return [(order[:half], order[half : 2 * half]) for order in orders]
