"""A sketch of the response: mirrored runs of the test instances that differ most, impulses for the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.engine.leave_out import make_rule
from fimo.errors import InputError
from fimo.linear_response.impulses import Impulses, impulses
from fimo.linear_response.path_points import spread
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.error_bars import NO_BARS
from fimo.methods.following import FollowingMethod, Tally
from fimo.methods.mirrored import Mirrored
from fimo.scores import Scores

log = logging.getLogger(__name__)

ONE_GRADIENT = 4.0
"""Cost of a gradient by itself, in gradients of an instance within a batch."""

MIRRORED_RUN = 1.1
"""Cost of a mirrored run, in full runs: its batches have one instance more, of its own."""

RIDGE = 0.1
"""Of the regression on chosen test instances, in units of their mean squared gradient."""


@dataclass(frozen=True)
class Plan:
    """What a budget buys.

    Args:
        tests: test instances that get runs.
        seeds: with each of which they do.
    """

    tests: int
    seeds: int


class Sketched(FollowingMethod):
    """Mirrored runs for as many test instances as a budget allows, impulses and likeness for the others.

    1. Impulses are the first order of further training along one full run
       (:func:`fimo.linear_response.impulses.impulses`): they leave out the curvature that transports them.
    2. Test instances are chosen one after another, each the one whose gradient differs most from combinations
       of those before it (Cholesky factorisation with pivoting of the gradients' cosines). Their scores are
       mirrored ones, m_j (:class:`~fimo.methods.mirrored.Mirrored`, ``direction: up``).
    3. The others' are impulse_j + sum_c W_jc (m_c - impulse_c), W the ridge regression of their gradients on
       those of the chosen c: what curvature does to loss changes is linear in a test instance's gradient.

    With runs for all test instances scores are mirrored ones, and what the budget has left buys more seeds;
    without any they are impulses.

    Args:
        budget: of everything as a share of what the gold standard takes, in steps of a run. Where that is
            little, a full run and the impulses' gradients alone may exceed it.
        segments: most points of the run, besides its start, at which gradients are taken.
        memory_mb: of gradients held at once.
    """

    needs = "the protocol of further training"
    cost = "a fifth of the gold standard (budget)"
    use = "deep networks: real runs for as many test instances as can be paid"

    def __init__(self, budget: float = 0.2, segments: int = 4, memory_mb: float = 1024) -> None:
        if not 0 <= budget <= 1:
            raise InputError("budget", f"expected a share of 0 to 1 but got {budget}")
        for key, value in (("segments", segments), ("memory_mb", memory_mb)):
            if value < 1:
                raise InputError(key, f"expected at least 1 but got {value}")
        self.budget, self.segments, self.memory_mb = budget, segments, memory_mb
        self.mirrored = Mirrored("up")

    def scores(self, problem: AttributionProblem) -> Scores:
        tally, count, plan = Tally(), len(problem.test), self.plan(problem)
        if plan.tests == count:
            values, what = self._mirrored(problem, plan.seeds, tally), "mirrored runs of all test instances"
        else:
            first = self._impulses(problem, tally)
            chosen = pivots(first.likeness.mean(0), plan.tests)
            some = replace(problem, test=problem.test[chosen.to(problem.test.targets.device)])
            measured = self._mirrored(some, plan.seeds, tally) if len(chosen) else first.values[:, :0]
            values = corrected(first, chosen, measured.to(first.values))
            what = f"impulses, corrected by mirrored runs of {plan.tests} of {count} test instances"
        copies = make_rule(problem.followed.protocol, problem.train).multiplicity(problem.index)
        note = f"{what} with {plan.seeds} seed{'s' * (plan.seeds > 1)}"
        log.info("sketched: %s", note)
        return self.with_bars(problem, values * copies.to(values), NO_BARS, tally, note)

    def plan(self, problem: AttributionProblem) -> Plan:
        """Return what the budget buys; no runs where another measurement than the loss is explained."""
        given, count = problem.followed, len(problem.test)
        units = self.budget * len(given.seeds) * (len(problem.index) + 1)  # in full runs
        if self.mirrored.inapplicable(problem.final_model, problem.train):
            return Plan(0, 1)
        seeds = min(len(given.seeds), int(units / MIRRORED_RUN / (count + 1)))
        if seeds:
            return Plan(count, seeds)
        points = len(spread(given.steps, self.segments))
        gradients = points * count + (points + 1) * len(problem.index)
        rest = units - 1 - ONE_GRADIENT * gradients / problem.run_gradients
        return Plan(max(0, min(count - 1, int(rest / MIRRORED_RUN) - 1)), 1)

    def _mirrored(self, problem: AttributionProblem, seeds: int, tally: Tally) -> Tensor:
        """Return mirrored scores ``[E, J, L]``, averaged over seeds."""
        each = (self.mirrored.of_seed(problem, seed, tally) for seed in problem.followed.seeds[:seeds])
        return torch.stack(list(each)).mean(0)

    def _impulses(self, problem: AttributionProblem, tally: Tally) -> Impulses:
        given = problem.followed
        tally.add(problem.run_gradients)
        found = impulses(
            problem.final_model, problem.train, problem.test, problem.removed, given,
            next(iter(given.full_runs())), self.segments, self.memory_mb,
        )  # fmt: skip
        tally.add(found.evaluations)
        return found


def pivots(likeness: Tensor, count: int) -> Tensor:
    """Return the positions of the vectors that differ most from combinations of those chosen before.

    Args:
        likeness: ``[J, J]``, inner products of vectors, whose lengths don't matter.
        count: how many are chosen.
    """
    size = likeness.diagonal().clamp(min=1e-300).sqrt()
    rest, chosen = likeness / size / size[:, None], list[int]()
    for _ in range(count):
        left = rest.diagonal().clone()
        left[chosen] = -torch.inf
        k = int(left.argmax())
        column = rest[:, k] / rest[k, k].clamp(min=1e-12).sqrt()
        rest = rest - column[:, None] * column
        chosen.append(k)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def corrected(first: Impulses, chosen: Tensor, measured: Tensor) -> Tensor:
    """Return impulses ``[E, J, L]`` with what runs of some test instances show that they lack.

    Args:
        chosen: ``[M]``, which of the J.
        measured: ``[E, M, L]``, their scores by runs.
    """
    if not len(chosen):
        return first.values
    within = first.likeness[:, chosen][:, :, chosen]
    ridge = RIDGE * within.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    eye = torch.eye(len(chosen)).to(within)
    weights = torch.linalg.solve(within + ridge[:, None, None] * eye, first.likeness[:, chosen])
    values: Tensor = first.values + weights.transpose(1, 2) @ (measured - first.values[:, chosen])
    values[:, chosen] = measured
    return values
