"""The response, corrected by a few real leave-one-out runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fimo.engine.leave_out import make_rule
from fimo.errors import InputError
from fimo.further_training.trajectory import Trajectory
from fimo.linear_response.discrepancy import OWN, Correction, correct, correlations, weights
from fimo.linear_response.linearity import FEWEST as FEWEST_OF_GROUP
from fimo.linear_response.linearity import (
    GROUPS,
    Checked,
    Discrepancy,
    discrepancy,
    stratified,
)
from fimo.linear_response.real_runs import worthwhile
from fimo.linear_response.sampled_steps import DRAWS
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.error_bars import ErrorBars, SeedSpread, error_bars
from fimo.methods.following import CHECKED_SEEDS, Tally, named, real_losses, relative_size
from fimo.methods.response import Response
from fimo.scores import Scores

log = logging.getLogger(__name__)

PILOT = 0.15
"""Of the budget: first runs, which show how far the response can be trusted."""

MANY = 30
"""Left-out instances from which on real runs may take the response's place: fewer cost little either way."""

FOLLOWING = 0.4
"""Of the budget, at most, for following seeds, where one is much like another (``removal: even``)."""

NOISIEST = 0.36
"""Correlation of two seeds' real runs that is reckoned with where they have less: else anything would do."""

FEWEST = 8
"""Runs, or left-out instances, with fewer of which there is nothing to correct by."""


@dataclass(frozen=True)
class Pilot:
    """What the first real runs show.

    Args:
        checked: instances for error bars, of which those of group 0 are the pilot's.
        runs: K pairs of an instance's position and a seed's, those of group 0.
        size: ``[L]``, of predicted effects.
        response: of each of the pilot's two seeds, ``[E, J, L]``.
        real: ``[K, E, J]``, test losses of the runs.
    """

    checked: Checked
    runs: list[tuple[int, int]]
    size: Tensor
    response: list[Tensor]
    real: Tensor


@dataclass(frozen=True)
class Followed:
    """The response of all seeds.

    Args:
        spread: of seeds' scores.
        runs: K real runs, as in :class:`Pilot`.
        predicted: ``[K, E, J]``, the response's effects in them.
    """

    spread: SeedSpread
    runs: list[tuple[int, int]]
    predicted: Tensor


@dataclass(frozen=True)
class Calibrated:
    """Scores that real runs correct.

    Args:
        values: ``[E, J, L]``.
        bars: their standard errors.
        trusted: evaluation points to which the response was followed.
        correction: correlation ``[E]`` of the response with the effects of the real runs, its scale, ...
        runs: real ones.
        steps: ``[E]``.
    """

    values: Tensor
    bars: ErrorBars
    trusted: int
    correction: Correction
    runs: int
    steps: Sequence[int]

    @property
    def notes(self) -> tuple[str, ...]:
        """How far the response is trusted, in words."""
        agree, scale = float(self.correction.correlation[-1]), float(self.correction.scale[-1])
        return (
            f"the response is followed to step {self.steps[self.trusted - 1]} of {self.steps[-1]}",
            f"corrected by {self.runs} real runs, with whose effects the response has a correlation of "
            f"{agree:.2f} at the end and which are {scale:.2f} times as large",
        )


