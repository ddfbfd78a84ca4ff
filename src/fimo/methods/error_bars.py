"""Standard errors of scores that are means over followed seeds: their noise, and what all of them miss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.linear_response.linearity import Discrepancy, heavier_tails

PRIOR_FREEDOM = 4.0
"""Degrees of freedom that the pooled variance over seeds counts for in each score's own."""

DOUBT = 0.6
"""Standard error of the variance of what all seeds miss, relative to a bar's, above which it is withheld."""


@dataclass(frozen=True)
class ErrorBars:
    """Standard errors of scores.

    Args:
        raw: ``[E, J, L]``, of the scores; None where withheld.
        adjusted: ``[E, J, L]``, of the scores minus their mean over left-out instances.
        withheld: why bars (or some of them, which are NaN) are withheld; empty where none is.
    """

    raw: Tensor | None = None
    adjusted: Tensor | None = None
    withheld: str = ""


NO_BARS = ErrorBars(withheld="this method measures no error")
"""Of methods that average over seeds without real runs."""


class SeedSpread:
    """Mean of seeds' scores, and the variance of that mean, as scores come one seed after another."""

    def __init__(self) -> None:
        self.count = 0
        self._means: list[Tensor] = []  # raw, adjusted
        self._squares: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """Take one seed's scores ``[E, J, L]``."""
        self.count += 1
        both = [scores, scores - scores.mean(-1, keepdim=True)]
        if not self._means:
            self._means = [torch.zeros_like(x) for x in both]
            self._squares = [torch.zeros_like(x) for x in both]
        for x, mean, squares in zip(both, self._means, self._squares, strict=True):
            delta = x - mean
            mean += delta / self.count
            squares += delta * (x - mean)

    @property
    def mean(self) -> Tensor:
        """``[E, J, L]``."""
        return self._means[0]

    def variances(self) -> tuple[Tensor, Tensor]:
        """Return the variances ``[E, J, L]`` of the mean of raw and of adjusted scores, from two seeds on.

        A variance over few seeds is itself uncertain: each is drawn towards what its row and column suggest
        (Smyth, 2004), and widened as Student's distribution is wider than the normal one.
        """
        own = self.count - 1
        pooled = [_rank_one(squares / own) for squares in self._squares]
        total = PRIOR_FREEDOM + own
        widened = heavier_tails(total) ** 2
        raw, adjusted = (
            widened * (PRIOR_FREEDOM * prior + squares) / total / self.count
            for prior, squares in zip(pooled, self._squares, strict=True)
        )
        return raw, adjusted


def _rank_one(variance: Tensor) -> Tensor:
    """Return the product ``[E, J, L]`` of a factor per test and one per left-out instance."""
    row = variance.mean(-1, keepdim=True)
    return row * (variance / row.clamp(min=1e-300)).mean(-2, keepdim=True)


def error_bars(
    spread: tuple[Tensor, Tensor] | None, missed: Discrepancy, instances: int, dtype: torch.dtype
) -> ErrorBars:
    """Return the bars of both parts of the error, taken as independent.

    Args:
        spread: variances of raw and adjusted scores over seeds; None where scores don't depend on seeds.
        missed: for every seed.
        instances: with real runs, from which the latter was estimated.
    """
    widened = heavier_tails(max(instances, 4)) ** 2
    variances = [widened * missed.raw(), widened * missed.adjusted()]
    if spread is not None:
        variances = [seeds.cpu() + rest for seeds, rest in zip(spread, variances, strict=True)]
    unknown = float(variances[0].isnan().double().mean())
    reasons = [(unknown, "real runs or scores there are not finite")]
    if missed.doubt is not None and missed.common_doubt is not None:
        doubts = (missed.doubt + missed.common_doubt, missed.doubt)
        # what is rounding for other instances of a test instance is no reason
        least = [variance.maximum(1e-6 * variance.mean(-1, keepdim=True)) for variance in variances]
        withheld = [widened * x > DOUBT * variance for x, variance in zip(doubts, least, strict=True)]
        variances = [x.masked_fill(w, torch.nan) for x, w in zip(variances, withheld, strict=True)]
        share = float(torch.stack(withheld).double().mean())
        reasons.append((share, "what all seeds miss there can't be told from the noise of single ones"))
    raw, adjusted = (x.sqrt().to(dtype) for x in variances)
    reason = "; ".join(f"{_per_cent(share)} of them: {why}" for share, why in reasons if share)
    return ErrorBars(raw, adjusted, reason)


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "less than 1 %"
