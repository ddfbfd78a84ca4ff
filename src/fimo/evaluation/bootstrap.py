"""Bootstrap intervals over seeds and test instances together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fimo.evaluation.metrics import MetricName
from fimo.evaluation.resampling import agreements


def bootstrap_agreement(
    scores: Mapping[str, Tensor],
    raw: Tensor,
    metric: MetricName,
    subtract_mean: bool = True,
    resamples: int = 100,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Intervals of each method's mean agreement, seeds and test instances drawn again with replacement.

    Drawing seeds again adds noise to the sensitivity, so that resampled agreements are too low on average
    (by as much as the S seeds' own noise lowers the agreement). The interval is therefore the resamples'
    percentiles moved by their bias: estimate + (percentile - mean of resamples).

    Args:
        scores: by method, ``[J, L]`` or ``[E, J, L]``.
        raw: ``[S, E, J, L]``; with one seed only test instances are drawn again.
        level: of the interval, in (0, 1).

    Returns:
        by method, the interval's ends ``([E], [E])`` within [-1, 1].
    """
    seeds, points, tests, _ = raw.shape
    generator = generator or torch.Generator().manual_seed(0)
    weights, instances = [torch.ones(seeds)], [torch.ones(tests)]  # the estimate: everything once
    for _ in range(resamples):
        for counts in (weights, instances):
            drawn = torch.randint(len(counts[0]), (len(counts[0]),), generator=generator)
            counts.append(torch.bincount(drawn, minlength=len(counts[0])).float())
    drawn_tests = torch.stack(instances)  # [R + 1, J]
    total = torch.zeros(len(scores), points, resamples + 1)
    count = torch.zeros_like(total)
    for e, block, values in agreements(scores, raw, torch.stack(weights) / seeds, metric, subtract_mean):
        times = drawn_tests[:, block]
        total[:, e] += (values.nan_to_num(0.0) * times).sum(-1)
        count[:, e] += (values.isfinite() * times).sum(-1)
    means = (total / count).double()  # [M, E, R + 1]; 0 / 0 is NaN
    estimate, sample = means[..., :1], means[..., 1:] if resamples else torch.full_like(means, torch.nan)
    tail = (1 - level) / 2
    ends = torch.nanquantile(sample, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=-1)
    low, high = (ends + (estimate - sample.nanmean(-1, keepdim=True))[..., 0]).clamp(-1, 1)
    return {name: (low[m], high[m]) for m, name in enumerate(scores)}
