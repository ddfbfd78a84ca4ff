"""The response, corrected by a few real leave-one-out runs."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.dynamics.real_runs import run_without, worthwhile
from fimo.dynamics.remainder import OWN, correct, correlations
from fimo.errors import InputError
from fimo.further_training.trajectory import Trajectory
from fimo.methods.response import Response

log = logging.getLogger(__name__)

PILOT = 0.15
"""Of the budget: first runs, which show how far the response can be trusted."""

FEWEST = 8
"""Runs, or left-out instances, with fewer of which there is nothing to correct by."""


class CalibratedResponse(Response):
    """The linear response as far as it can be trusted, corrected by as many real runs as a budget allows.

    1. The response is followed along two seeds. Real runs of these without the instances whose effects it
       predicts to be largest show until when the two agree (``trust``).
    2. All seeds' response is followed until then. Later predictions are its last ones.
    3. What is left of the budget goes into more real runs, first where most is gained by one.

    The scores are a · response + z, fitted to the real runs around each evaluation point
    (:func:`fimo.dynamics.remainder.correct`): z is what changes slowly along a run, since what real runs
    differ by from one epoch to the next is noise that says nothing about an instance.

    Args:
        budget: of everything (full runs, the response, real runs) as a share of what the gold standard takes,
            in steps of a run. Full runs and a response that is trusted throughout may alone exceed it where
            few instances are left out; at 0 scores are the response's.
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
    ) -> None:
        super().__init__("path", propagate, segments, kernels, max_rows, memory_mb, form="kernel")
        for key, value in (("budget", budget), ("trust", trust)):
            if not 0 <= value <= 1:
                raise InputError(key, f"expected a share of 0 to 1 but got {value}")
        self.budget, self.trust = budget, trust
        self.validation: list[tuple[float, float]] | None = None
        self.trusted: int | None = None

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        self.gradient_evaluations, self.validation, self.trusted = 0, None, None
        seeds, count, points = self.ft.seeds, len(self.left_out), len(self.ft.steps)
        units = self.budget * len(seeds) * (count + 1)  # in runs
        if count < FEWEST or units < 2 * FEWEST:
            return super().scores(test, left_out)
        trajectories = self.ft.full_runs()
        some = seeds[:2]
        own = list(self._part(itertools.islice(trajectories, len(some)), some, points).by_seed(test))
        order = worthwhile(relative_size(torch.stack(own).mean(0)), len(seeds), OWN)
        largest = [i for i, s in order if s == 0][: max(FEWEST, round(PILOT * units)) // len(some)]
        pilot = [(i, s) for s in range(len(some)) for i in largest]
        real = self._real(test, pilot)
        predicted = torch.stack([own[s][:, :, i] for i, s in pilot]).cpu()
        agree = correlations(self.ft.steps, real, predicted, torch.tensor([s for _, s in pilot]))
        error = (1 - agree.square()) / (2 * (len(pilot) - len(some))) ** 0.5
        trusted = (agree + error >= self.trust).nonzero()
        points = self.trusted = int(trusted.max()) + 1 if len(trusted) else 1
        log.info(
            "calibrated: the response is followed to step %d of %d",
            self.ft.steps[points - 1],
            self.ft.steps[-1],
        )

        each = self.following_cost(test)
        followed = len(some) + (len(seeds) - len(some)) * self.ft.steps[points - 1] / self.ft.steps[-1]
        rest = units - len(seeds) - each * followed - len(pilot)
        done = set(pilot)
        more = [run for run in order if run not in done][: max(0, int(rest))]
        runs = pilot + more
        by_run: dict[int, Tensor] = {}

        def all_seeds() -> Iterator[Tensor]:
            others = self._part(trajectories, seeds[len(some) :], points)
            following = others.by_seed(test) if len(seeds) > len(some) else iter(())
            for s, found in enumerate(itertools.chain((f[:points] for f in own), following)):
                by_run.update({k: found[:, :, i].cpu() for k, (i, of) in enumerate(runs) if of == s})
                yield found

        mean = self._prolonged(self.average(all_seeds()).double())
        predicted = torch.stack([self._prolonged(by_run[k]) for k in range(len(runs))])
        if more:
            real = torch.cat([real, self._real(test, more)])
        which = torch.tensor(runs)
        average = mean.cpu()[:, :, which[:, 0]].permute(2, 0, 1)
        found = correct(self.ft.steps, real, predicted, average, which[:, 0], which[:, 1], count)
        self.validation = list(zip(found.correlation.tolist(), found.scale.tolist(), strict=True))
        scale, device = found.scale[:, None, None].to(mean.device), mean.device
        dtype = next(iter(self.final_model.parameters().values())).dtype
        if self.score_sem is not None:
            spread = self._prolonged(self.score_sem.double()) * scale
            self.score_sem = (spread.square() + found.variance.to(device)).sqrt().to(dtype)
        return (scale * mean + found.remainder.to(device)).to(dtype)

    def following_cost(self, test: Instances) -> float:
        """Return about how many steps of a run the response's step along a seed costs.

        Its arithmetic is |batch|·rows·L, a run's |batch|·P. Measured on two CPU cores (an MLP of
        17,500 parameters, N = 927, L = 50 and 100).
        """
        outputs = self.final_model.outputs(test[:1])[0].numel()
        rows = min(self.max_rows, len(self.train) * outputs)
        share = rows**2 * len(self.left_out) / (len(self.train) * self.final_model.size)
        return 1.7 + 0.7 * share

    def _part(self, trajectories: Iterator[Trajectory], seeds: tuple[int, ...], points: int) -> Response:
        """Return this response along a part of further training."""
        part = copy.copy(self)
        part.further_training = self.ft.part(trajectories, seeds, points)
        return part

    def _real(self, test: Instances, runs: list[tuple[int, int]]) -> Tensor:
        """Return the test losses ``[K, E, J]`` of real runs."""
        named = [(int(self.left_out[i]), self.ft.seeds[s]) for i, s in runs]
        batch = min(self.ft.protocol.batch_size, len(self.train))
        self.gradient_evaluations += len(runs) * self.ft.steps[-1] * batch
        return run_without(self.final_model, self.train, test, self.ft.protocol, named)

    def _prolonged(self, found: Tensor) -> Tensor:
        """Return ``[E, ...]`` for the first evaluation points ``[E', ...]``: the mean over their last tenth.

        What is the seeds' noise at one point is none at later ones.
        """
        points, last = len(self.ft.steps), len(found)
        if last == points:
            return found
        late = sum(step >= 0.9 * self.ft.steps[last - 1] for step in self.ft.steps[:last])
        return torch.cat([found, found[last - late :].mean(0).expand(points - last, *found.shape[1:])])


def relative_size(scores: Tensor) -> Tensor:
    """Return the mean squared effect ``[L]``, relative to each test instance's and evaluation point's."""
    effect = scores.double() - scores.double().mean(2, keepdim=True)
    return (effect.square() / effect.square().sum(2, keepdim=True).clamp(min=1e-300)).mean((0, 1)).cpu()
