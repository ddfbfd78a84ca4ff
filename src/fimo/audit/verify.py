"""Verification: real further training without the rows that the screen points at, and without random ones."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.audit.question import Question, Resources, Settings
from fimo.audit.screen import Screened
from fimo.audit.verdicts import (
    HOPELESS,
    Estimates,
    chance_of_decision,
    estimated,
    false_discovery_rates,
    looks,
)
from fimo.data.instances import Instances
from fimo.further_training.gold_standard import further_train
from fimo.further_training.sensitivity import check_finite
from fimo.models.final_model import FinalModel
from fimo.store.fingerprint import Problem
from fimo.validation.choices import spaced

log = logging.getLogger(__name__)

OTHERS = 0.1
"""Weight in a target's tests of rows that were left out for another reason, its own being 1."""

TESTS = 200
"""Test instances whose changes are kept one by one."""

WIDER = 1.5
"""Of the number of rows of interest on a side, how many are verified: the true ones may be a little lower."""

LATER_CONTROLS = 16
"""Random rows that take part in all rounds where the common change is taken from them."""

FEWEST_CONTROLS = 8
"""Below it all rows left out stand for random ones."""


@dataclass(frozen=True)
class Chosen:
    """Rows to be left out.

    Args:
        rows: ``[V]`` int64, positions, ascending.
        control: ``[V]``, drawn at random.
        own: ``[M, V]``, at a target's top.
    """

    rows: Tensor
    control: Tensor
    own: Tensor


def choose(
    score: Tensor,
    top: int,
    controls: int,
    generator: torch.Generator,
    sides: Sequence[Sequence[int]] | None = None,
) -> Chosen:
    """Choose the top rows of the sides of each target, and random ones of the rest.

    Args:
        score: ``[M, N]``.
        sides: of each target, 1 for the largest scores and -1 for the smallest; both when None.
    """
    n = score.shape[1]
    own = torch.zeros(len(score), n, dtype=torch.bool)
    for m, of_target in enumerate(score):
        order, of_interest = of_target.argsort(stable=True), (1, -1) if sides is None else sides[m]
        if -1 in of_interest:
            own[m, order[:top]] = True
        if 1 in of_interest:
            own[m, order[-top:]] = True
    rest = (~own.any(0)).nonzero().flatten()
    control = torch.zeros(n, dtype=torch.bool)
    control[rest[torch.randperm(len(rest), generator=generator)[:controls]]] = True
    rows = (own.any(0) | control).nonzero().flatten()
    return Chosen(rows, control[rows], own[:, rows])


@dataclass(frozen=True)
class Verified:
    """What real runs without single rows changed, and what follows.

    Args:
        chosen: the V rows.
        seeds: S, of the runs.
        change: ``[S, M, V]`` float64, of the targets, NaN where a row was not left out with a seed; minus
            the common change, see :func:`verify`. Predictions are in the target's own units.
        by_test: ``[S, J', V]`` float32, of the losses of at most :data:`TESTS` test instances, as measured.
        of_themselves: ``[S, V]``, the same of each row's own loss.
        estimates: of each target.
        p: ``[M, V]``, valid for any number of looks.
        q: ``[M, V]``, the smallest false discovery rate at which the sign of an effect is known.
        seconds: of the real runs.
    """

    chosen: Chosen
    seeds: tuple[int, ...]
    change: Tensor
    by_test: Tensor
    of_themselves: Tensor
    estimates: tuple[Estimates, ...]
    p: Tensor
    q: Tensor
    seconds: float

    @property
    def rows(self) -> Tensor:
        """``[V]``, positions of the rows."""
        return self.chosen.rows

    @property
    def reference(self) -> Tensor:
        """``[V]``, the rows that stand for random ones."""
        return _reference(self.chosen)

    @property
    def own_effect(self) -> Estimates:
        """Of each row's own loss."""
        return estimated(self.of_themselves)

    def decided(self, q: float) -> Tensor:
        """Return ``[M, V]``, whether the sign of an effect is known at a false discovery rate."""
        return self.q <= q


