"""How many of a list of suspects are wrong: a two-group model whose alternative is known by construction.

A row that was held out would have another suspicion with another label, at no cost: the predictor has not
seen the one nor the other. So the distribution F1 of wrong rows' suspicions is known without a single known
error. Of the rows as they are, a share pi is wrong and the rest is right:

    f(s) = pi f1(s) + (1 - pi) f0(s),        P(wrong | s) = pi f1(s) / f(s)

(Efron, 2008, "Microarrays, empirical Bayes and the two-groups model", with the roles of the known and the
unknown group exchanged).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

LEAST = 10
"""Fewest rows of a tail that the share of errors is read from."""

SHARPNESS = 2.0
"""How sharply the ratio f / f1 turns from a logistic curve to its floor; see :func:`error_probability`."""

ALLOWANCE = 0.5
"""Right rows that every list is taken to hold besides: the estimate alone is too hopeful of a short one."""


def error_share(observed: np.ndarray, planted: np.ndarray, least: int = LEAST) -> float:
    """Return an estimate of the share pi of wrong rows, from the most suspicious ones.

    Since f >= pi f1 everywhere, every tail bounds pi by (share of rows in it) / (share of planted errors in
    it), and the bound is an equality where only errors are as suspicious: the smallest is taken. Where no
    class is certain anywhere, right rows stay among the most suspicious, and the estimate is too large.

    Args:
        observed: ``[N]`` suspicions of the rows as they are.
        planted: ``[M]`` suspicions of errors by construction.
        least: rows of the smallest tail.
    """
    n, ordered = len(observed), np.sort(observed)[::-1]
    beyond = 1 - np.searchsorted(np.sort(planted), ordered, side="left") / len(planted)
    share = np.arange(1, n + 1) / n
    bounds = share[min(least, n) - 1 :] / np.maximum(beyond[min(least, n) - 1 :], 1 / len(planted))
    return float(min(1.0, bounds.min()))


def error_probability(observed: np.ndarray, planted: np.ndarray, share: float) -> np.ndarray:
    """Return the probability ``[N]`` that each row is wrong: 1 - the local false discovery rate.

    The ratio f / f1 falls with suspicion to its floor pi. Its shape is a smooth maximum of the floor and of a
    logistic curve, (pi^k + exp(-k (a + b s)))^(1/k), whose a and b are fitted by telling rows as they are
    from planted errors. With a predictor of right labels k = 1 would be exact, as suspicions are log-odds;
    with one whose probabilities have the errors in them already, k = infinity. On planted errors 2 holds
    what it promises (``benchmarks/label_errors.py``), 3 on some data sets no longer.
    """
    n, weight = len(observed), len(observed) / len(planted)
    centre, scale = np.median(observed), max(float(np.std(observed)), 1e-12)
    ours, theirs = (observed - centre) / scale, (planted - centre) / scale
    floor = np.log(max(share, 1e-12))

    def log_ratio(a: float, log_b: float, s: np.ndarray) -> np.ndarray:
        curve = np.logaddexp(SHARPNESS * floor, -SHARPNESS * (a + np.exp(log_b) * s)) / SHARPNESS
        return np.asarray(curve)

    def loss(t: np.ndarray) -> float:
        mine = np.logaddexp(0, -log_ratio(t[0], t[1], ours)).sum()
        others = np.logaddexp(0, log_ratio(t[0], t[1], theirs)).sum()
        return float((mine + weight * others) / n + 1e-6 * (t**2).sum())

    found = minimize(loss, np.zeros(2), method="BFGS").x
    return np.asarray(np.exp(np.minimum(0.0, floor - log_ratio(found[0], found[1], ours))))


def list_rates(probability: np.ndarray, suspicion: np.ndarray) -> np.ndarray:
    """Return for each row the false discovery rate ``[N]`` of the shortest list from the top that has it.

    The expected number of right rows in the list, and :data:`ALLOWANCE` besides, as a share of the list.
    """
    order = np.argsort(-suspicion, kind="stable")
    right = np.cumsum(1 - probability[order]) + ALLOWANCE
    shares = np.minimum(1.0, right / np.arange(1, len(order) + 1))
    rates = np.empty(len(order))
    rates[order] = np.minimum.accumulate(shares[::-1])[::-1]
    return rates
