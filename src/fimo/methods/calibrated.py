"""The response, corrected by a few real leave-one-out runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.further_training.trajectory import Trajectory
from fimo.linear_response.discrepancy import OWN, Correction, correct, correlations
from fimo.linear_response.linearity import Discrepancy, discrepancy, stratified
from fimo.linear_response.real_runs import worthwhile
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.error_bars import ErrorBars, SeedSpread, error_bars
from fimo.methods.following import CHECKED_SEEDS, Tally, real_losses, relative_size
from fimo.methods.response import Response
from fimo.scores import Scores

log = logging.getLogger(__name__)

PILOT = 0.15
"""Of the budget: first runs, which show how far the response can be trusted."""

FEWEST = 8
"""Runs, or left-out instances, with fewer of which there is nothing to correct by."""


@dataclass(frozen=True)
class Pilot:
    """What the first real runs show.

    Args:
        runs: K pairs of an instance's position and a seed's, seed by seed.
        instances: ``[M]``, positions of those instances.
        weight: ``[M]``, how many instances each stands for.
        size: ``[L]``, of predicted effects.
        response: of each of the seeds, ``[E, J, L]``.
        full: ``[2, E, J]``, test losses of the seeds' full runs.
        real: ``[K, E, J]``, and of the runs.
    """

    runs: list[tuple[int, int]]
    instances: Tensor
    weight: Tensor
    size: Tensor
    response: list[Tensor]
    full: Tensor
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
    3. What is left of the budget goes into more real runs, first where most is gained by one.

    The scores are a · response + z, fitted to the real runs around each evaluation point
    (:func:`fimo.linear_response.discrepancy.correct`): z is what changes slowly along a run, since what real
    runs differ by from one epoch to the next is noise that says nothing about an instance.

    Args:
        budget: of everything (full runs, the response, real runs) as a share of what the gold standard takes,
            in steps of a run. Full runs and a response that is trusted throughout may alone exceed it where
            few instances are left out; at 0 scores are the response's.
        checks: fewest real runs of the pilot, from which error bars are estimated (a small budget is exceeded
            by them); also where the budget buys none and scores are the response's.
        trust: correlation of predicted with real effects, plus its standard error, below which the response
            isn't followed further.
        propagate, segments, kernels, max_rows, memory_mb: see :class:`~fimo.methods.response.Response`.
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
        checks: int = 16,
    ) -> None:
        super().__init__(
            "path", propagate, segments, kernels, max_rows, memory_mb, form="kernel", checks=checks
        )
        for key, value in (("budget", budget), ("trust", trust)):
            if not 0 <= value <= 1:
                raise InputError(key, f"expected a share of 0 to 1 but got {value}")
        self.budget, self.trust = budget, trust

    def scores(self, problem: AttributionProblem) -> Scores:
        tally = Tally()
        found = self.calibrated(problem, tally)
        if found is None:
            return super().scores(problem)
        return self.with_bars(problem, found.values, found.bars, tally, *found.notes)

    def calibrated(self, problem: AttributionProblem, tally: Tally) -> Calibrated | None:
        """Return scores that real runs correct; None where the budget buys too few."""
        given, count = problem.followed, len(problem.index)
        units = self.budget * len(given.seeds) * (count + 1)  # in runs
        if count < FEWEST or units < 2 * FEWEST or len(given.seeds) < CHECKED_SEEDS:
            return None
        tally.add(len(given.seeds) * problem.run_gradients)
        trajectories = given.full_runs()
        pilot = self._pilot(problem, trajectories, units, tally)
        trusted = self._trusted(given.steps, pilot)
        more = self._worthwhile(problem, pilot, units, trusted)
        response = self._followed(problem, trajectories, pilot, [*pilot.runs, *more], trusted, tally)
        real = pilot.real
        if more:
            real = torch.cat([real, real_losses(problem, named(problem, more), tally)])
        return self._corrected(problem, pilot, response, real, trusted)

    def _pilot(
        self, problem: AttributionProblem, trajectories: Iterator[Trajectory], units: float, tally: Tally
    ) -> Pilot:
        """Follow the response along the first seeds, and run for real without instances of all sizes."""
        given = problem.followed
        seeds = given.seeds[:CHECKED_SEEDS]
        first = itertools.islice(trajectories, len(seeds))
        part = problem.along(given.part(first, seeds, len(given.steps)))
        response = list(self.by_seed(part, tally))
        size = relative_size(torch.stack(response).mean(0))
        number = max(FEWEST, self.checks, round(PILOT * units)) // len(seeds)
        instances, weight = stratified(size, number, largest=(number + 1) // 2)
        runs = [(i, s) for s in range(len(seeds)) for i in instances.tolist()]
        losses = real_losses(problem, [*((None, s) for s in seeds), *named(problem, runs)], tally)
        return Pilot(runs, instances, weight, size, response, losses[: len(seeds)], losses[len(seeds) :])

    def _trusted(self, steps: Sequence[int], pilot: Pilot) -> int:
        """Return the evaluation points to which the response agrees with the pilot's real runs."""
        predicted = torch.stack([pilot.response[s][:, :, i] for i, s in pilot.runs]).cpu()
        seed = torch.tensor([s for _, s in pilot.runs])
        agree = correlations(steps, pilot.real, predicted, seed)
        error = (1 - agree.square()) / (2 * (len(pilot.runs) - len(pilot.full))) ** 0.5
        trusted = (agree + error >= self.trust).nonzero()
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
        steps, seeds, first = problem.followed.steps, len(problem.followed.seeds), len(pilot.full)
        share = steps[trusted - 1] / steps[-1]
        following = self.following_cost(problem) * (first + (seeds - first) * share)
        rest = units - seeds - following - first - len(pilot.runs)
        done = set(pilot.runs)
        order = [run for run in worthwhile(pilot.size, seeds, OWN) if run not in done]
        return order[: max(0, int(rest))]

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
        others = given.seeds[len(pilot.full) :]
        part = problem.along(given.part(trajectories, others, trusted))
        rest = self.by_seed(part, tally) if others else iter(())
        spread = SeedSpread()
        of_run: dict[tuple[int, int], Tensor] = {}
        for s, scores in enumerate(itertools.chain((x[:trusted] for x in pilot.response), rest)):
            scores = prolonged(scores.double(), given.steps)
            spread.add(scores)
            of_run.update({(i, k): scores[:, :, i].cpu() for i, k in runs if k == s})
        return Followed(spread, list(runs), torch.stack([of_run[run] for run in runs]))

    def _corrected(
        self, problem: AttributionProblem, pilot: Pilot, response: Followed, real: Tensor, trusted: int
    ) -> Calibrated:
        """Return the scores that all real runs support, with their error bars.

        Args:
            real: ``[K, E, J]``, test losses of the runs of ``response``.
        """
        mean, count, steps = response.spread.mean, len(problem.index), problem.followed.steps
        instance, seed = torch.tensor(response.runs).T
        average = mean.cpu()[:, :, instance].permute(2, 0, 1)
        correction = correct(steps, real, response.predicted, average, instance, seed, count)
        scale = correction.scale[:, None, None]
        explained = scale * mean.cpu()
        bars = self._bars(problem, pilot, response, explained, correction)
        values = (explained + correction.remainder).to(mean.device, problem.dtype)
        return Calibrated(values, bars, trusted, correction, len(response.runs), steps)

    def _bars(
        self,
        problem: AttributionProblem,
        pilot: Pilot,
        response: Followed,
        explained: Tensor,
        correction: Correction,
    ) -> ErrorBars:
        """Return the error bars.

        What the response misses is estimated from the pilot's instances as if none had been run (their
        remainders are not used), and is that for instances without a run; see :func:`after_runs` for others.
        """
        seeds, number, scale = len(pilot.full), len(pilot.instances), correction.scale[:, None, None]
        by_seed = (seeds, number)
        changes = (pilot.real.unflatten(0, by_seed) - pilot.full[:, None]).permute(0, 2, 3, 1)
        own = response.predicted[: len(pilot.runs)].unflatten(0, by_seed).permute(0, 2, 3, 1)
        average = response.spread.mean.cpu()[..., pilot.instances]
        residual = changes - scale * average - correction.own_scale[:, None, None] * (own - average)
        missed = discrepancy(problem.followed.steps, residual, explained, pilot.instances, pilot.weight)
        missed = after_runs(missed, correction.unexplained)
        raw, adjusted = (x.cpu() * scale.square() for x in response.spread.variances())
        return error_bars((raw, adjusted), missed, number, problem.dtype)

    def following_cost(self, problem: AttributionProblem) -> float:
        """Return about how many steps of a run the response's step along a seed costs.

        Its arithmetic is |batch|·rows·L, a run's |batch|·P. Measured on two CPU cores (an MLP of
        17,500 parameters, N = 927, L = 50 and 100).
        """
        outputs, n = problem.final_model.outputs(problem.test[:1])[0].numel(), len(problem.train)
        rows = min(self.max_rows, n * outputs)
        share = rows**2 * len(problem.index) / (n * problem.final_model.size)
        return 1.7 + 0.7 * share


