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
        rest: by how many of their own standard errors true effects miss the line.
    """

    slope: float
    slope_sem: float
    correlation: float
    rest: float


def calibrated(score: Tensor, spread: Tensor, measured: Estimates) -> Calibration:
    """Return the calibration of scores by measured effects of the same random rows.

    Args:
        score, spread: ``[C]``, with the standard error over the screen's seeds.
    """
    x, y = score.double(), measured.mean.double()
    known = x.isfinite() & y.isfinite() & measured.sem.isfinite()
    x, y, noise, spread = x[known], y[known], measured.sem[known].square(), spread.double()[known]
    if len(x) < 4 or float(x.std()) == 0:
        return Calibration(math.nan, math.nan, math.nan, math.nan)
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / dx.square().sum())
    residual = dy - slope * dx
    sem = float((residual.square().sum() / (len(x) - 2) / dx.square().sum()).sqrt())
    both = float(dx.square().sum() * dy.square().sum()) ** 0.5
    correlation = float((dx * dy).sum()) / both if both else math.nan
    size = spread.square().clamp(min=1e-300)
    rest = float(((residual.square() - noise) / size).mean().clamp(min=0).sqrt())
    return Calibration(slope, sem, correlation, rest)


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
        score: ``[N]``, calibrated.
        error: ``[N]``, standard error of scores, calibrated.
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
