"""The cheapest method that is expected to reach the ceiling."""

from __future__ import annotations

import logging
from dataclasses import replace

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.following import FollowingMethod
from fimo.methods.response import Response
from fimo.models.final_model import FinalModel
from fimo.scores import Scores

log = logging.getLogger(__name__)


class Best(FollowingMethod):
    """Chooses a method by model size, optimizer and amount of further training, and says which and why.

    - ``response`` for SGD up to ``short`` epochs: leaving an instance out is still a small change of the run,
      and the response, which knows the seeds' batches, agrees with the gold standard as well as a
      repetition of the gold standard does;
    - ``calibrated`` for more, and for Adam, whose second moment the response holds fixed: a few real runs
      correct it;
    - ``response`` in EK-FAC's eigenbasis where outputs are too many for its kernel.

    The rules are measurements: ``benchmarks/response.py``.

    Args:
        short: epochs of SGD up to which nothing is corrected.
        budget: see :class:`~fimo.methods.calibrated.CalibratedResponse`.
        memory_mb: of Jacobians held at once.
        checks: real runs for error bars, where ``response`` is taken; see
            :class:`~fimo.methods.response.Response`.
    """

    needs = "the protocol of further training"
    cost = "as `response` or `calibrated`, which it chooses between"
    use = "when in doubt and a protocol is known: nearest to the ceiling at every amount"

    def __init__(
        self, short: float = 5, budget: float = 0.1, memory_mb: float = 1024, checks: int = 32
    ) -> None:
        if short < 0:
            raise InputError("short", f"expected at least 0 but got {short}")
        self.short, self.memory_mb, self.checks = short, memory_mb, checks
        self.corrected = CalibratedResponse(budget=budget, memory_mb=memory_mb, checks=checks)

    def scores(self, problem: AttributionProblem) -> Scores:
        chosen, reason = self.choose(problem.final_model, problem.train, problem.followed)
        note = f"{type(chosen).__name__}, since {reason}"
        log.info("best: %s", note)
        found = chosen.scores(problem)
        return replace(found, method=type(self).__name__, notes=(note, *found.notes))

    def choose(
        self, final_model: FinalModel, train: Instances, further_training: FurtherTraining
    ) -> tuple[Response, str]:
        """Return the method and the reason for it."""
        if why := self.corrected.inapplicable(final_model, train):
            return Response(
                memory_mb=self.memory_mb, form="ekfac", checks=self.checks
            ), f"the kernel is too large: {why}"
        protocol = further_training.protocol
        epochs = further_training.steps[-1] / protocol.batches_per_epoch(len(train))
        if fixed := protocol.update_rule.held_fixed:
            return self.corrected, f"{protocol.optimizer}'s {fixed} depends on the left-out instance"
        if epochs <= self.short:
            return Response(
                memory_mb=self.memory_mb, checks=self.checks
            ), f"{epochs:.3g} epochs of SGD change a run little"
        return self.corrected, f"after {epochs:.3g} epochs a run may have left any linear response"