def verify(question: Question, screened: Screened, settings: Settings, resources: Resources) -> Verified:
    """Leave out the rows that matter most by the screen, and random ones, until their verdicts hold.

    Runs are made in rounds of seeds. All rows take part in the first; a row takes part in the next one while
    it is undecided for a target that it was chosen for and its decision still is to be hoped for. A few
    controls take part in further rounds where the common change is taken from them.

    **Effects.** Under ``shift`` every run without a row sees other batches than the full run after the place
    of that row, whichever it is. This common change of a seed is taken from the random rows: the intercept of
    their changes on their scores, that is what leaving out a row without any effect changes. (The sensitivity
    of :func:`fimo.further_train` with ``subtract_mean`` is relative to the average left-out row instead; the
    two differ by a constant, the average effect.) Under the other rules there is nothing to subtract.

    Args:
        screened: the scores of all rows, from other seeds.
    """
    count = settings.controls or 2 * settings.top
    sides = [target.sides for target in question.targets]
    verified = math.ceil(WIDER * settings.top)
    chosen = choose(screened.score, verified, count, torch.Generator().manual_seed(0), sides)
    runs = _Runs.none(question, chosen, settings.seeds, resources)
    rounds, needs_controls = looks(settings.seeds), not question.rule.shares_batches
    reference = _reference(chosen)
    score = screened.score[:, chosen.rows]
    taking_part, done, began = torch.ones(len(chosen.rows), dtype=torch.bool), 0, time.monotonic()
    for until in rounds:
        if done and _too_late(settings, began, int(taking_part.sum()) * (until - done), runs):
            break
        runs.leave_out(taking_part, range(done, until))
        done = until
        change, shared = (
            without_common(runs.change[:done], score, reference)
            if needs_controls
            else (runs.change[:done], torch.zeros(len(score)))
        )
        estimates = tuple(estimated(c, float(s)) for c, s in zip(change.unbind(1), shared, strict=True))
        # of all seeds that a row has by now: what is said of it fits its effect and error as they are shown
        p = (torch.stack([found.p for found in estimates]) * len(rounds)).clamp(max=1)
        weight = OTHERS + (1 - OTHERS) * chosen.own.double()
        q = torch.stack([false_discovery_rates(*pair) for pair in zip(p, weight, strict=True)])
        undecided = _open(chosen, estimates, q, settings, len(rounds))
        log.info(
            "%d seeds: the sign of %d of %d effects is known, %d rows may need more",
            done, int((chosen.own & (q <= settings.q)).sum()), int(chosen.own.sum()), int(undecided.sum()),
        )  # fmt: skip
        if not undecided.any():
            break
        taking_part = undecided | (_few(reference) & needs_controls)
    return Verified(
        chosen, tuple(range(done)), change, runs.by_test[:done],
        runs.of_themselves(done, reference, needs_controls), estimates, p, q, time.monotonic() - began,
    )  # fmt: skip


@dataclass
class _Runs:
    """Changes of all losses by the runs made so far.

    Args:
        final_model, measured: what the question measures, then the losses of the V rows themselves.
        change: ``[S, M, V]``, of the targets; NaN where no run was made.
        by_test: ``[S, J', V]``, of some test losses.
        own: ``[S, V, V]``, of the rows' own losses by leaving out each row.
        seconds, made: of how many runs.
    """

    question: Question
    chosen: Chosen
    resources: Resources
    final_model: FinalModel
    measured: Instances
    change: Tensor
    by_test: Tensor
    own: Tensor
    seconds: float = 0.0
    made: int = 0

    @classmethod
    def none(cls, question: Question, chosen: Chosen, seeds: int, resources: Resources) -> _Runs:
        v = len(chosen.rows)
        final_model, measured = question.measured_with(question.train[chosen.rows])
        change = torch.full((seeds, len(question.targets), v), torch.nan, dtype=torch.float64)
        by_test = torch.full((seeds, len(_some(question)), v), torch.nan, dtype=torch.float32)
        own = torch.full((seeds, v, v), torch.nan, dtype=torch.float64)
        return cls(question, chosen, resources, final_model, measured, change, by_test, own)

    def leave_out(self, which: Tensor, seeds: Sequence[int]) -> None:
        """Make the runs without some of the rows ``[V]``."""
        question, resources, began = self.question, self.resources, time.monotonic()
        index = which.nonzero().flatten()
        problem = resources.problem
        known = problem.measuring(self.final_model) if isinstance(problem, Problem) else None
        found = further_train(
            self.final_model, question.train, self.measured, question.at_end, seeds,
            self.chosen.rows[index].tolist(), store=resources.store, trainer=resources.trainer,
            problem=known, keep_states=False,
        )  # fmt: skip
        check_finite(found.raw)
        assert found.full_losses is not None
        raw, full = found.raw[:, -1].double(), found.full_losses[:, -1]
        count, rows = question.weight.shape[1], slice(seeds[0], seeds[-1] + 1)
        self.change[rows, :, index] = torch.einsum("mj,sjv->smv", question.weight, raw[:, :count])
        for m, number in zip(question.prediction_targets, question.predictions, strict=True):
            at = question.targets[m].of[0]
            before, after = (
                number.read(v, question.read) for v in (full[:, at, None], full[:, at, None] + raw[:, at])
            )
            self.change[rows, m, index] = after - before
        self.by_test[rows, :, index] = raw[:, _some(question)].float()
        self.own[rows, :, index] = raw[:, count:]
        self.seconds += time.monotonic() - began
        self.made += len(seeds) * len(index)

    def of_themselves(self, seeds: int, reference: Tensor, common: bool) -> Tensor:
        """Return changes ``[S, V]`` of each row's own loss by its own absence, minus the common change."""
        own = self.own[:seeds]
        found = own.diagonal(dim1=1, dim2=2).clone()
        if common:
            itself = torch.eye(own.shape[1], dtype=torch.bool)
            found -= own.masked_fill(itself, torch.nan)[:, :, reference].nanmean(2)
        return found


