"""Means over subsets and resamples of the seeds, and methods' agreement with each, in bounded memory.

A sensitivity of 50 seeds, 500 evaluation points, 103 test and 100 left-out instances holds 1 GB, and is
compared with every method under hundreds of subsets and resamples of its seeds. All of them are weighted
means over seeds: one matrix product per evaluation point and block of test instances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fimo.evaluation.metrics import MetricName, metric_of
from fimo.further_training.sensitivity import adjust

BLOCK = 2**20
"""Most numbers in a block of means; no result depends on it beyond rounding."""


def subset_weights(subsets: Sequence[Sequence[int]], seeds: int) -> Tensor:
    """Return the weights ``[K, S]`` of the mean over each of K subsets of the seeds."""
    weights = torch.zeros(len(subsets), seeds)
    for row, subset in zip(weights, subsets, strict=True):
        row[list(subset)] = 1 / len(subset)
    return weights


def seed_means(
    raw: Tensor, weights: Tensor, metric: MetricName, subtract_mean: bool
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield adjusted weighted means over seeds, as a metric prepares them
    (:meth:`fimo.evaluation.metrics.Metric.prepared`).

    Args:
        raw: ``[S, E, J, L]``; read once, an evaluation point at a time.
        weights: ``[K, S]``, none negative.

    Yields:
        the evaluation point, the block's test instances along J, and the means ``[K, J', L]``. A mean that
        gives a seed's non-finite change no weight is not touched by it.
    """
    seeds, points, tests, left_out = raw.shape
    kind, weights = metric_of(metric), weights.to(raw.dtype)
    size = max(1, BLOCK // max(1, len(weights) * left_out))
    for e in range(points):
        changes = adjust(raw[:, e], subtract_mean)
        for start in range(0, tests, size):
            block = slice(start, min(start + size, tests))
            means = _weighted(weights, changes[:, block].reshape(seeds, -1))
            yield e, block, kind.prepared(means.view(len(weights), -1, left_out))


def agreements(
    scores: Mapping[str, Tensor], raw: Tensor, weights: Tensor, metric: MetricName, subtract_mean: bool
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield every method's agreement with weighted means over seeds, see :func:`seed_means`.

    Args:
        scores: by method, ``[J, L]`` or ``[E, J, L]``.

    Yields:
        the evaluation point, the block's test instances along J, and the agreements ``[M, K, J']``, NaN where
        undefined; methods in the mapping's order.
    """
    kind = metric_of(metric)
    fixed = {name: kind.prepared(s) for name, s in scores.items() if s.ndim == 2}
    for e, block, means in seed_means(raw, weights, metric, subtract_mean):
        units = [
            fixed[name][block] if name in fixed else kind.prepared(s[e, block]) for name, s in scores.items()
        ]
        yield e, block, kind.crossed(torch.stack(units, 1), means).clamp(-1, 1)


def mean_agreements(
    scores: Mapping[str, Tensor],
    raw: Tensor,
    subsets: Mapping[int, Sequence[Sequence[int]]],
    metric: MetricName,
    subtract_mean: bool = True,
) -> dict[int, dict[str, Tensor]]:
    """Return, by key of ``subsets``, each method's agreement ``[E, J]``: the mean over those subsets' means.

    Args:
        scores: by method, ``[J, L]`` or ``[E, J, L]``.
        raw: ``[S, E, J, L]``.
        subsets: by any key, subsets of the seeds.
    """
    every = [subset for group in subsets.values() for subset in group]
    sizes = [len(group) for group in subsets.values()]
    found = torch.empty(len(subsets), len(scores), *raw.shape[1:3])
    for e, block, values in agreements(scores, raw, subset_weights(every, len(raw)), metric, subtract_mean):
        for mean, group in zip(found, values.split(sizes, 1), strict=True):
            mean[:, e, block] = group.nanmean(1)
    return {key: dict(zip(scores, means, strict=True)) for key, means in zip(subsets, found, strict=True)}


def _weighted(weights: Tensor, changes: Tensor) -> Tensor:
    """Return ``weights [K, S] @ changes [S, n]``, in which zero times a non-finite number is zero."""
    if changes.sum().isfinite():  # ten times as fast as asking every number
        return weights @ changes
    finite = changes.isfinite()
    touched = weights @ (~finite).to(weights.dtype) > 0
    return (weights @ changes.where(finite, 0.0)).masked_fill(touched, torch.nan)
