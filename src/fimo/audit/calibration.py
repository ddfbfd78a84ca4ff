"""How good the screen is, from random rows that were left out: its calibration, and what it missed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.audit.verdicts import Estimates

DRAWS = 400
"""Of true effects, for the estimate of recall."""


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
        slope, scale: fitted to rows that were left out; see :func:`sizes`.
    """

    slope: float = 1.0
    scale: float = 1.0


def sizes(spread: Tensor) -> Tensor:
    """Return sizes ``[..., N]`` that errors of scores are in proportion to.

    Scores of different seeds disagree more where leaving a row out is far from linear; half of the variance
    is taken as equal, since a spread over few seeds is uncertain itself.
    """
    return (spread.square() + spread.square().mean(-1, keepdim=True)).sqrt()


def errors(score: Tensor, size: Tensor, measured: Estimates) -> Errors:
    """Fit the errors of scores to measured effects by maximum likelihood.

    measured ~ N(slope * score, scale^2 size^2 + sem^2), over all rows that were left out: those at the top
    were chosen by their scores, which does not bias a regression on scores.

    Args:
        score, size: ``[V]``.
    """
    x, y, noise = score.double(), measured.mean.double(), measured.sem.double().square()
    known = x.isfinite() & y.isfinite() & noise.isfinite() & (size > 0)
    if int(known.sum()) < 4 or not x[known].any():
        return Errors()
    x, y, noise, size = x[known], y[known], noise[known], size.double()[known]
    scale = torch.logspace(-2, 3, 501, dtype=torch.float64)[:, None]
    variance = scale.square() * size.square() + noise
    slope = (x * y / variance).sum(1) / (x.square() / variance).sum(1)
    likelihood = -(variance.log() + (y - slope[:, None] * x).square() / variance).sum(1)
    best = int(likelihood.argmax())
    return Errors(float(slope[best]), float(scale[best]))


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
    score: Tensor, error: Tensor, rows: Tensor, measured: Estimates, k: int, generator: torch.Generator
) -> Recall:
    """Estimate which share of the k most helpful and k most harmful rows is among those verified.

    True effects are drawn: around the scores, and a verified row's around what its score and its measured
    effect say together.

    Args:
        score: ``[N]``, times the slope of measured effects on scores.
        error: ``[N]``, standard error of scores.
        rows: ``[V]``, that were verified.
        measured: their effects.
    """
    centre, width = score.double().clone(), error.double().clone()
    prior, seen = 1 / width[rows].square().clamp(min=1e-300), 1 / measured.sem.square().clamp(min=1e-300)
    centre[rows] = (prior * centre[rows] + seen * measured.mean) / (prior + seen)
    width[rows] = (prior + seen).rsqrt()
    verified = torch.zeros(len(score), dtype=torch.bool)
    verified[rows] = True
    k = min(k, len(score) // 2)
    found = []
    for _ in range(DRAWS):
        draw = centre + width * torch.randn(len(centre), dtype=torch.float64, generator=generator)
        ends = torch.cat([draw.topk(k).indices, draw.topk(k, largest=False).indices])
        found.append(verified[ends].double().mean())
    shares = torch.stack(found)
    low, high = torch.quantile(shares, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return Recall(k, float(shares.mean()), low, high)
