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

SHARPNESS = {False: 2.0, True: 4.0}
"""How sharply the ratio f / f1 turns from a logistic curve to its floor, by whether classes are certain given
the row; see :func:`error_probability`."""

ALLOWANCE = 0.5
"""Right rows that every list is taken to hold besides: the estimate alone is too hopeful of a short one."""

START = 0.05
"""The share of wrong rows that its estimation begins with."""


def error_probability(
    observed: np.ndarray, planted: np.ndarray, certain: bool = False
) -> tuple[np.ndarray, float]:
    """Return the probability ``[N]`` that each row is wrong (1 - the local false discovery rate), and pi.

    The ratio f / f1 falls with suspicion to its floor pi. Its shape is a smooth maximum of the floor and of a
    logistic curve, (pi^k + exp(-k (a + b s)))^(1/k), whose pi, a and b are fitted by telling rows as they are
    from planted errors. With a predictor of right labels k = 1 would be exact, as suspicions are log-odds.
    One that learnt from wrong labels, too, is never surer than they let it be, and with it k = infinity,
    where no row's right class is in doubt. Where some rows are ambiguous, the most ambiguous right ones
    are as suspicious as errors, and nothing in rows and labels tells which of the two it is: 2 then holds
    what it promises, and larger k does not (``benchmarks/label_errors.py``).

    Args:
        observed: ``[N]`` suspicions of the rows as they are.
        planted: ``[M]`` suspicions of errors by construction.
        certain: whoever knows the row knows its class.
    """
    n, weight, k = len(observed), len(observed) / len(planted), SHARPNESS[certain]
    centre, scale = np.median(observed), max(float(np.std(observed)), 1e-12)
    ours, theirs = (observed - centre) / scale, (planted - centre) / scale

    def log_ratio(t: np.ndarray, s: np.ndarray) -> np.ndarray:
        log_share, a, log_b = t
        return np.asarray(np.logaddexp(k * log_share, -k * (a + np.exp(log_b) * s)) / k)

    def loss(t: np.ndarray) -> float:
        mine = np.logaddexp(0, -log_ratio(t, ours)).sum()
        others = np.logaddexp(0, log_ratio(t, theirs)).sum()
        return float((mine + weight * others) / n + 1e-6 * (t[1:] ** 2).sum())

    found = minimize(loss, np.array([np.log(START), 0.0, 0.0]), method="BFGS").x
    chance = np.exp(np.minimum(0.0, found[0] - log_ratio(found, ours)))
    return np.asarray(chance), min(1.0, float(np.exp(found[0])))


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
