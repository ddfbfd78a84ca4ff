"""The story of a check: one part after another, each with its share of a minute."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fimo.checking import durations, model_checks, run_checks
from fimo.checking.constant import constant
from fimo.checking.loss_checks import NAME, losses
from fimo.checking.problem import Clock, Problem
from fimo.checking.verdict import Check, Line, Verdict, fails, warns
from fimo.data.instances import Instances
from fimo.engine.pace import Pace
from fimo.engine.protocol import Protocol
from fimo.errors import InputError, reason
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.models.state import one_call
from fimo.validation import choices

SHARES = {
    "constant predictor": 0.04, "gradients": 0.07, "parameters": 0.04, "time: gold standard": 0.05,
    "sign": 0.08, "determinism": 0.12, "rounding": 0.1, "linearity": 0.1, "seeds": 0.12,
}  # fmt: skip
"""Of the time, by part; what a part leaves over, and the rest, go to timing the methods."""


@one_call()
def check(
    final_model: FinalModel,
    train: Any,
    test: Any,
    protocol: Protocol,
    seeds: int | Sequence[int] = 10,
    left_out: int | Sequence[int | Sequence[int]] = 50,
    *,
    methods: Mapping[str, AttributionMethod] | None = None,
    subtract_mean: bool = True,
    device: torch.device | str = "cpu",
    seconds: float = 45.0,
) -> Check:
    """Check in about a minute whether what will be measured can be trusted, and how long it will take.

    Nothing of the model is changed, nothing is stored, and every part is tried on what fits into its time:
    its line says how much that was. A part that raises is a line that fails, with the reason.

    Args:
        final_model, train, test, protocol, seeds, left_out: as for
            :func:`fimo.further_train`; numbers mean seeds from 0, and evenly
            spaced training instances.
        methods: by name, to be timed on a part of the problem.
        subtract_mean: as the sensitivity is to be adjusted.
        seconds: of all parts together; a single step or gradient is not interrupted.

    Returns:
        The lines: the loss per instance, a constant predictor, gradients, the parameters that move, the sign,
        determinism, rounding, linearity, the seeds needed, and times.

    Raises:
        InputError: no protocol, or seeds, left-out instances or a device that there are not.
    """
    if not isinstance(protocol, Protocol):
        raise InputError("protocol", f"expected a fimo.Protocol but got {protocol!r}")
    where = choices.device(device)
    began = time.monotonic()
    with _quiet():
        first, train, test = _admitted(final_model, train, test)
        if first.verdict == Verdict.FAIL:
            rest = warns("the rest", "was not tried: every other part takes the loss to be right")
            return Check((first, rest), time.monotonic() - began)
        problem = Problem(
            final_model.to(where),
            train.to(where),
            test.to(where),
            protocol,
            choices.seeds(seeds),
            choices.units(min(left_out, len(train)) if isinstance(left_out, int) else left_out, len(train)),
            dict(methods or {}),
            subtract_mean,
            where,
        )
        lines = (first, *_lines(problem, seconds - (time.monotonic() - began)))
    return Check(lines, time.monotonic() - began)


def _admitted(final_model: FinalModel, train: Any, test: Any) -> tuple[Line, Instances, Instances]:
    try:
        return losses(final_model, train, test)
    except Exception as error:  # whatever a user's model raises
        return fails(NAME, reason(error)), train, test


def _lines(problem: Problem, seconds: float) -> Iterator[Line]:
    whole = Clock.of(seconds)

    def tried(name: str, part: Callable[[Clock], Line]) -> Line:
        return _tried(name, lambda: part(Clock.of(min(SHARES[name] * seconds, max(0.0, whole.left)))))

    yield tried("constant predictor", lambda clock: constant(problem, clock))
    yield tried("gradients", lambda clock: model_checks.gradients(problem, clock))
    yield tried("parameters", lambda clock: model_checks.parameters(problem, clock))

    pace, gold = Pace(1.0, 1.0), float("inf")

    def measure(clock: Clock) -> Line:
        nonlocal pace, gold
        line, pace, gold = durations.gold_standard(problem, clock.left)
        return line

    timed = tried("time: gold standard", measure)
    yield tried("sign", lambda clock: run_checks.sign(problem, pace, clock))
    yield tried("determinism", lambda clock: run_checks.determinism(problem, pace, clock))
    yield tried("rounding", lambda clock: run_checks.rounding(problem, pace, clock))
    yield tried("linearity", lambda clock: run_checks.linearity(problem, pace, clock))
    yield tried("seeds", lambda clock: run_checks.reliability(problem, pace, clock))
    yield timed
    yield from durations.methods(problem, pace, gold, Clock.of(max(0.0, whole.left)))


def _tried(name: str, part: Callable[[], Line]) -> Line:
    """Return a part's line; where it raises, one that fails with the reason."""
    try:
        return part()
    except Exception as error:  # whatever a user's model raises
        return fails(name, reason(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's own notices out of the table: what they say is in its lines."""
    package = logging.getLogger("fimo")
    level = package.level
    package.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        package.setLevel(level)
