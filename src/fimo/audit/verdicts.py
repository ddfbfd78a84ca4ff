"""Verdicts: from changes by real runs over a few seeds to decisions at a false discovery rate.

All are functions of tensors. A row's effect is the mean of its changes over seeds; that it is nothing is
tested by a t-test whose variance borrows strength from the other rows (Smyth, 2004). Looks after several
rounds of seeds share the level (Bonferroni over looks), so that stopping when a row is decided is allowed
for; then Benjamini and Hochberg (1995), with weights (Genovese, Roeder and Wasserman, 2006). As the
decision is about the sign of the estimate, the rate counts wrong signs too (Benjamini and Yekutieli, 2005).

A t-test over few seeds supposes noise that is not skewed where there is no effect. Real changes are skewed,
as a row counts more where it is in a run's last batch; but then in the direction of its effect, and the
signs of real effects come out right (``benchmarks/audit.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

HOPELESS = 0.05
"""Chance of a decision with all seeds, below which a row gets no more."""


@dataclass(frozen=True)
class Estimates:
    """Means over seeds of V rows, with standard errors.

    Args:
        mean, sem: ``[V]`` float64; NaN where a row has no seed (two, for ``sem``).
        seeds: ``[V]``, how many each row has.
        freedom: degrees of freedom of ``sem``, infinite where all rows are equally noisy.
    """

    mean: Tensor
    sem: Tensor
    seeds: Tensor
    freedom: Tensor

    def of(self, which: Tensor) -> Estimates:
        """Return those of some rows."""
        return Estimates(self.mean[which], self.sem[which], self.seeds[which], self.freedom[which])

    @property
    def p(self) -> Tensor:
        """Two-sided p-values ``[V]`` of no effect; 1 where a mean is exactly zero, or not known."""
        t = torch.where(self.mean == 0, 0.0, self.mean.abs() / self.sem)
        return torch.from_numpy(2 * stats.t.sf(t.numpy(), self.freedom.numpy())).nan_to_num(1.0)


def estimated(changes: Tensor, shared: float = 0.0) -> Estimates:
    """Return estimates from changes by seed.

    A row's variance s^2 with d degrees of freedom is taken as scaled chi-square around one that varies
    between rows as s0^2 d0 / chi-square(d0), both fitted by the moments of log s^2 (Smyth, 2004, section
    6.2); then (d0 s0^2 + d s^2) / (d0 + d) has d0 + d degrees of freedom.

    Args:
        changes: ``[S, V]``, NaN where a row was not left out with a seed.
        shared: variance of an error that all seeds have in common, added to each mean's.
    """
    changes = changes.double()
    there = ~changes.isnan()
    count = there.sum(0)
    mean = changes.nanmean(0)
    squares = torch.where(there, (changes - mean).square(), 0.0).sum(0)
    own = (count - 1).clamp(min=0).double()
    prior, prior_freedom = prior_variance(squares, own)
    if math.isinf(prior_freedom):
        variance, freedom = torch.full_like(own, prior), torch.full_like(own, math.inf)
    else:
        freedom = prior_freedom + own
        variance = (prior_freedom * prior + squares) / freedom
    sem = (variance / count + shared).sqrt()
    return Estimates(mean, torch.where(own > 0, sem, torch.nan), count, freedom)


def prior_variance(squares: Tensor, freedom: Tensor) -> tuple[float, float]:
    """Return s0^2 and d0 of Smyth's prior for variances; d0 is 0 where too few rows tell.

    Args:
        squares: ``[V]``, sums of squared deviations.
        freedom: ``[V]``, their degrees of freedom.
    """
    known = (freedom > 0) & (squares > 0)
    if int(known.sum()) < 3:
        return 0.0, 0.0
    d = freedom[known].numpy()
    # what is far below the others is rounding
    variance = (squares[known] / freedom[known]).numpy()
    e = np.log(np.maximum(variance, 1e-5 * np.median(variance))) - special.digamma(d / 2) + np.log(d / 2)
    n = len(e)
    spread = float(((e - e.mean()) ** 2).sum() / (n - 1) - special.polygamma(1, d / 2).mean())
    if spread <= 0:
        return float(np.exp(e.mean())), math.inf
    d0 = 2 * inverse_trigamma(spread)
    return float(np.exp(e.mean() + special.digamma(d0 / 2) - np.log(d0 / 2))), d0


def inverse_trigamma(value: float) -> float:
    """Return x > 0 with trigamma(x) = value, by Newton's method on its reciprocal (Smyth, 2004, appendix)."""
    if value > 1e7:
        return float(value**-0.5)
    if value < 1e-6:
        return 1 / value
    x = 0.5 + 1 / value
    for _ in range(50):
        now = float(special.polygamma(1, x))
        step = now * (1 - now / value) / float(special.polygamma(2, x))
        x += step
        if abs(step) < 1e-10 * x:
            break
    return x


def false_discovery_rates(p: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the smallest rate at which each is among the discoveries (Benjamini and Hochberg).

    Args:
        p: ``[V]``, p-values.
        weight: ``[V]``, prior weights, fixed before the p-values; only their proportions matter.
    """
    if not len(p):
        return p.clone()
    if weight is not None:
        p = p * weight.mean() / weight
    order = p.argsort(stable=True)
    rate = p[order] * len(p) / torch.arange(1, len(p) + 1, dtype=p.dtype)
    found = torch.empty_like(rate)
    found[order] = rate.flip(0).cummin(0).values.flip(0).clamp(max=1.0)
    return found


def chance_of_decision(estimates: Estimates, most: int, level: Tensor) -> Tensor:
    """Return the probability ``[V]`` that a row's p-value falls below a level once it has ``most`` seeds.

    Of the final statistic z given the present one, from a flat prior of the effect,
    z ~ N(z_n sqrt(m / n), (m - n) / n).

    Args:
        level: ``[V]``.
    """
    n = estimates.seeds.clamp(min=1).double()
    now = (estimates.mean / estimates.sem).nan_to_num(0.0)
    centre, scale = now * (most / n).sqrt(), ((most - n).clamp(min=1e-12) / n).sqrt()
    bound = torch.from_numpy(stats.norm.isf(level.clamp(1e-300, 1.0).numpy() / 2))
    normal = torch.distributions.Normal(0.0, 1.0)
    found: Tensor = normal.cdf((centre - bound) / scale) + normal.cdf((-centre - bound) / scale)
    return found


def verdicts(effect: Tensor, q: Tensor, rate: float, better: int = 1) -> list[str]:
    """Return ``helpful``, ``harmful`` or ``unclear`` for each of V effects, by its sign.

    Args:
        effect, q: ``[V]``.
        better: see :class:`~fimo.models.measured.Measured`.
    """
    signs = torch.where(q <= rate, better * effect.sign(), 0.0).tolist()
    return [{1.0: "helpful", -1.0: "harmful"}.get(sign, "unclear") for sign in signs]


def looks(most: int) -> list[int]:
    """Return the numbers of seeds after which rows are judged: halves of the most, down to three.

    Example:
        >>> looks(10), looks(40), looks(4)
        ([3, 5, 10], [3, 5, 10, 20, 40], [4])
    """
    found = [most]
    while found[0] >= 5:
        found.insert(0, -(-found[0] // 2))
    return found
