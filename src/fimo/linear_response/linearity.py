"""The error of predictions that all seeds share, measured by a few real leave-one-out runs.

A prediction p_is for instance i along a seed s differs from the real change r_is by

    r_is - p_is = f_i d_i + c + n_is,

per test instance and evaluation point: d_i and c are what the prediction misses for every seed (its error
of linearity), in the instance alone and in all instances alike, and n_is is what it misses of this seed. A
mean over seeds averages n away, but neither d nor c. Instances that run with two seeds tell them apart: the
variance of the seeds' mean is f_i^2 var(d) + var(c) + var(n) / 2, that of half their difference var(n) / 2.

Errors grow with effects: f_i = s_i^gamma with s_i the size of the effect, and gamma the likeliest of a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.engine.threads import one_thread
from fimo.linear_response.path_points import spread

GROWTH = (0.25, 0.5, 0.75, 1.0)
"""Candidates for gamma."""

FLOOR = 0.05
"""Of sizes, relative to their root mean square over instances."""

AVERAGE = 0.2
"""Share of an instance's mean squared size over test instances in each of its squared sizes."""

WINDOW = 0.3
"""Decay, in log(steps), of the weight of other evaluation points."""

ANCHORS = 40
"""Evaluation points at which variances are fitted; others take the nearest one's."""

NEAR = 12
"""Most evaluation points that bear on one."""

PRIOR = 4
"""Instances that count as much as the prior, by which half of a mean's variance is shared by all seeds."""

ALIKE = 4
"""Test instances of one training instance tell about as much of its own scale as so many independent ones,
and the prior, by which it is that of other instances of its size, as much again."""


@dataclass(frozen=True)
class Discrepancy:
    """Variances of what predictions miss for every seed; NaN where they can't be told.

    Args:
        own: ``[E, J, L]``, of each left-out instance's own part.
        common: ``[E, J, 1]``, of the part that all left-out instances share.
        of_mean: ``[E, J, 1]``, of the own parts' mean over left-out instances; as if independent when None.
    """

    own: Tensor
    common: Tensor
    of_mean: Tensor | None = None

    def raw(self) -> Tensor:
        """Return the variance ``[E, J, L]`` of a score's error."""
        return self.own + self.common

    def adjusted(self) -> Tensor:
        """Return it for scores minus their mean over left-out instances, where the common part cancels."""
        count = self.own.shape[-1]
        of_mean = self.own.mean(-1, keepdim=True) / count if self.of_mean is None else self.of_mean
        return self.own * (1 - 2 / count) + of_mean


def stratified(size: Tensor, count: int, largest: int = 1) -> tuple[Tensor, Tensor]:
    """Choose instances of all sizes: the largest ones, and those in the middle of strata of the others.

    Args:
        size: ``[L]``.
        count: M of them; all L if there are no more.
        largest: how many of the largest.

    Returns:
        their positions ``[M]``, the largest first, and how many instances each stands for ``[M]``.
    """
    order = size.argsort(descending=True, stable=True).cpu()
    total = len(order)
    if count >= total:
        return order, torch.ones(total, dtype=torch.float64)
    largest = min(largest, count)
    strata = count - largest
    width = (total - largest) / strata if strata else 0.0
    middles = [largest + int((k + 0.5) * width) for k in range(strata)]
    weights = torch.tensor([1.0] * largest + [width] * strata, dtype=torch.float64)
    return order[[*range(largest), *middles]], weights


def discrepancy(
    steps: Sequence[int], residual: Tensor, scores: Tensor, checked: Tensor, weight: Tensor
) -> Discrepancy:
    """Estimate the error of scores that seeds share.

    Variances are those of a normal distribution with as many errors within one and two standard deviations as
    there are, which is what an error bar promises; root mean squares would follow the few largest.

    Args:
        steps: ``[E]``, at the evaluation points.
        residual: ``[2, E, J, M]``, real minus predicted changes of two seeds without M of the instances.
        scores: ``[E, J, L]``.
        checked: ``[M]``, positions of those instances among the L.
        weight: ``[M]``, how many instances each stands for.
    """
    residual, scores = residual.double().cpu(), scores.double().cpu()
    own = torch.full_like(scores, torch.nan)
    common = torch.full_like(scores[..., :1], torch.nan)
    finite = residual.isfinite().flatten(2).all(2).all(0) & scores.isfinite().flatten(1).all(1)
    known = finite.nonzero()[:, 0]
    if not len(known) or len(checked) < 3:
        return Discrepancy(own, common)
    time = torch.tensor(steps, dtype=torch.float64)[known]
    with one_thread():  # many small tensors
        own[known], common[known] = _fit(time, residual[:, known], scores[known], checked, weight)
    return Discrepancy(own, common)


