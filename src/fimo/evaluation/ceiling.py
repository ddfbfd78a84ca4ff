"""Noise ceilings: what agreement a perfect method could show, the gold standard being a finite mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.deconvolution import signal_strengths
from fimo.evaluation.metrics import MetricName, metric_of
from fimo.evaluation.resampling import seed_means, subset_weights
from fimo.further_training.sensitivity import adjust

TOO_LOW = 0.5
"""A ceiling below which the gold standard has not enough seeds to tell methods apart."""

WANTED = 0.9
"""A ceiling to aim for."""

SCALED = 0.15
"""Mean difference of log(1 + F) from which halves and the variance between seeds are told to differ.
Simulated noise, normal and heavy-tailed, alike and of different sizes, shows .00 to .13; effects of other
sizes with each seed .3 to 3, where that matters."""

PRECISE = 1e4
"""F of which differences matter to no ceiling."""

FEWEST_ELEMENTS = 4
"""Independent elements of a vector's noise that are assumed at least."""


@dataclass(frozen=True)
class Ceilings:
    """Noise ceilings by evaluation point and number of seeds averaged, ``[E, K]`` (or ``[E, J, K]``).

    Args:
        upper: agreement of the noiseless sensitivity with the mean over k seeds: no prediction that knows
            nothing of these seeds' noise can show more.
        lower: agreement of the mean over S other seeds with the mean over k seeds: what making the gold
            standard again would show, and what a method shows that follows S seeds of its own without a flaw
            but does not average their noise away. A method between the two is as good as the gold standard.
    """

    upper: Tensor
    lower: Tensor