def named(problem: AttributionProblem, runs: Sequence[tuple[int, int]]) -> list[tuple[int | None, int]]:
    """Return runs, as positions of instances and seeds, as training instances and seeds."""
    return [(int(problem.index[i]), problem.followed.seeds[s]) for i, s in runs]


def prolonged(scores: Tensor, steps: Sequence[int]) -> Tensor:
    """Return scores ``[E, ...]`` of the first evaluation points ``[E', ...]``.

    Later ones take the mean over the last tenth: what is the seeds' noise at one point is none at later ones.
    """
    points, last = len(steps), len(scores)
    if last == points:
        return scores
    late = sum(step >= 0.9 * steps[last - 1] for step in steps[:last])
    return torch.cat([scores, scores[last - late :].mean(0).expand(points - last, *scores.shape[1:])])


def after_runs(missed: Discrepancy, unexplained: Tensor) -> Discrepancy:
    """Return what scores miss after the remainders of instances with real runs.

    Runs leave the unexplained share of an instance's own part. Remainders are known up to their mean over
    the instances that were run, which is taken as 0: that mean is missed by each of them, and the mean over
    all left-out instances stays what it was.

    Args:
        missed: by predictions alone.
        unexplained: ``[E, L]``, 1 for instances without a run.
    """
    count = missed.own.shape[-1]
    share = unexplained[:, None]
    run = (unexplained < 1).any(0)
    of_run = missed.own[..., run].sum(-1, keepdim=True) / max(int(run.sum()), 1) ** 2
    own = missed.own * share + of_run * (1 - share).square()
    return Discrepancy(own, missed.common, missed.own.mean(-1, keepdim=True) / count)
