"""What methods share that predict further training along its full runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.linearity import discrepancy, stratified
from fimo.linear_response.real_runs import run_without
from fimo.methods.base import AttributionMethod
from fimo.methods.error_bars import ErrorBars, SeedSpread, error_bars
from fimo.models.final_model import FinalModel

log = logging.getLogger(__name__)

CHECKED_SEEDS = 2
"""Seeds with which each checked instance is left out."""

FEWEST_CHECKED = 4
"""Instances with fewer of which the error of linearity can't be told from noise."""


class FollowingMethod(AttributionMethod):
    """A method whose scores are predictions for the given further training, averaged over its seeds.

    Attributes:
        bars: standard errors of the scores after :meth:`attribute`, or why they are withheld. They contain
            the noise of finitely many seeds, and the error that all seeds share, measured by ``checks`` real
            leave-one-out runs (:mod:`fimo.linear_response.linearity`).
        score_sem: ``[E, J, L]``, those of the scores as they are; None where withheld.
        score_sem_adjusted: ``[E, J, L]``, those of scores minus their mean over left-out instances.
    """

    estimates_loss_change: ClassVar[bool] = True
    follows_further_training = True
    checks: int = 0
    """Real runs that measure the error of linearity."""

    bars: ErrorBars = ErrorBars(withheld="this method measures no error")

    @property
    def score_sem(self) -> Tensor | None:
        return self.bars.raw

    @property
    def score_sem_adjusted(self) -> Tensor | None:
        return self.bars.adjusted

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self.bars = type(self).bars

    @property
    def ft(self) -> FurtherTraining:
        if self.further_training is None:
            raise InputError("further_training", f"{type(self).__name__} follows it, but none was given")
        return self.further_training

    @property
    def run_gradients(self) -> int:
        """Instance gradients of one run of further training."""
        return self.ft.protocol.run_gradients(len(self.train))

    @property
    def dtype(self) -> torch.dtype:
        """Of scores: the final model's."""
        return next(iter(self.final_model.parameters().values())).dtype

    def average(self, seeds: Iterator[Tensor], test: Instances) -> Tensor:
        """Return the mean of each seed's scores ``[E, J, L]``, and keep its error bars."""
        spread = SeedSpread()
        first: list[Tensor] = []
        for scores in seeds:
            if len(first) < CHECKED_SEEDS:
                first.append(scores)
            spread.add(scores)
        self.keep_bars(test, spread.mean, first, spread)
        return spread.mean.to(self.dtype)

    def keep_bars(
        self, test: Instances, scores: Tensor, first: Sequence[Tensor], spread: SeedSpread | None
    ) -> None:
        """Measure the error of scores ``[E, J, L]`` by real runs.

        Args:
            first: of the first followed seeds.
            spread: of all; None where scores don't depend on seeds.
        """
        count = self.checks // CHECKED_SEEDS
        if reason := self._unmeasured(count, len(first)):
            self.bars = ErrorBars(withheld=reason)
            log.info("%s: no error bars, since %s", type(self).__name__, reason)
            return
        checked, weight = stratified(relative_size(scores), count)
        real = self.real_changes(test, checked.tolist(), self.ft.seeds[:CHECKED_SEEDS])
        predicted = torch.stack([x[..., checked.to(x.device)].double().cpu() for x in first])
        missed = discrepancy(self.ft.steps, real - predicted, scores, checked, weight)
        variances = None if spread is None else spread.variances()
        self.bars = error_bars(variances, missed, len(checked), self.dtype)
        if self.bars.withheld:
            log.info("%s: no error bars for %s", type(self).__name__, self.bars.withheld)

    def _unmeasured(self, count: int, seeds: int) -> str:
        """Return why bars must be withheld, or nothing."""
        if not count:
            return "the error of linearity is not measured (checks: 0)"
        if seeds < CHECKED_SEEDS:
            return "a single followed seed doesn't show the noise of seeds"
        if min(count, len(self.left_out)) < FEWEST_CHECKED:
            return f"fewer than {FEWEST_CHECKED} instances don't show the error of linearity"
        return ""

    def real_changes(self, test: Instances, positions: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Return real changes of test losses ``[S, E, J, M]`` without each of some left-out instances."""
        named = [(i, s) for s in seeds for i in (None, *(int(self.left_out[p]) for p in positions))]
        losses = self.real_losses(test, named).unflatten(0, (len(seeds), -1))
        changes: Tensor = losses[:, 1:] - losses[:, :1]
        return changes.permute(0, 2, 3, 1)

    def real_losses(self, test: Instances, runs: Sequence[tuple[int | None, int]]) -> Tensor:
        """Return the test losses ``[K, E, J]`` of real runs, and count them."""
        self.gradient_evaluations += len(runs) * self.run_gradients
        return run_without(self.final_model, self.train, test, self.ft.protocol, runs)


def relative_size(scores: Tensor) -> Tensor:
    """Return the mean squared effect ``[L]``, relative to each test instance's and evaluation point's."""
    effect = scores.double() - scores.double().mean(2, keepdim=True)
    share: Tensor = effect.square() / effect.square().sum(2, keepdim=True).clamp(min=1e-300)
    size: Tensor = share.mean((0, 1)).cpu()
    return size