def noise_ceiling(
    raw: Tensor,
    metric: MetricName = "cosine",
    subtract_mean: bool = True,
    seed_counts: Sequence[int] | None = None,
    splits: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the upper ceiling ``[E, K]``, see :func:`noise_ceilings`."""
    return noise_ceilings(raw, metric, subtract_mean, seed_counts, splits, generator).upper


def noise_ceilings(
    raw: Tensor,
    metric: MetricName = "cosine",
    subtract_mean: bool = True,
    seed_counts: Sequence[int] | None = None,
    splits: int = 50,
    generator: torch.Generator | None = None,
) -> Ceilings:
    r"""Agreement of the mean over k seeds with the noiseless truth, and with the mean over S other seeds.

    Test instance j's mean over k seeds is its noiseless sensitivity plus noise. With λ the squared length of
    the former over the variance of one element of the S seeds' mean, and n the elements' degrees of freedom,
    its expected cosine with the noiseless sensitivity is, to second order in the noise,

    .. math::
        a_k = \sqrt{\frac{\lambda_k}{\lambda_k + n - 1}}
              \left(1 - \tfrac34 \frac{n - 1}{(\lambda_k + n - 1)^2}\right), \qquad \lambda_k = \lambda k / S

    (the root is Spearman's correction for attenuation, 1904, λ_k being proportional to k is Spearman and
    Brown's formula, 1910), and a_k a_S with an independent mean over S seeds. So upper = a_k, lower =
    a_k a_S. The latter is the lower ceiling of representational similarity analysis (Nili et al., 2014: each
    subject with the mean over the others) with S others in place of S - 1, for means over k instead of single
    subjects. Their upper one, with the mean that includes the subject itself, is only a bound, and 1 at
    k = S.

    λ is estimated from the seeds' mean square over the variance between seeds; for other metrics than cosines
    (``spearman``, ``kendall``) from their mean between halves of the seeds, as the Pearson correlation that
    has it under normality (in closed form where the metric knows it, else by simulation); for
    cosines of raw changes from that of halves, since the full run's noise is in all left-out instances, and
    so where halves agree clearly more than that variance tells (:data:`SCALED`): a seed with which all
    effects are larger adds to it, but turns no cosine. As this is noisy, and the ceiling's root is not
    linear, each test instance's ceiling is the posterior mean under the distribution of λ over test instances
    (:func:`~fimo.evaluation.deconvolution.signal_strengths`); then it is averaged over test instances as the
    agreement itself is.

    Accuracy (``benchmarks/ceiling.py``: upper ceiling minus the truth's real agreement, 30 left-out and
    100 test instances, S = 2 to 20). Normal noise, alike or .3 to 10 times the signal: within .02 where
    the truth shows .5 or more, within .04 below; no signal at all reads .06 to .14. Further training of
    small networks: cosine and Pearson within .02, Spearman too high, by .01 to .07 for S ≤ 5 and by .00
    to .03 for more, since noise differs between left-out instances there. Noise without a variance to
    speak of (t with 2.2 degrees of freedom): .00 to .04 too high, Spearman .02 to .08. A cosine of raw
    changes (``subtract_mean=False``), where all left-out instances share the full run's noise: -.11 to
    +.01 for S ≤ 5. All effects larger with some seeds than others (log-normal, sd 1): -.08 and -.05 for S = 2
    and 3, -.02 to .00 for more, under noise of .3; -.07 to -.03 under noise of 3. The lower ceiling's errors
    are up to twice these.

    Args:
        raw: ``[S, E, J, L]``.
        subtract_mean: adjust as the sensitivity is adjusted.
        seed_counts: the K numbers of seeds averaged; 1…S when None.
        splits: most random splits; all distinct ones when they are fewer.

    Returns:
        ``[E, K]``; NaN with one seed, see :func:`ceiling_undefined`.
    """
    each = instance_ceilings(raw, metric, subtract_mean, seed_counts, splits, generator)
    return Ceilings(each.upper.nanmean(1), each.lower.nanmean(1))


def instance_ceilings(
    raw: Tensor,
    metric: MetricName = "cosine",
    subtract_mean: bool = True,
    seed_counts: Sequence[int] | None = None,
    splits: int = 50,
    generator: torch.Generator | None = None,
) -> Ceilings:
    """Return the ceilings of each test instance, ``[E, J, K]``; arguments as :func:`noise_ceilings`."""
    seeds, points, tests, left_out = raw.shape
    counts = torch.tensor(list(seed_counts or range(1, seeds + 1)), dtype=torch.float64)
    if counts.numel() and (counts.min() < 1 or counts.max() > seeds):
        raise InputError(
            "evaluation.seed_counts", f"expected 1 to {seeds} (the seeds there are) but got {counts.tolist()}"
        )
    upper = torch.full((points, tests, len(counts)), torch.nan)
    lower = upper.clone()
    if ceiling_undefined(seeds) is not None:
        return Ceilings(upper, lower)
    kind = metric_of(metric)
    law, offset = not kind.by_cosine, not kind.centred and not subtract_mean
    freedom = left_out if offset else left_out - 1
    halves = half_agreements(raw, metric, subtract_mean, splits, generator)
    for e in range(points):
        ratio, elements = variance_ratio(adjust(raw[:, e].double(), not offset), freedom)
        of_halves = ratio_of_halves(kind.correlation_of(halves[e], left_out) if law else halves[e], seeds)
        if law or offset or more_agree(of_halves, ratio):
            ratio = of_halves
        # ranks, say, tell as much as so many fewer values would
        elements = elements * kind.efficiency(left_out) if law else elements
        strength, probability = signal_strengths(ratio, elements, seeds)
        strength = strength * freedom / elements  # fewer independent elements, but of the same reliability
        with_all = expected_cosine(strength, freedom)
        with_k = expected_cosine(counts[:, None] / seeds * strength, freedom)  # [K, G]
        for ceiling, cosine in ((upper, with_k), (lower, with_k * with_all)):
            ceiling[e] = (probability @ (kind.expected(cosine, left_out) if law else cosine).T).float()
    return Ceilings(upper, lower)


def variance_ratio(changes: Tensor, freedom: int) -> tuple[Tensor, Tensor]:
    """Return each test instance's F ``[J]``, and the number of independent elements of its noise.

    The latter is (sum of variances)² / (sum of squared variances), as Satterthwaite (1946) has it: left-out
    instances differ in their noise, and few that have much of it count for more than many that have little.

    Args:
        changes: ``[S, J, L]``, adjusted.
        freedom: the largest number, where all elements have the same variance.
    """
    seeds = len(changes)
    mean = changes.mean(0)
    squares = (changes - mean).square().sum(0)  # [J, L]
    variance = squares.sum(-1) / (seeds - 1)
    fourth = (squares.square() / ((seeds - 1) * (seeds + 1))).sum(-1)  # unbiased for the squared variances
    elements = (variance.square() - 2 * fourth / (seeds - 1)) / fourth
    elements = elements[elements.isfinite()]
    few = min(FEWEST_ELEMENTS, freedom)
    typical = elements.median().clamp(few, freedom) if len(elements) else torch.tensor(float(freedom))
    return seeds * mean.square().sum(-1) / variance, typical.double()


def expected_cosine(strength: Tensor, freedom: int) -> Tensor:
    """Return the expected cosine of a vector with itself plus noise, see :func:`noise_ceilings`."""
    others = max(freedom - 1, 0)
    length = (strength + others).clamp(min=torch.finfo(torch.float64).tiny)
    return (strength / length).sqrt() * (1 - 0.75 * others / length.square().clamp(min=1))


def ratio_of_halves(correlation: Tensor, seeds: int) -> Tensor:
    """Return the F of S seeds at which means over half of them have this correlation."""
    more = seeds / (seeds // 2)  # halves of an odd number leave one out
    return (1 + (more - 1) * correlation).clamp(min=0) / (1 - correlation)


def more_agree(of_halves: Tensor, ratio: Tensor) -> bool:
    """Return whether halves of the seeds agree clearly more than the variance between seeds tells (as F)."""
    first, second = (x.clamp(0, PRECISE).log1p() for x in (of_halves, ratio))
    return bool((first - second).nanmean() > SCALED)


def half_agreements(
    raw: Tensor,
    metric: MetricName,
    subtract_mean: bool = True,
    splits: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the agreement ``[E, J]`` of means over halves of the seeds, itself a mean over random splits."""
    seeds, points, tests, _ = raw.shape
    kind, chosen = metric_of(metric), half_splits(seeds, splits, generator)
    weights = subset_weights([side for split in zip(*chosen, strict=True) for side in split], seeds)
    total = torch.empty(points, tests, dtype=torch.float64)
    for e, block, means in seed_means(raw, weights, metric, subtract_mean):
        first, second = means.split(len(chosen))
        total[e, block] = kind.paired(first, second).double().sum(0)
    return total / len(chosen)


def seeds_for(ceiling: float, seeds: int, target: float = WANTED) -> int | None:
    r"""Return how many seeds would raise the upper ceiling to ``target``, by Spearman and Brown's formula.

    .. math::
        n = S \; \frac{r_n}{1 - r_n} \; \frac{1 - r_S}{r_S}, \qquad r = \mathrm{ceiling}^2

    Args:
        ceiling: the upper one with S seeds.
        seeds: S.

    Returns:
        None where the ceiling is undefined or zero, so that no number is known to reach it.

    Example:
        >>> seeds_for(0.45, seeds=4)
        68
    """
    if not 0 < target < 1:
        raise InputError("target", f"expected a ceiling between 0 and 1 but got {target}")
    if not ceiling > 0:
        return None
    reliability, wanted = min(ceiling, 1.0) ** 2, target**2
    return max(1, math.ceil(seeds * wanted / (1 - wanted) * (1 - reliability) / reliability - 1e-9))


def not_enough_seeds(ceiling: float, seeds: int, metric: str = "cosine") -> str | None:
    """Return that seeds are too few to tell methods apart, and how many would do; None where they are not."""
    if not ceiling < TOO_LOW:
        return None
    more = seeds_for(ceiling, seeds)
    advice = f"about {more} would reach {WANTED}" if more else "there is no sign of any signal"
    return (
        f"not enough seeds: with {seeds} the noise ceiling ({metric}) after all further training is "
        f"{ceiling:.2f}, so even a perfect method could show no more; {advice} (further_training.seeds)"
    )


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
