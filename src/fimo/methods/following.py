"""What methods share that predict further training along its full runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimo.linear_response.linearity import discrepancy, stratified
from fimo.linear_response.real_runs import run_without
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.error_bars import ErrorBars, SeedSpread, error_bars
from fimo.scores import Scores

log = logging.getLogger(__name__)

CHECKED_SEEDS = 2
"""Seeds with which each checked instance is left out."""

FEWEST_CHECKED = 4
"""Instances with fewer of which the error of linearity can't be told from noise."""


class Tally:
    """Instance gradients of one computation, counted as they are made."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, evaluations: int) -> None:
        """Count some more."""
        self.total += evaluations


class FollowingMethod(AttributionMethod):
    """A method whose scores are predictions for the given further training, averaged over its seeds.

    Their standard errors contain the noise of finitely many seeds, and the error that all seeds share,
    measured by ``checks`` real leave-one-out runs (:mod:`fimo.linear_response.linearity`).
    """

    checks: int = 0
    """Real runs that measure the error of linearity."""

    @property
    def predicts_loss_change(self) -> bool:
        return True

    @property
    def follows_further_training(self) -> bool:
        return True

    def with_bars(
        self, problem: AttributionProblem, values: Tensor, bars: ErrorBars, tally: Tally, *notes: str
    ) -> Scores:
        """Return scores ``[E, J, L]`` with their error bars and cost."""
        return self.result(
            problem,
            values.to(problem.dtype),
            sem=bars.raw,
            sem_adjusted=bars.adjusted,
            withheld=bars.withheld,
            gradient_evaluations=tally.total,
            notes=notes,
        )

    def average(
        self, problem: AttributionProblem, seeds: Iterator[Tensor], tally: Tally
    ) -> tuple[Tensor, ErrorBars]:
        """Return the mean of each seed's scores ``[E, J, L]``, and its error bars."""
        spread = SeedSpread()
        first: list[Tensor] = []
        for scores in seeds:
            if len(first) < CHECKED_SEEDS:
                first.append(scores)
            spread.add(scores)
        return spread.mean, self.measured_bars(problem, spread.mean, first, spread, tally)

    def measured_bars(
        self,
        problem: AttributionProblem,
        scores: Tensor,
        first: Sequence[Tensor],
        spread: SeedSpread | None,
        tally: Tally,
    ) -> ErrorBars:
        """Return the error bars of scores ``[E, J, L]``, measured by real runs.

        Args:
            first: of the first followed seeds.
            spread: of all; None where scores don't depend on seeds.
        """
        count, further_training = self.checks // CHECKED_SEEDS, problem.followed
        if reason := self._unmeasured(count, len(first), len(problem.index)):
            log.info("%s: no error bars, since %s", type(self).__name__, reason)
            return ErrorBars(withheld=reason)
        checked, weight = stratified(relative_size(scores), count)
        real = real_changes(problem, checked.tolist(), further_training.seeds[:CHECKED_SEEDS], tally)
        predicted = torch.stack([x[..., checked.to(x.device)].double().cpu() for x in first])
        missed = discrepancy(further_training.steps, real - predicted, scores, checked, weight)
        variances = None if spread is None else spread.variances()
        bars = error_bars(variances, missed, len(checked), problem.dtype)
        if bars.withheld:
            log.info("%s: no error bars for %s", type(self).__name__, bars.withheld)
        return bars

    def _unmeasured(self, count: int, seeds: int, left_out: int) -> str:
        """Return why bars must be withheld, or nothing."""
        if not count:
            return "the error of linearity is not measured (checks: 0)"
        if seeds < CHECKED_SEEDS:
            return "a single followed seed doesn't show the noise of seeds"
        if min(count, left_out) < FEWEST_CHECKED:
            return f"fewer than {FEWEST_CHECKED} instances don't show the error of linearity"
        return ""


def real_changes(
    problem: AttributionProblem, positions: Sequence[int], seeds: Sequence[int], tally: Tally
) -> Tensor:
    """Return real changes of test losses ``[S, E, J, M]`` without each of some left-out instances."""
    named = [(i, s) for s in seeds for i in (None, *(int(problem.index[p]) for p in positions))]
    losses = real_losses(problem, named, tally).unflatten(0, (len(seeds), -1))
    changes: Tensor = losses[:, 1:] - losses[:, :1]
    return changes.permute(0, 2, 3, 1)


def real_losses(problem: AttributionProblem, runs: Sequence[tuple[int | None, int]], tally: Tally) -> Tensor:
    """Return the test losses ``[K, E, J]`` of real runs, and count them."""
    tally.add(len(runs) * problem.run_gradients)
    protocol = problem.followed.protocol
    return run_without(problem.final_model, problem.train, problem.test, protocol, runs)


def relative_size(scores: Tensor) -> Tensor:
    """Return the mean squared effect ``[L]``, relative to each test instance's and evaluation point's."""
    effect = scores.double() - scores.double().mean(2, keepdim=True)
    share: Tensor = effect.square() / effect.square().sum(2, keepdim=True).clamp(min=1e-300)
    size: Tensor = share.mean((0, 1)).cpu()
    return size