class CalibratedResponse(Response):
    """The linear response as far as it can be trusted, corrected by as many real runs as a budget allows.

    1. The response is followed along two seeds. Real runs of these, half of them without the instances whose
       effects it predicts to be largest, the others without instances of all sizes, show until when the two
       agree (``trust``), and how large its errors are.
    2. All seeds' response is followed until then. Later predictions are its last ones.
    3. What is left of the budget goes into more real runs: one of each instance, those of large effects
       first, then further ones where most is gained.
    4. Others, with other seeds, show together with the pilot's the error that is left (error bars).

    Where left-out instances are taken evenly from all batches (``removal: even``), one seed's effects are
    much like another's, and few seeds are followed: two fifths of the budget at most; the rest buys real
    runs. Where following a seed would cost more than running it without each left-out instance, as with a
    linear head, whose runs are cheap, the scores are such runs' changes along two seeds or more.

    The scores are a · response + e · earlier response + z, fitted to the real runs around each evaluation
    point (:func:`fimo.linear_response.discrepancy.correct`): z is what changes slowly along a run, since
    what real runs differ by from one epoch to the next is noise that says nothing about an instance.

    Args:
        budget: of everything (full runs, the response, real runs) as a share of what the gold standard takes,
            in steps of a run. Full runs and a response that is trusted throughout may alone exceed it where
            few instances are left out; at 0 scores are the response's.
        checks: real runs from which error bars are estimated. Half are the pilot's (which may exceed a small
            budget), half and their full runs come on top of the budget. They are made also where the budget
            buys no runs and scores are the response's.
        trust: correlation of predicted with real effects, plus its standard error, below which the response
            isn't followed further; with Adam, of what is possible with the noise of single runs.
        propagate, segments, kernels, max_rows, memory_mb, removal: see
            :class:`~fimo.methods.response.Response`.
    """

    needs = "the protocol of further training"
    cost = "a tenth of the gold standard (budget)"
    use = "long further training, and Adam: the response, corrected by some real runs"

    def __init__(
        self,
        budget: float = 0.1,
        trust: float = 0.6,
        propagate: Literal["outputs", "loss"] = "outputs",
        segments: int = 6,
        kernels: Literal["auto", "own", "shared"] = "auto",
        max_rows: int = 3000,
        memory_mb: float = 1024,
        checks: int = 32,
        removal: Literal["even", "own"] = "even",
    ) -> None:
        super().__init__("path", propagate, segments, kernels, max_rows, memory_mb, "kernel", checks, removal)
        for key, value in (("budget", budget), ("trust", trust)):
            if not 0 <= value <= 1:
                raise InputError(key, f"expected a share of 0 to 1 but got {value}")
        self.budget, self.trust = budget, trust

    def scores(self, problem: AttributionProblem) -> Scores:
        tally = Tally()
        if self.dearer_than_runs(problem):
            return self._by_runs(problem, tally)
        found = self.calibrated(problem, tally)
        if found is None:
            return super().scores(problem)
        return self.with_bars(problem, found.values, found.bars, tally, *found.notes)

    def dearer_than_runs(self, problem: AttributionProblem) -> bool:
        """Return whether following a seed costs more than running it without each left-out instance.

        So it is where few parameters move, such as a linear head's, and two seeds are beyond the budget.
        """
        seeds, count = len(problem.followed.seeds), len(problem.index)
        if not self.budget or self.removal == "own" or count < MANY or seeds < CHECKED_SEEDS:
            return False
        return 1 + self.following_cost(problem) > max(1, self.budget * seeds / CHECKED_SEEDS) * (count + 1)

    def expected_share(self, problem: AttributionProblem) -> float:
        """Return about what it costs as a share of the gold standard, with as few seeds as it follows."""
        given = problem.followed
        every = self.removal == "own" or not self._runs_bought(problem)
        few = given if every else given.first(CHECKED_SEEDS)
        share = super().expected_share(problem.along(few)) * len(few.seeds) / len(given.seeds)
        return max(self.budget, share)

    def affords_each(self, problem: AttributionProblem) -> bool:
        """Return whether the budget buys a real run of each instance after following enough seeds."""
        seeds = len(problem.followed.seeds)
        enough = seeds if self.removal == "own" else min(seeds, CHECKED_SEEDS * GROUPS)
        following = enough * (1 + self.following_cost(problem))
        return self._runs_bought(problem) - following >= len(problem.index)

    def _runs_bought(self, problem: AttributionProblem) -> float:
        """Return the budget in runs; 0 where it buys too few to correct by."""
        seeds, count = len(problem.followed.seeds), len(problem.index)
        runs = self.budget * seeds * (count + 1)
        return runs if count >= FEWEST and runs >= 2 * FEWEST and seeds >= CHECKED_SEEDS else 0.0

    def _by_runs(self, problem: AttributionProblem, tally: Tally) -> Scores:
        """Return the changes in real runs along few seeds, which leave instances out of all batches.

        What that misses of the rule that is asked for is measured by ``checks`` runs by that rule.
        """
        asked = problem.along(
            problem.followed.first(max(CHECKED_SEEDS, int(self.budget * len(problem.followed.seeds))))
        )
        even = asked.along(self.removing(asked).followed)
        instances = [int(i) for i in problem.index]

        def changes() -> Iterator[Tensor]:
            for seed in even.followed.seeds:
                losses = real_losses(even, [(i, seed) for i in (None, *instances)], tally)
                yield (losses[1:] - losses[0]).permute(1, 2, 0)

        if even.followed.protocol == asked.followed.protocol:
            spread = SeedSpread()
            for change in changes():
                spread.add(change)
            raw, adjusted = (variance.sqrt().to(problem.dtype) for variance in spread.variances())
            values, bars = spread.mean, ErrorBars(raw, adjusted)
        else:
            values, bars = self.average(asked, changes(), tally)
        seeds = len(even.followed.seeds)
        note = f"real runs of {seeds} seeds, which cost less than following their response"
        return self.with_bars(problem, values.to(problem.train.targets.device), bars, tally, note)

    def calibrated(self, problem: AttributionProblem, tally: Tally) -> Calibrated | None:
        """Return scores that real runs correct; None where the budget buys too few."""
        units = self._runs_bought(problem)
        if not units:
            return None
        given = problem.followed
        problem = problem.along(given.first(self._worth_following(problem, units)))
        given = problem.followed
        tally.add(len(given.seeds) * problem.run_gradients)
        trajectories = given.full_runs()
        pilot = self._pilot(problem, trajectories, units, tally)
        trusted = self._trusted(problem, pilot)
        more = self._worthwhile(problem, pilot, units, trusted)
        later = [*more, *(run for run in pilot.checked.runs if run not in set(pilot.runs))]
        runs = [*pilot.runs, *later]
        response = self._followed(problem, trajectories, pilot, runs, trusted, tally)
        seeds = sorted({s for _, s in runs})
        full = real_losses(self.of_real_runs(problem), [(None, given.seeds[s]) for s in seeds], tally)
        real = pilot.real
        if later:
            real = torch.cat([real, real_losses(self.of_real_runs(problem), named(problem, later), tally)])
        changes = real - full[[seeds.index(s) for _, s in runs]]
        return self._corrected(problem, pilot, response, changes, trusted)

    def _worth_following(self, problem: AttributionProblem, units: float) -> int:
        """Return how many seeds are followed.

        All where a seed's response has the noise of its own batches. Else as many as its error bars know what
        to do with, since another real run says more.
        """
        seeds = len(problem.followed.seeds)
        if self.removal == "own":
            return seeds
        affordable = int(FOLLOWING * units / (1 + self.following_cost(problem)))
        return min(seeds, max(CHECKED_SEEDS, min(CHECKED_SEEDS * GROUPS, affordable)))

    def _pilot(
        self, problem: AttributionProblem, trajectories: Iterator[Trajectory], units: float, tally: Tally
    ) -> Pilot:
        """Follow the response along the first seeds, and run for real without instances of all sizes."""
        given = problem.followed
        seeds = given.seeds[:CHECKED_SEEDS]
        first = itertools.islice(trajectories, len(seeds))
        part = problem.along(given.part(first, seeds, len(given.steps)))
        # or the pilot's seeds had fewer kernels than others, and other errors
        response = list(self.by_seed(part, tally, len(given.seeds)))
        size = relative_size(torch.stack(response).mean(0))
        number = max(FEWEST, self.checks // 2, round(PILOT * units)) // len(seeds)
        checked = self._to_check(size, number, len(given.seeds))
        runs = [run for run in checked.runs if run[1] < len(seeds)]
        return Pilot(
            checked,
            runs,
            size,
            response,
            real_losses(self.of_real_runs(problem), named(problem, runs), tally),
        )

    def _to_check(self, size: Tensor, number: int, seeds: int) -> Checked:
        """Return the pilot's instances, half of them the largest, and further groups of all sizes."""
        others = min(self.checks // 2 // CHECKED_SEEDS, len(size) - number)
        groups = max(0, min(min(GROUPS, seeds // 2) - 1, others // FEWEST_OF_GROUP))
        largest = (number + 1) // 2
        instances, weight = stratified(size, number + (others if groups else 0), largest)
        group = torch.zeros(len(instances), dtype=torch.long)
        if groups:
            of_pilot = torch.linspace(largest, len(instances) - 1, number - largest + 2)[1:-1].round().long()
            place = torch.ones_like(group, dtype=torch.bool)
            place[:largest] = False
            place[of_pilot] = False
            group[place] = 1 + torch.arange(int(place.sum())) % groups
        return Checked(instances, weight, group)

    def _trusted(self, problem: AttributionProblem, pilot: Pilot) -> int:
        """Return the evaluation points to which the response agrees with the pilot's real runs.

        Where these leave an instance out where it occurs and the response takes it evenly from all batches,
        when it occurs is noise to the response: its correlation with single runs can't be more than the
        root of that of two seeds' runs with each other.
        """
        steps = problem.followed.steps
        predicted = torch.stack([pilot.response[s][:, :, i] for i, s in pilot.runs]).cpu()
        seed = torch.tensor([s for _, s in pilot.runs])
        agree = correlations(steps, pilot.real, predicted, seed)
        error = (1 - agree.square()) / (2 * (len(pilot.runs) - CHECKED_SEEDS)) ** 0.5
        possible = torch.ones_like(agree)
        if self.removing(problem).followed.protocol != self.of_real_runs(problem).followed.protocol:
            one, other = pilot.real.chunk(CHECKED_SEEDS)  # of the same instances
            possible = correlations(steps, one, other, torch.zeros(len(one))).clamp(NOISIEST, 1).sqrt()
        trusted = (agree + error >= self.trust * possible).nonzero()
        points = int(trusted.max()) + 1 if len(trusted) else 1
        log.info(
            "calibrated: the response is followed to step %d of %d",
            steps[points - 1],
            steps[-1],
        )
        return points

    def _worthwhile(
        self, problem: AttributionProblem, pilot: Pilot, units: float, trusted: int
    ) -> list[tuple[int, int]]:
        """Return the real runs that the rest of the budget buys after the pilot's."""
        steps, seeds, first = problem.followed.steps, len(problem.followed.seeds), CHECKED_SEEDS
        share = steps[trusted - 1] / steps[-1]
        following = self.following_cost(problem) * (first + (seeds - first) * share)
        rest = units - seeds - following - first - len(pilot.runs)
        done = set(pilot.checked.runs)
        # one run of each instance first, with seeds that have most others to be compared with
        ran = {i for i, _ in done}
        once = [i for i in pilot.size.argsort(descending=True).tolist() if i not in ran]
        order = [(i, k % first) for k, i in enumerate(once)] + worthwhile(pilot.size, seeds, OWN)
        return [run for run in dict.fromkeys(order) if run not in done][: max(0, int(rest))]

    def _followed(
        self,
        problem: AttributionProblem,
        trajectories: Iterator[Trajectory],
        pilot: Pilot,
        runs: Sequence[tuple[int, int]],
        trusted: int,
        tally: Tally,
    ) -> Followed:
        """Follow the response along the other seeds, as far as it is trusted."""
        given = problem.followed
        others = given.seeds[CHECKED_SEEDS:]
        part = problem.along(given.part(trajectories, others, trusted))
        rest = self.by_seed(part, tally, len(given.seeds)) if others else iter(())
        spread = SeedSpread()
        of_run: dict[tuple[int, int], Tensor] = {}
        for s, scores in enumerate(itertools.chain((x[:trusted] for x in pilot.response), rest)):
            scores = prolonged(scores.double(), given.steps)
            spread.add(scores)
            of_run.update({(i, k): scores[:, :, i].cpu() for i, k in runs if k == s})
        return Followed(spread, list(runs), torch.stack([of_run[run] for run in runs]))

    def _corrected(
        self,
        problem: AttributionProblem,
        pilot: Pilot,
        response: Followed,
        real: Tensor,
        trusted: int,
    ) -> Calibrated:
        """Return the scores that all real runs support, with their error bars.

        Args:
            real: ``[K, E, J]``, changes of test losses in the runs of ``response``.
        """
        mean, steps = response.spread.mean.cpu(), problem.followed.steps
        instance, seed = torch.tensor(response.runs).T
        correction = correct(steps, real, response.predicted, mean, instance, seed, pilot.size)
        explained = correction.explained
        runs = [response.runs.index(run) for run in pilot.checked.runs]
        own = response.predicted[runs] - mean[:, :, instance[runs]].permute(2, 0, 1)
        known = explained[:, :, instance[runs]].permute(2, 0, 1) + correction.own_scale[:, None] * own
        residual = real[runs] - known
        bars = self._bars(problem, pilot, response.spread, residual, explained, correction)
        protocol = problem.followed.protocol
        if make_rule(protocol, problem.train).shortens_epochs(protocol):
            # differences between real runs, by which responses are scaled, say nothing about that
            why = "of raw scores: epochs without an instance have a step less, by which all scores are moved"
            bars = ErrorBars(None, bars.adjusted, "; ".join(filter(None, (why, bars.withheld))))
        values = (explained + correction.remainder).to(response.spread.mean.device, problem.dtype)
        return Calibrated(values, bars, trusted, correction, len(real), steps)

    def _bars(
        self,
        problem: AttributionProblem,
        pilot: Pilot,
        spread: SeedSpread,
        residual: Tensor,
        explained: Tensor,
        correction: Correction,
    ) -> ErrorBars:
        """Return the error bars.

        What the response misses is estimated from the checked instances as if none had been run (their
        remainders are not used), and is that for instances without a run; see :func:`after_runs` for others.

        Args:
            residual: ``[2 * M, E, J]``, what of the checked instances' real runs the response misses.
        """
        checked = pilot.checked
        missed = discrepancy(problem.followed.steps, checked.by_instance(residual), explained, checked)
        missed = after_runs(missed, correction.unexplained, weights(pilot.size))
        raw, adjusted = (x.cpu() * correction.scale.square()[:, None, None] for x in spread.variances())
        return error_bars((raw, adjusted), missed, len(checked.instances), problem.dtype)

    def following_cost(self, problem: AttributionProblem) -> float:
        """Return about how many steps of a run the response's step along a seed costs.

        Its arithmetic is |followed of a batch|·rows·L, a run's |batch|·P. Measured on a CPU core, within a
        factor of 1.5 in most of 30 settings (MLPs of 1,400 to 107,000 parameters, N = 160 to 1,000, L = 20 to
        100, batches of 32 to 128), up to 2.3 times as much where steps are so small that their overhead
        counts. A linear head of 1,290 parameters took twice as much (N = 5,000, L = 50).
        """
        n, model = len(problem.train), problem.final_model
        rows = min(self.max_rows, n * model.loss.rank(model.outputs(problem.test[:1])[0].shape))
        of_instance = rows / n
        if n > self.max_rows:  # of the most curved, or of a sample of half as many
            of_instance = max(of_instance, min(1.0, DRAWS / problem.followed.protocol.batch_size))
        share = of_instance * rows * len(problem.index) / model.size
        moments = 1.4 if problem.followed.protocol.update_rule.preconditions else 1.0
        return moments * (1.5 + 1.8 * float(share**0.8))


def prolonged(scores: Tensor, steps: Sequence[int]) -> Tensor:
    """Return scores ``[E, ...]`` of the first evaluation points ``[E', ...]``.

    Later ones take the mean over the last tenth: what is the seeds' noise at one point is none at later ones.
    """
    points, last = len(steps), len(scores)
    if last == points:
        return scores
    late = sum(step >= 0.9 * steps[last - 1] for step in steps[:last])
    return torch.cat([scores, scores[last - late :].mean(0).expand(points - last, *scores.shape[1:])])


def after_runs(missed: Discrepancy, unexplained: Tensor, weight: Tensor) -> Discrepancy:
    """Return what scores miss after the remainders of instances with real runs.

    Runs leave the unexplained share of an instance's own part, or as much as two of them have of noise.
    Remainders are known up to their weighted mean over the instances with runs, which is taken as 0: that
    mean is missed by each of them.

    Args:
        missed: by predictions alone.
        unexplained: ``[E, L]``, 1 for instances without a run.
        weight: ``[L]``, in that mean.
    """
    share = unexplained[:, None]
    left = share if missed.noise is None else share.maximum(missed.noise)
    weight = weight * (unexplained < 1).any(0)
    offset = (missed.own * (weight / weight.sum()).square()).sum(-1, keepdim=True)
    return replace(missed, own=missed.own * left.clamp(max=1), offset=offset, gain=1 - share)
