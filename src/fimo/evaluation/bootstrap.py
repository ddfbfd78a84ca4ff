"""Bootstrap intervals over seeds and test instances together."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.evaluation.metrics import MetricName, comparable, cosines
from fimo.further_training.sensitivity import adjust


def bootstrap_agreement(
    scores: dict[str, Tensor],
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
    u = {name: comparable(s, metric) for name, s in scores.items()}
    draws: dict[str, list[Tensor]] = {name: [] for name in scores}
    truth = comparable(adjust(raw.mean(0), subtract_mean), metric)
    estimate = {name: values.nanmean(-1) for name, values in cosines(u, truth).items()}
    for _ in range(resamples):
        drawn = torch.randint(seeds, (seeds,), generator=generator)
        weight = torch.bincount(drawn, minlength=seeds).to(raw.dtype) / seeds
        v = comparable(adjust(torch.einsum("s,sejl->ejl", weight, raw), subtract_mean), metric)
        instances = torch.randint(tests, (tests,), generator=generator)
        for name, values in cosines(u, v).items():
            draws[name].append(values[:, instances].nanmean(-1))
    tail = (1 - level) / 2
    intervals = {}
    for name, sampled in draws.items():
        sample = torch.stack(sampled) if sampled else torch.full((1, points), torch.nan)
        ends = torch.nanquantile(sample.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        ends = (ends + (estimate[name] - sample.nanmean(0))).clamp(-1, 1)
        intervals[name] = (ends[0], ends[1])
    return intervals
