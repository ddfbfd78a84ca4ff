"""The cheapest method that is expected to reach the ceiling."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

from fimo.errors import InputError
from fimo.linear_response.linearity import GROUPS
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.following import CHECKED_SEEDS, FollowingMethod
from fimo.methods.response import Response
from fimo.methods.sketched import Sketched
from fimo.models.linear_layers import layers_on
from fimo.scores import Scores

log = logging.getLogger(__name__)

SEEDS = CHECKED_SEEDS * GROUPS
"""Most seeds that are followed where one is much like another: more would cost what they gain nothing by."""


class Best(FollowingMethod):
    """Chooses a method by network, optimizer and amount of further training, and says which and why.

    - ``response`` for SGD up to ``short`` epochs: leaving an instance out is still a small change of the run,
      and the response, which knows the seeds' batches, agrees with the gold standard as well as a
      repetition of the gold standard does; of at most eight seeds, where it takes instances evenly from all
      batches and one seed is much like another;
    - ``calibrated`` for more, and for Adam, whose second moment the response holds fixed: a few real runs
      correct it; and wherever the budget buys a real run of each left-out instance besides, as with many
      seeds;
    - real runs of few seeds, by ``calibrated``, where following one costs more than they do (linear heads);
    - for networks of other layers than linear ones, where the response is expected to cost more than
      ``limit`` of the gold standard, ``calibrated``, which follows few seeds, if that costs less; else, and
      where outputs are too many for the response's kernel, ``sketched``.

    The rules are measurements: ``benchmarks/response.py``, ``benchmarks/deep.py``.

    Args:
        short: epochs of SGD up to which few real runs would correct nothing.
        budget: see :class:`~fimo.methods.calibrated.CalibratedResponse`.
        limit: share of the gold standard's cost that scores of deep networks may take, and the budget of
            ``sketched``.
        memory_mb: of Jacobians held at once.
        checks: real runs for error bars, where ``response`` is taken; see
            :class:`~fimo.methods.response.Response`.
        removal: see :class:`~fimo.methods.response.Response`.
    """

    needs = "the protocol of further training"
    cost = "as `response`, `calibrated` or `sketched`, between which it chooses"
    use = "when in doubt and a protocol is known: nearest to the ceiling at every amount"

    def __init__(
        self,
        short: float = 5,
        budget: float = 0.1,
        memory_mb: float = 1024,
        checks: int = 32,
        limit: float = 0.2,
        removal: Literal["even", "own"] = "even",
    ) -> None:
        if short < 0:
            raise InputError("short", f"expected at least 0 but got {short}")
        if not 0 < limit <= 1:
            raise InputError("limit", f"expected a share of 0 to 1 but got {limit}")
        self.short, self.memory_mb, self.checks, self.limit = short, memory_mb, checks, limit
        self.corrected = CalibratedResponse(
            budget=budget, memory_mb=memory_mb, checks=checks, removal=removal
        )

    def scores(self, problem: AttributionProblem) -> Scores:
        chosen, reason = self.choose(problem)
        note = f"{type(chosen).__name__}, since {reason}"
        log.info("best: %s", note)
        if type(chosen) is Response and chosen.takes_evenly(problem):  # calibrated plans its seeds itself
            problem = problem.along(problem.followed.first(SEEDS))
        found = chosen.scores(problem)
        return replace(found, method=type(self).__name__, notes=(note, *found.notes))

    def choose(self, problem: AttributionProblem) -> tuple[Response | Sketched, str]:
        """Return the method and the reason for it."""
        deep = layers_on(problem.final_model, problem.train) is None
        if why := self.corrected.inapplicable(problem.final_model, problem.train):
            why = f"the kernel is too large: {why}"
            if deep:
                return self._sketched(), why
            return self._response("ekfac"), why
        response = self._response("auto")
        if deep and (share := response.expected_share(problem)) > self.limit:
            why = f"the response is expected to cost {share:.2g} of the gold standard (limit: {self.limit:g})"
            if (few := self.corrected.expected_share(problem)) <= self.limit:
                return self.corrected, f"{why}, and along few seeds, with real runs, {few:.2g}"
            return self._sketched(), why
        if not deep and self.corrected.dearer_than_runs(problem):
            return self.corrected, "following a seed costs more than running it without each instance"
        protocol = problem.followed.protocol
        epochs = problem.followed.steps[-1] / protocol.batches_per_epoch(len(problem.train))
        if fixed := protocol.update_rule.held_fixed:
            return self.corrected, f"{protocol.optimizer}'s {fixed} depends on the left-out instance"
        if not deep and self.corrected.affords_each(problem):
            return self.corrected, "the budget buys a real run without each left-out instance besides"
        if epochs <= self.short:
            return response, f"{epochs:.3g} epochs of SGD change a run little"
        return self.corrected, f"after {epochs:.3g} epochs a run may have left any linear response"

    def _response(self, form: Literal["auto", "ekfac"]) -> Response:
        return Response(
            memory_mb=self.memory_mb, form=form, checks=self.checks, removal=self.corrected.removal
        )

    def _sketched(self) -> Sketched:
        return Sketched(budget=self.limit, memory_mb=self.memory_mb)
