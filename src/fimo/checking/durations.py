"""How long the gold standard and each method will take here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.checking.problem import Clock, Problem
from fimo.checking.verdict import Line, passes, warns
from fimo.data.instances import Instances
from fimo.engine.context import chunk_size
from fimo.engine.pace import Pace, about, expected_seconds, measure_pace
from fimo.engine.protocol import Protocol
from fimo.further_training import evaluation_points, full_runs
from fimo.further_training.trajectory import FurtherTraining, Trajectory
from fimo.methods.base import AttributionMethod

LONG = 12 * 3600.0
"""Seconds of further training beyond which to think again."""

FIRST = 16
"""Training instances of the first part that methods are timed on."""


def gold_standard(problem: Problem, seconds: float) -> tuple[Line, Pace, float]:
    """Return the line of further training's time, the pace (of a few tests), and the seconds it will take."""
    setting = problem.setting
    runs = len(problem.seeds) * len(problem.units)
    size = chunk_size(setting, runs)
    pace = measure_pace(setting, min(size, runs), seconds)
    points = len(evaluation_points(problem.protocol, len(problem.train))[0])
    all_tests = replace(pace, evaluation=pace.evaluation * len(problem.test) / max(1, len(setting.test)))
    expected = expected_seconds(setting, all_tests, len(problem.seeds), len(problem.units), points, size)
    text = (
        f"{len(problem.seeds) * (len(problem.units) + 1):,} runs of {problem.total_steps:,} steps: "
        f"{about(expected)} ({1 / pace.step:,.0f} replica-steps a second, {size} runs together)"
    )
    line = (warns if expected > LONG else passes)("time: gold standard", text, expected)
    return line, pace, expected


@dataclass(frozen=True)
class Timing:
    """A method's seconds on a share of the training, test and left-out instances."""

    share: float
    seconds: float


def methods(problem: Problem, pace: Pace, gold: float, clock: Clock) -> list[Line]:
    """Time every method on parts of the problem that double, and extrapolate."""
    lines: list[Line] = []
    longest = 0.0
    for k, (name, method) in enumerate(problem.methods.items()):
        if clock.left < longest / 2:  # none is interrupted, so one that may not end in time is not begun
            rest = ", ".join(list(problem.methods)[k:])
            lines.append(passes("time: methods", f"no time was left to try {rest}"))
            break
        share, began = clock.left / (len(problem.methods) - k), time.monotonic()
        lines.append(method_line(problem, name, method, pace, gold, share))
        longest = max(longest, time.monotonic() - began)
    return lines


def method_line(
    problem: Problem, name: str, method: AttributionMethod, pace: Pace, gold: float, seconds: float
) -> Line:
    """Return the line of one method's time; its failure is a warning, since it says nothing of the others."""
    key = f"time: {name}"
    reason = method.why_not(problem.final_model, problem.train, problem.protocol)
    if reason is not None:
        return passes(key, f"does not apply: {reason}")
    seeds, runs = problem.seeds, 0.0
    if method.follows_further_training:
        runs = len(seeds) * problem.total_steps * pace.step
        first = Part.of(problem, FIRST / len(problem.train), seeds[:1])
        fit = int(seconds / 3 / (first.steps * pace.step))
        if not fit:
            return _line(key, runs, "at least: so long take full runs of its own, and it was not tried", gold)
        seeds = seeds[:fit]
    try:
        timings = timed(problem, method, seeds, seconds)
    except Exception as error:  # whatever it is, the line says so
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return warns(key, f"fails on a part of the problem: {text}")
    more = len(problem.seeds) / len(seeds)
    expected = max(runs, extrapolated(timings) * more)
    share = timings[-1].share
    of = "" if len(seeds) == len(problem.seeds) else f" for {len(seeds)} of {len(problem.seeds)} seeds"
    part = f"measured{of}" if share >= 1 else f"from {share:.2g} of the instances{of}"
    if len(timings) == 1 and share < 1:  # what is constant in it can't be told from what grows
        return passes(key, f"{about(expected)} at most ({part})", expected)
    return _line(key, expected, part, gold)


def _line(key: str, expected: float, basis: str, gold: float) -> Line:
    if expected > max(10.0, gold):
        return warns(key, f"{about(expected)} ({basis}), more than the gold standard", expected)
    return passes(key, f"{about(expected)} ({basis})", expected)


def timed(problem: Problem, method: AttributionMethod, seeds: Sequence[int], seconds: float) -> list[Timing]:
    """Time a method on doubling parts of the problem, until the next would take too long."""
    clock, found = Clock.of(seconds), list[Timing]()
    share = min(1.0, FIRST / len(problem.train))
    warm = False
    while True:
        part = Part.of(problem, share, seeds)
        began = time.monotonic()
        part.run(method)
        took = time.monotonic() - began
        if not warm and took < seconds / 6:  # the first call also sets libraries up
            warm = True
            continue
        warm = True
        found.append(Timing(share, took))
        if share >= 1 or clock.left < 4 * took:
            return found
        share = min(1.0, 2 * share)


@dataclass(frozen=True)
class Part:
    """Some of a problem's training, test and left-out instances, for as many epochs.

    Args:
        steps: of a full run, which a smaller training set has fewer of.
    """

    problem: Problem
    train: Instances
    test: Instances
    left_out: Tensor
    protocol: Protocol
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, share: float, seeds: Sequence[int]) -> Part:
        def count(total: int, least: int) -> int:
            return min(total, max(least, math.ceil(share * total)))

        n, protocol = count(len(problem.train), 8), problem.protocol
        if protocol.steps is not None:
            protocol = replace(protocol, steps=count(protocol.steps, 1))
        if isinstance(protocol.evaluate_every, int):
            protocol = replace(protocol, evaluate_every=count(protocol.evaluate_every, 1))
        dtype = next(iter(problem.final_model.parameters().values())).dtype
        return cls(
            problem,
            problem.train[:n].to(dtype=dtype),
            problem.test[: count(len(problem.test), 2)].to(dtype=dtype),
            torch.arange(min(n, count(len(problem.units), 2)), device=problem.device),
            protocol,
            tuple(seeds),
        )

    @property
    def steps(self) -> int:
        return self.protocol.total_steps(len(self.train))

    def run(self, method: AttributionMethod) -> None:
        model, given = self.problem.final_model, None
        if method.follows_further_training:
            points = tuple(map(int, evaluation_points(self.protocol, len(self.train))[0]))

            def runs() -> Iterator[Trajectory]:
                device = self.problem.device
                return full_runs(model, self.train, self.protocol, self.seeds, device=device)

            given = FurtherTraining(self.protocol, points, self.seeds, runs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method.attribute(model, self.train, self.test, self.left_out, given)


def extrapolated(timings: list[Timing]) -> float:
    """Return the seconds on the whole problem, growing as between the last two parts.

    Growth above linear goes on with the power seen (at most the third); at or below linear it goes on along
    the line through both, as of a constant and a linear part.
    """
    last = timings[-1]
    if last.share >= 1 or len(timings) == 1:
        return last.seconds / last.share
    before = timings[-2]
    power = 0.0
    if last.seconds > before.seconds > 0:
        power = math.log(last.seconds / before.seconds) / math.log(last.share / before.share)
    if power > 1:
        return float(last.seconds / last.share ** min(power, 3.0))
    slope = max(0.0, last.seconds - before.seconds) / (last.share - before.share)
    return last.seconds + slope * (1 - last.share)
