"""How good the screen is, from random rows that were left out: its calibration, and what it missed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimo.audit.verdicts import Estimates

DRAWS = 400
"""Of true effects, for the estimate of recall."""

LEAST_SCALE = 0.5
"""Of scores' errors: they are not below the noise of the seeds that scores come from."""


@dataclass(frozen=True)
class Calibration:
    """The line measured = slope * predicted + rest over random rows.

    Args:
        slope, slope_sem: of measured effects on scores.
        correlation: of measured effects and scores; the measured ones' noise lowers it.
    """

    slope: float
    slope_sem: float
    correlation: float


def calibrated(score: Tensor, measured: Estimates) -> Calibration:
    """Return the calibration of scores ``[C]`` by measured effects of the same random rows."""
    x, y = score.double(), measured.mean.double()
    known = x.isfinite() & y.isfinite()
    x, y = x[known], y[known]
    if len(x) < 4 or float(x.std()) == 0:
        return Calibration(math.nan, math.nan, math.nan)
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / dx.square().sum())
    residual = dy - slope * dx
    sem = float((residual.square().sum() / (len(x) - 2) / dx.square().sum()).sqrt())
    both = float(dx.square().sum() * dy.square().sum()) ** 0.5
    return Calibration(slope, sem, float((dx * dy).sum()) / both if both else math.nan)


@dataclass(frozen=True)
class Errors:
    """What true effects are expected to be: slope * score, with an error of scale * size.

    Args:
        slopes, deviations, scales, weight: ``[K]``, what is known of both: with probability ``weight`` a
            scale, and of the slope then a mean and a standard deviation. See :func:`errors`.
    """

    slopes: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    deviations: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    scales: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    weight: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))

    @property
    def slope(self) -> float:
        """Its mean."""
        return float((self.weight * self.slopes).sum())

    @property
    def scale(self) -> float:
        """As root mean square."""
        return float((self.weight * self.scales.square()).sum().sqrt())

    def draw(self, generator: torch.Generator) -> tuple[float, float]:
        """Return a slope and a scale as probable as what is known of them."""
        k = int(torch.multinomial(self.weight, 1, generator=generator))
        normal = float(torch.randn((), dtype=torch.float64, generator=generator))
        return float(self.slopes[k] + self.deviations[k] * normal), float(self.scales[k])


def sizes(spread: Tensor) -> Tensor:
    """Return sizes ``[..., N]`` that errors of scores are in proportion to.

    Scores of different seeds disagree more where leaving a row out is far from linear; half of the variance
    is taken as equal, since a spread over few seeds is uncertain itself.
    """
    return (spread.square() + spread.square().mean(-1, keepdim=True)).sqrt()


def errors(score: Tensor, size: Tensor, measured: Estimates) -> Errors:
    """Return what measured effects say about the errors of scores.

    measured ~ N(slope * score, scale^2 size^2 + sem^2), over all rows that were left out: those at the top
    were chosen by their scores, which does not bias a regression on scores. Beforehand, the slope is
    N(1, 1), since a score is the effect to first order, and all scales from half on are as probable (their
    logarithms), since sizes are the seeds' own noise: where measured effects are mostly noise, nothing is
    known of the errors rather than that they are small.

    Args:
        score, size: ``[V]``.
    """
    x, y, noise = score.double(), measured.mean.double(), measured.sem.double().square()
    known = x.isfinite() & y.isfinite() & noise.isfinite() & (size > 0)
    if int(known.sum()) < 4 or not x[known].any():
        return Errors()
    x, y, noise, size = x[known], y[known], noise[known], size.double()[known]
    scales = torch.logspace(math.log10(LEAST_SCALE), 3, 501, dtype=torch.float64)
    variance = scales[:, None].square() * size.square() + noise
    precision = (x.square() / variance).sum(1) + 1
    slopes = ((x * y / variance).sum(1) + 1) / precision
    missed = (y.square() / variance).sum(1) + 1 - slopes.square() * precision
    likelihood = -(variance.log().sum(1) + precision.log() + missed) / 2
    return Errors(slopes, precision.rsqrt(), scales, likelihood.softmax(0))


@dataclass(frozen=True)
class Recall:
    """The share of the k truly largest effects of each side that was verified.

    Args:
        k: on each side.
        estimate, lower, upper: mean, and a 90 % interval.
    """

    k: int
    estimate: float
    lower: float
    upper: float


def recall(
    score: Tensor,
    size: Tensor,
    found: Errors,
    rows: Tensor,
    measured: Estimates,
    k: int,
    generator: torch.Generator,
) -> Recall:
    """Estimate which share of the k most helpful and k most harmful rows is among those verified.

    True effects are drawn: around the scores, with errors as they may be, and a verified row's around what
    its score and its measured effect say together.

    Args:
        score: ``[N]``.
        size: ``[N]``, that the scores' errors are in proportion to.
        rows: ``[V]``, that were verified.
        measured: their effects.
    """
    score, size = score.double(), size.double()
    seen = 1 / measured.sem.square().clamp(min=1e-300)
    verified = torch.zeros(len(score), dtype=torch.bool)
    verified[rows] = True
    k = min(k, len(score) // 2)
    shares = torch.empty(DRAWS, dtype=torch.float64)
    for draw in range(DRAWS):
        slope, scale = found.draw(generator)
        centre, width = slope * score, scale * size
        prior = 1 / width[rows].square().clamp(min=1e-300)
        centre[rows] = (prior * centre[rows] + seen * measured.mean) / (prior + seen)
        width[rows] = (prior + seen).rsqrt()
        effect = centre + width * torch.randn(len(centre), dtype=torch.float64, generator=generator)
        ends = torch.cat([effect.topk(k).indices, effect.topk(k, largest=False).indices])
        shares[draw] = verified[ends].double().mean()
    low, high = torch.quantile(shares, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return Recall(k, float(shares.mean()), low, high)
