"""The mirrored influence: training instances' losses in runs that weigh a test instance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.context import Setting
from fimo.engine.leave_out import Batch, make_rule
from fimo.engine.objectives import Batches, full_batches, run_on
from fimo.engine.protocol import DTYPES, Protocol
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.error_bars import NO_BARS, SeedSpread
from fimo.methods.following import FollowingMethod, Tally
from fimo.models.final_model import FinalModel
from fimo.models.quantities import joined
from fimo.scores import Scores

Direction = Literal["both", "up", "down"]
SIGNS: dict[str, tuple[int, ...]] = {"both": (-1, 1), "up": (0, 1), "down": (-1, 0)}
"""Of a direction: the weights of two runs, in units of the weight, whose losses are compared."""

LOSSES_BYTES = 2**28
"""Of the training losses that are held besides the scores."""


class Mirrored(FollowingMethod):
    """Further trains with a test instance's loss in the objective, and reads all training losses.

    (Ko et al., 2024, arXiv 2402.08922, by real runs of the given further training; Wang et al., 2024, arXiv
    2406.09408, is :class:`~fimo.methods.unlearning.Unlearning`)

        score[t, j, i] = mean over seeds of (loss_i(-w) - loss_i(+w)) / 2w

    with loss_i(w) training instance i's loss after t steps of a run whose every batch loss is
    L_batch + (w / N) loss_j. J runs (or 2J) so give the scores of all N training instances, where leaving
    each out takes N. Where steps are linear and follow one symmetric curvature from a minimum, what j does to
    i is what i does to j, exactly; the mirror is blurred by loss gradients that change along the run, by
    Adam, whose preconditioner is each run's own, and by the noise of the few seeds.

    Args:
        direction: ``both`` compares runs with -w and +w, whose second order cancels; ``up`` compares +w with
            the full run, ``down`` the full run with -w, for half of the cost.
        weight: w, that of one instance when 1; scores are per instance whatever it is.
        seeds: at most this many of the followed ones; all when None.
    """

    needs = "the protocol of further training"
    cost = "two full runs per test instance and seed (direction), whatever the number of left-out instances"
    use = "real runs for all training instances, where test instances are few"

    def __init__(self, direction: Direction = "both", weight: float = 1.0, seeds: int | None = 1) -> None:
        if direction not in SIGNS:
            raise InputError("direction", f"expected one of {', '.join(SIGNS)} but got {direction!r}")
        if not weight > 0:
            raise InputError("weight", f"expected a positive number but got {weight}")
        if seeds is not None and seeds < 1:
            raise InputError("seeds", f"expected at least 1 or null but got {seeds}")
        self.direction, self.weight, self.seeds = direction, weight, seeds

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        if final_model.measurement is None:
            return None
        return "it trains on the loss of test instances, and another measurement of them is explained"

    def unfollowable(self, protocol: Protocol) -> str | None:
        return None  # steps are made, not differentiated

    def scores(self, problem: AttributionProblem) -> Scores:
        if reason := self.inapplicable(problem.final_model, problem.train):
            raise InputError("model.measurement", reason)
        tally, spread = Tally(), SeedSpread()
        for seed in problem.followed.seeds[: self.seeds]:
            spread.add(self.of_seed(problem, seed, tally))
        copies = make_rule(problem.followed.protocol, problem.train).multiplicity(problem.index)
        return self.with_bars(problem, spread.mean * copies.to(spread.mean), NO_BARS, tally)

    def of_seed(self, problem: AttributionProblem, seed: int, tally: Tally) -> Tensor:
        """Return one seed's scores ``[E, J, L]``, in the final model's dtype."""
        given, test, n = problem.followed, problem.test, len(problem.train)
        # a schedule counts the steps over the N training instances
        steps = given.protocol.total_steps(n)
        protocol = replace(given.protocol, epochs=None, steps=steps)
        whole = joined([problem.train, test])
        setting = Setting.build(problem.final_model, whole, problem.removed, protocol, test.targets.device)
        low, high = SIGNS[self.direction]
        most = max(2, LOSSES_BYTES // (16 * len(given.steps) * len(problem.index)))
        found = []
        for tests in torch.arange(len(test)).split(most):
            # one run for all of them stands for those in which the test instance has no weight
            runs = [(int(j), sign) for sign in (low, high) if sign for j in tests]
            runs += [(int(tests[0]), 0)] * (0 in (low, high))
            batches, read = self._batches(setting, n, seed, runs), [(setting.test, problem.final_model.loss)]
            (losses,) = run_on(setting, seed, len(runs), batches, given.steps, read)
            tally.add(len(runs) * (problem.run_gradients + steps))
            of_sign = dict(zip([s for s in (low, high) if s], losses.split(len(tests)), strict=False))
            of_sign[0] = losses[-1:]
            change = (of_sign[low] - of_sign[high]) / (self.weight * (high - low))
            found.append(change.transpose(0, 1).to(problem.dtype))
        return torch.cat(found, 1)

    def _batches(self, setting: Setting, n: int, seed: int, runs: list[tuple[int, int]]) -> Batches:
        """Return the full run's batches with the test instance of each run besides."""
        dtype, device = DTYPES[setting.protocol.dtype], setting.device
        place = torch.tensor([[n + j] for j, _ in runs], device=device)
        weight = torch.tensor([[sign * self.weight / n] for _, sign in runs], dtype=dtype, device=device)

        # in the batch itself where that is cheaper: not where all runs share products with it, and not where
        # its dropout masks would be others
        within = setting.engine != "linear" and not setting.stochastic

        def batches(part: Tensor) -> Iterator[Batch]:
            extra, extra_weight = place[part.to(device)], weight[part.to(device)]
            for batch in full_batches(setting.protocol, n, seed, dtype, device):
                index, weights = batch.index, batch.weight.expand(len(part), -1)
                if within:
                    index = torch.cat([index.expand(len(part), -1), extra], 1)
                    yield Batch(index, torch.cat([weights, extra_weight], 1))
                else:
                    yield Batch(index, weights, extra, extra_weight)

        return batches
