"""Whether a method that estimates a loss change has its size right, not only its order."""

from __future__ import annotations

from torch import Tensor


def fitted_slope(scores: Tensor, sensitivity: Tensor) -> Tensor:
    r"""Least-squares slope of the sensitivity on the scores, one line per test instance's own intercept.

    .. math::
        b_e = \frac{\sum_{ji} (s_{eji} - \bar s_{ej}) (x_{eji} - \bar x_{ej})}
                   {\sum_{ji} (x_{eji} - \bar x_{ej})^2}

    1: the scores are the loss change; 10: they are ten times too small; 0: they say nothing about it.

    Args:
        scores: ``[J, L]`` or ``[E, J, L]``, in units of test loss per removed instance.
        sensitivity: ``[E, J, L]``.

    Returns:
        ``[E]`` float64; NaN where the scores are constant.
    """
    x = scores.double() - scores.double().mean(-1, keepdim=True)
    s = sensitivity.double() - sensitivity.double().mean(-1, keepdim=True)
    largest = x.abs().max().clamp(min=1e-300)  # scores' squares may underflow even float64
    x = x / largest
    return (x * s).sum((-2, -1)) / (x * x).sum((-2, -1)).expand(len(s)) / largest