def _some(question: Question) -> list[int]:
    """Return evenly spaced test instances."""
    return spaced(min(TESTS, len(question.test)), len(question.test))


def without_common(change: Tensor, score: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return changes minus each seed's common one ``[S, M, V]``, and its error that seeds share ``[M]``.

    The common change is the intercept of a line through random rows' changes by their scores; its error, a
    variance, is what true effects miss of the line, over the number of those rows.

    Args:
        change: ``[S, M, V]``, NaN where no run was made.
        score: ``[M, V]``.
        reference: ``[V]``, the random rows; all have runs of the first seeds, some of all.
    """
    y, x = change[:, :, reference], score[:, reference]
    there = ~y.isnan()
    # within each seed, since the common change differs between them
    dx = torch.where(there, x, torch.nan)
    dx = torch.where(there, dx - dx.nanmean(2, keepdim=True), 0.0)
    slope = (y.nan_to_num() * dx).sum((0, 2)) / dx.square().sum((0, 2)).clamp(min=1e-300)
    common = (y - slope[:, None] * x).nanmean(2)
    residual = y - common[:, :, None] - slope[:, None] * x
    seeds, rows = there.sum(0), x.shape[1]
    mean = residual.nanmean(0)
    missed = mean.square().sum(1) / max(1, rows - 2)
    squares = torch.where(there, (residual - mean).square(), 0.0).sum(0)
    noise = (squares / (seeds - 1).clamp(min=1) / seeds).mean(1)
    return change - common[:, :, None], (missed - noise).clamp(min=0) / there.sum(2).min()


def _reference(chosen: Chosen) -> Tensor:
    """Return which rows stand for random ones."""
    enough = int(chosen.control.sum()) >= FEWEST_CONTROLS
    return chosen.control if enough else torch.ones_like(chosen.control)


def _few(reference: Tensor) -> Tensor:
    """Return evenly spaced ones of the random rows, which are as random."""
    rows = reference.nonzero().flatten()
    found = torch.zeros_like(reference)
    found[rows[spaced(min(LATER_CONTROLS, len(rows)), len(rows))]] = True
    return found


def _too_late(settings: Settings, began: float, runs: int, so_far: _Runs) -> bool:
    """Return whether so many more runs would end after the time is over."""
    if settings.minutes is None:
        return False
    expected = time.monotonic() - began + so_far.seconds / so_far.made * runs
    if expected > 60 * settings.minutes:
        log.info("no further seeds: they would take longer than audit.minutes=%g", settings.minutes)
        return True
    return False


def _open(
    chosen: Chosen, estimates: Sequence[Estimates], q: Tensor, settings: Settings, rounds: int
) -> Tensor:
    """Return ``[V]``, whether a row needs more seeds, and is likely enough to be decided by them."""
    found = torch.zeros(len(chosen.rows), dtype=torch.bool)
    for own, estimate, rate in zip(chosen.own, estimates, q, strict=True):
        count = int((own & (rate <= settings.q)).sum())
        # what another discovery would need, as things are
        level = settings.q * (count + 1) / max(1, int(own.sum())) / rounds
        chance = chance_of_decision(estimate, settings.seeds, torch.full_like(rate, min(1.0, level)))
        found |= own & (rate > settings.q) & (chance > HOPELESS)
    return found