def _fit(
    time: Tensor, residual: Tensor, scores: Tensor, checked: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    mean, noise = residual.mean(0), (residual[0] - residual[1]) / 2  # [E, J, M]
    unit = (scores.square().mean(2, keepdim=True) + mean.square().mean(2, keepdim=True)).sqrt()
    unit = unit.maximum(1e-9 * unit.amax(1, keepdim=True)).clamp(min=1e-150)
    square = (scores / unit).square()
    size = ((1 - AVERAGE) * square + AVERAGE * square.mean(1, keepdim=True) + FLOOR**2).sqrt()
    mean, noise = mean / unit, noise / unit
    anchors = [k - 1 for k in spread(time.tolist(), ANCHORS)]
    own, common = torch.empty_like(scores), torch.empty_like(unit)
    fitted = {e: _fit_near(time, e, mean, noise, size[:, :, checked], weight) for e in anchors}
    for e in range(len(time)):
        nearest = min(anchors, key=lambda k: abs(float((time[k] / time[e]).log())))
        growth, variance, shared, scale = fitted[nearest]
        own[e] = variance * size[e] ** (2 * growth) * unit[e].square()
        own[e][:, checked] *= scale
        common[e] = shared * unit[e].square()
    return own, common


def _fit_near(
    time: Tensor, e: int, mean: Tensor, noise: Tensor, size: Tensor, weight: Tensor
) -> tuple[float, float, float, Tensor]:
    """Return gamma, the variances of d and c, and each checked instance's scale ``[M]`` of the former."""
    nearness = torch.exp(-(time / time[e]).log().abs() / WINDOW)
    points = (nearness > 0.02).nonzero()[:, 0]
    if len(points) > NEAR:
        thin = torch.linspace(0, len(points) - 1, NEAR, dtype=torch.float64).round().long()
        points = torch.cat([points[thin], torch.tensor([e])]).unique()
    mean, noise, size = mean[points], noise[points], size[points]
    weights = nearness[points, None, None] * weight.expand_as(mean)
    fits = [_standardised(mean, noise, size**growth, weights) for growth in GROWTH]
    # of Laplace distributions, which have heavy tails
    likelihood = [
        -_mean((size**g).log(), weights) - float(_mean(fit[0].abs(), weights).clamp(min=1e-300).log())
        for g, fit in zip(GROWTH, fits, strict=True)
    ]
    best = int(torch.tensor(likelihood).argmax())
    z, z_noise, offset, offset_noise, leak = fits[best]
    total, passing = _scale(z, weights) ** 2, _scale(z_noise, weights) ** 2
    share = max(-1.0, 1 - passing / total) if total > 0 else 0.0
    count = z.shape[2]
    variance = total * max(0.0, (count * share + PRIOR / 2) / (count + PRIOR))
    excess = offset.square() - offset_noise.square() - variance * leak
    shared = float(_mean(excess, nearness[points, None, None].expand_as(excess)).clamp(min=0))
    of_each = (z.square() * weights).sum((0, 1)) / weights.sum((0, 1)) / max(total, 1e-300)
    return GROWTH[best], variance, shared, (1 + of_each) * ALIKE / (2 * ALIKE)


def _standardised(
    mean: Tensor, noise: Tensor, growth: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return residuals around their common part, and the noise in them, both in units of ``growth``.

    Also the common part ``[E, J, 1]``, the noise in it, and its variance by d alone, per variance of d.
    """
    share = weights / growth
    share = share / share.sum(2, keepdim=True)
    offset, offset_noise = ((x * share).sum(2, keepdim=True) for x in (mean, noise))
    leak = (share * growth).square().sum(2, keepdim=True)
    kept = (1 - 2 * share + leak / growth.square()).clamp(min=0.05).sqrt()
    return (mean - offset) / growth / kept, (noise - offset_noise) / growth / kept, offset, offset_noise, leak


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()


def _scale(values: Tensor, weights: Tensor) -> float:
    """Return the standard deviation by the 68 % and the 95 % of values nearest to zero."""
    size, order = values.abs().flatten().sort()
    below = weights.flatten()[order].cumsum(0)
    one, two = (size[int((below < q * below[-1]).sum().clamp(max=len(size) - 1))] for q in (0.6827, 0.9545))
    return float(one + two / 2) / 2


def heavier_tails(freedom: float) -> float:
    """Return what a standard error from so many degrees of freedom must be widened by.

    Mean over 68 % and 95 % of Student's quantiles divided by the normal ones (expansion of Fisher and
    Cornish, 1960; below 2 % off from 4 degrees on).
    """
    factors = []
    for z in (1.0, 2.0):
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        factors.append((z + first / freedom + second / freedom**2 + third / freedom**3) / z)
    return sum(factors) / 2
