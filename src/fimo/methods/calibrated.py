"""The response, corrected by a few real leave-one-out runs."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import Trajectory
from fimo.linear_response.discrepancy import OWN, Correction, correct, correlations
from fimo.linear_response.linearity import Discrepancy, discrepancy, stratified
from fimo.linear_response.real_runs import worthwhile
from fimo.methods.error_bars import ErrorBars, SeedSpread, error_bars
from fimo.methods.following import CHECKED_SEEDS, relative_size
from fimo.methods.response import Response

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

    Attributes:
        validation: for each evaluation point after :meth:`attribute`, the correlation of the response with
            the effects of the real runs, and the scale a; None where there were too few runs.
        trusted: evaluation points to which the response was followed.
    """

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
        self.validation: list[tuple[float, float]] | None = None
        self.trusted: int | None = None

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        self.gradient_evaluations, self.validation, self.trusted = 0, None, None
        seeds, count = self.ft.seeds, len(self.left_out)
        units = self.budget * len(seeds) * (count + 1)  # in runs
        if count < FEWEST or units < 2 * FEWEST or len(seeds) < CHECKED_SEEDS:
            return super().scores(test, left_out)
        self.gradient_evaluations += len(seeds) * self.run_gradients
        trajectories = self.ft.full_runs()
        pilot = self._pilot(test, trajectories, units)
        self.trusted = self._trusted(pilot)
        more = self._worthwhile(test, pilot, units)
        response = self._followed(test, trajectories, pilot, [*pilot.runs, *more])
        real = torch.cat([pilot.real, self.real_losses(test, self._named(more))]) if more else pilot.real
        return self._corrected(pilot, response, real)

    def _pilot(self, test: Instances, trajectories: Iterator[Trajectory], units: float) -> Pilot:
        """Follow the response along the first seeds, and run for real without instances of all sizes."""
        seeds = self.ft.seeds[:CHECKED_SEEDS]
        first = itertools.islice(trajectories, len(seeds))
        response = list(self._along_part(test, first, seeds, len(self.ft.steps)))
        size = relative_size(torch.stack(response).mean(0))
        number = max(FEWEST, self.checks, round(PILOT * units)) // len(seeds)
        instances, weight = stratified(size, number, largest=(number + 1) // 2)
        runs = [(i, s) for s in range(len(seeds)) for i in instances.tolist()]
        losses = self.real_losses(test, [*((None, s) for s in seeds), *self._named(runs)])
        return Pilot(runs, instances, weight, size, response, losses[: len(seeds)], losses[len(seeds) :])

    def _trusted(self, pilot: Pilot) -> int:
        """Return the evaluation points to which the response agrees with the pilot's real runs."""
        predicted = torch.stack([pilot.response[s][:, :, i] for i, s in pilot.runs]).cpu()
        seed = torch.tensor([s for _, s in pilot.runs])
        agree = correlations(self.ft.steps, pilot.real, predicted, seed)
        error = (1 - agree.square()) / (2 * (len(pilot.runs) - len(pilot.full))) ** 0.5
        trusted = (agree + error >= self.trust).nonzero()
        points = int(trusted.max()) + 1 if len(trusted) else 1
        log.info(
            "calibrated: the response is followed to step %d of %d",
            self.ft.steps[points - 1],
            self.ft.steps[-1],
        )
        return points

    def _worthwhile(self, test: Instances, pilot: Pilot, units: float) -> list[tuple[int, int]]:
        """Return the real runs that the rest of the budget buys after the pilot's."""
        assert self.trusted is not None
        seeds, first = len(self.ft.seeds), len(pilot.full)
        trusted = self.ft.steps[self.trusted - 1] / self.ft.steps[-1]
        following = self.following_cost(test) * (first + (seeds - first) * trusted)
        rest = units - seeds - following - first - len(pilot.runs)
        done = set(pilot.runs)
        order = [run for run in worthwhile(pilot.size, seeds, OWN) if run not in done]
        return order[: max(0, int(rest))]

    def _followed(
        self,
        test: Instances,
        trajectories: Iterator[Trajectory],
        pilot: Pilot,
        runs: Sequence[tuple[int, int]],
    ) -> Followed:
        """Follow the response along the other seeds, as far as it is trusted."""
        assert self.trusted is not None
        others = self.ft.seeds[len(pilot.full) :]
        rest = self._along_part(test, trajectories, others, self.trusted) if others else iter(())
        spread = SeedSpread()
        of_run: dict[tuple[int, int], Tensor] = {}
        for s, scores in enumerate(itertools.chain((x[: self.trusted] for x in pilot.response), rest)):
            scores = self._prolonged(scores.double())
            spread.add(scores)
            of_run.update({(i, k): scores[:, :, i].cpu() for i, k in runs if k == s})
        return Followed(spread, list(runs), torch.stack([of_run[run] for run in runs]))

    def _corrected(self, pilot: Pilot, response: Followed, real: Tensor) -> Tensor:
        """Return the scores that all real runs support, and keep their error bars.

        Args:
            real: ``[K, E, J]``, test losses of the runs of ``response``.
        """
        mean, count = response.spread.mean, len(self.left_out)
        instance, seed = torch.tensor(response.runs).T
        average = mean.cpu()[:, :, instance].permute(2, 0, 1)
        correction = correct(self.ft.steps, real, response.predicted, average, instance, seed, count)
        self.validation = list(zip(correction.correlation.tolist(), correction.scale.tolist(), strict=True))
        scale = correction.scale[:, None, None]
        explained = scale * mean.cpu()
        self.bars = self._bars(pilot, response, explained, scale, correction)
        return (explained + correction.remainder).to(mean.device, self.dtype)

    def _bars(
        self, pilot: Pilot, response: Followed, explained: Tensor, scale: Tensor, correction: Correction
    ) -> ErrorBars:
        """Return the error bars.

        What the response misses is estimated from the pilot's instances as if none had been run (their
        remainders are not used), and is that for instances without a run; see :func:`after_runs` for others.
        """
        seeds, number = len(pilot.full), len(pilot.instances)
        by_seed = (seeds, number)
        changes = (pilot.real.unflatten(0, by_seed) - pilot.full[:, None]).permute(0, 2, 3, 1)
        own = response.predicted[: len(pilot.runs)].unflatten(0, by_seed).permute(0, 2, 3, 1)
        average = response.spread.mean.cpu()[..., pilot.instances]
        residual = changes - scale * average - correction.own_scale[:, None, None] * (own - average)
        missed = discrepancy(self.ft.steps, residual, explained, pilot.instances, pilot.weight)
        missed = after_runs(missed, correction.unexplained)
        raw, adjusted = (x.cpu() * scale.square() for x in response.spread.variances())
        return error_bars((raw, adjusted), missed, number, self.dtype)

    def following_cost(self, test: Instances) -> float:
        """Return about how many steps of a run the response's step along a seed costs.

        Its arithmetic is |batch|·rows·L, a run's |batch|·P. Measured on two CPU cores (an MLP of
        17,500 parameters, N = 927, L = 50 and 100).
        """
        outputs = self.final_model.outputs(test[:1])[0].numel()
        rows = min(self.max_rows, len(self.train) * outputs)
        share = rows**2 * len(self.left_out) / (len(self.train) * self.final_model.size)
        return 1.7 + 0.7 * share

    def _along_part(
        self, test: Instances, trajectories: Iterator[Trajectory], seeds: tuple[int, ...], points: int
    ) -> Iterator[Tensor]:
        """Yield the response ``[E', J, L]`` along a part of further training, and count its cost."""
        part = copy.copy(self)
        part.gradient_evaluations = 0
        part.further_training = self.ft.part(trajectories, seeds, points)
        yield from part.by_seed(test)
        self.gradient_evaluations += part.gradient_evaluations

    def _named(self, runs: Sequence[tuple[int, int]]) -> list[tuple[int | None, int]]:
        """Return runs as training instances and seeds."""
        return [(int(self.left_out[i]), self.ft.seeds[s]) for i, s in runs]

    def _prolonged(self, found: Tensor) -> Tensor:
        """Return ``[E, ...]`` for the first evaluation points ``[E', ...]``: the mean over their last tenth.

        What is the seeds' noise at one point is none at later ones.
        """
        points, last = len(self.ft.steps), len(found)
        if last == points:
            return found
        late = sum(step >= 0.9 * self.ft.steps[last - 1] for step in self.ft.steps[:last])
        return torch.cat([found, found[last - late :].mean(0).expand(points - last, *found.shape[1:])])


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
