"""What methods share that predict further training along its full runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimo.linear_response.linearity import FEWEST, Checked, dealt, discrepancy
from fimo.linear_response.real_runs import run_without
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.error_bars import ErrorBars, SeedSpread, error_bars
from fimo.scores import Scores

log = logging.getLogger(__name__)

CHECKED_SEEDS = 2
"""Seeds with which each checked instance is left out."""


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
        self, problem: AttributionProblem, seeds: Iterator[Tensor], tally: Tally, count: int | None = None
    ) -> tuple[Tensor, ErrorBars]:
        """Return the mean of each seed's scores ``[E, J, L]``, and its error bars.

        Args:
            count: how many seeds are followed; all when None.
        """
        spread = SeedSpread()
        first: list[Tensor] = []
        checked: Checked | None = None
        predicted: list[Tensor] = []
        for scores in seeds:
            spread.add(scores)
            if checked is None:
                first.append(scores)
                if len(first) == CHECKED_SEEDS:
                    checked = self.to_check(spread.mean, count or len(problem.followed.seeds))
                    predicted, first = [x[..., checked.instances.to(x.device)].cpu() for x in first], []
            else:
                predicted.append(scores[..., checked.instances.to(scores.device)].cpu())
        return spread.mean, self.measured_bars(problem, spread.mean, checked, predicted, spread, tally)

    def to_check(self, scores: Tensor, seeds: int) -> Checked:
        """Return the instances to be checked by real runs, by the size of scores ``[E, J, L]``."""
        return dealt(relative_size(scores), self.checks // CHECKED_SEEDS, seeds)

    def measured_bars(
        self,
        problem: AttributionProblem,
        scores: Tensor,
        checked: Checked | None,
        predicted: Sequence[Tensor],
        spread: SeedSpread | None,
        tally: Tally,
    ) -> ErrorBars:
        """Return the error bars of scores ``[E, J, L]``, measured by real runs.

        Args:
            checked: None where too few seeds are followed.
            predicted: S of ``[E, J, M]``, each seed's scores of the checked instances.
            spread: of seeds' scores; None where scores don't depend on seeds.
        """
        reason = self._unmeasured(checked)
        if checked is None or reason:
            log.info("%s: no error bars, since %s", type(self).__name__, reason)
            return ErrorBars(withheld=reason)
        count = len(checked.instances)
        expected = torch.stack([predicted[s][..., k % count] for k, (_, s) in enumerate(checked.runs)])
        residual = checked.by_instance(real_changes(problem, checked, tally) - expected.double())
        missed = discrepancy(problem.followed.steps, residual, scores, checked)
        variances = None if spread is None else spread.variances()
        bars = error_bars(variances, missed, count, problem.dtype)
        if bars.withheld:
            log.info("%s: no error bars for %s", type(self).__name__, bars.withheld)
        return bars

    def _unmeasured(self, checked: Checked | None) -> str:
        """Return why bars must be withheld, or nothing."""
        if not self.checks // CHECKED_SEEDS:
            return "the error of linearity is not measured (checks: 0)"
        if checked is None:
            return "a single followed seed doesn't show the noise of seeds"
        if len(checked.instances) < FEWEST:
            return f"fewer than {FEWEST} instances don't show the error of linearity"
        return ""


def real_changes(problem: AttributionProblem, checked: Checked, tally: Tally) -> Tensor:
    """Return real changes of test losses ``[2 * M, E, J]`` in the runs without checked instances."""
    seeds, runs = checked.seeds, checked.runs
    full = [(None, problem.followed.seeds[s]) for s in seeds]
    losses = real_losses(problem, [*full, *named(problem, runs)], tally)
    of_seed = dict(zip(seeds, losses, strict=False))
    return losses[len(seeds) :] - torch.stack([of_seed[s] for _, s in runs])


def named(problem: AttributionProblem, runs: Sequence[tuple[int, int]]) -> list[tuple[int | None, int]]:
    """Return runs, as positions of instances and seeds, as training instances and seeds."""
    return [(int(problem.index[i]), problem.followed.seeds[s]) for i, s in runs]


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
