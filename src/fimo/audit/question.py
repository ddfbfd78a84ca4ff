"""What an audit is asked: a final model, all its training rows, and which test losses are explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.audit.cleaning import halves
from fimo.audit.explained import Explained, Shown, explained
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.engine.leave_out import LeaveOut, make_rule
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.models.measured import Measured
from fimo.models.quantities import MEASUREMENT, measuring
from fimo.store.description import Indescribable
from fimo.store.files import Store
from fimo.store.fingerprint import Problem


class Target(NamedTuple):
    """What rows have effects on: a mean of measured quantities.

    Args:
        of: positions among all test losses, which the explained predictions follow.
        sides: of which the top rows are verified: the signs of their effects.
    """

    name: str
    of: tuple[int, ...]
    sides: tuple[int, ...] = (1, -1)


@dataclass(frozen=True)
class Question:
    """Which training rows matter for what.

    Args:
        final_model, train, test: as :func:`fimo.validation.admission.admit` returns them.
        protocol: of the further training by which effects are defined.
        tests: positions of the test instances that are explained one by one, besides their mean loss.
        train_origin, test_origin: names of the rows.
        shown: ``[N]``, the rows' labels or target values as their owner wrote them; None: as the loss is
            given them.
        read: how predictions and rows are read.
        original: the training instances as the whole network takes them, where ``train`` is what enters its
            trained part: rows are the same, or nearly, by these.
        judged: two halves of the test instances choose rows too, for the proof of cleaning.
    """

    final_model: FinalModel
    train: Instances
    test: Instances
    protocol: Protocol
    tests: tuple[int, ...]
    train_origin: Origin
    test_origin: Origin
    shown: tuple[str | float, ...] | None = None
    read: Shown = field(default_factory=Shown)
    original: Instances | None = None
    judged: bool = False

    def __post_init__(self) -> None:
        _ = self.quantity, self.predictions  # refuse here, before any work

    @cached_property
    def quantity(self) -> Measured:
        """What effects are changes of; a test loss stands for it here, whichever it is."""
        return Measured.of(self.final_model)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """The M explained: the mean test loss, losses of tests, their predictions, halves' mean losses."""
        j, ids = len(self.test), self.test_origin.ids
        mean = [Target(self.quantity.mean, tuple(range(j)))]
        losses = [Target(ids[k], (k,)) for k in self.tests]
        shown = [Target(f"{ids[k]}: prediction", (j + m,), ()) for m, k in enumerate(self.tests)]
        harms = (-self.quantity.better,)
        halves = [Target(f"half {h}", tuple(half.tolist()), harms) for h, half in enumerate(self.halves)]
        return (*mean, *losses, *shown, *halves)

    @cached_property
    def predictions(self) -> tuple[Explained, ...]:
        """How each of the explained test instances is predicted."""
        return tuple(explained(self.final_model, self.test, self.tests, self.read)) if self.tests else ()

    @property
    def prediction_targets(self) -> range:
        """Which targets are predictions."""
        return range(1 + len(self.tests), 1 + 2 * len(self.tests))

    @property
    def halves(self) -> tuple[Tensor, ...]:
        """Positions of the test instances of the halves that choose rows; none where they don't."""
        return halves(len(self.test)) if self.judged else ()

    @cached_property
    def measured(self) -> tuple[FinalModel, Instances]:
        """A final model and instances that measure all test losses, and then the explained predictions."""
        return self.measured_with()

    def measured_with(self, *more: Instances) -> tuple[FinalModel, Instances]:
        """Return the same with further instances behind, whose losses are measured."""
        parts: list[tuple[Instances, int | Sequence[int]]] = [(self.test, MEASUREMENT)]
        if self.tests:
            named = self.test[torch.tensor(self.tests, device=self.test.targets.device)]
            parts.append((named, [number.which for number in self.predictions]))
        return measuring(self.final_model, [*parts, *((part, MEASUREMENT) for part in more)])

    @cached_property
    def weight(self) -> Tensor:
        """``[M, J + T]`` float64, of each measured quantity in each explained one."""
        rows = torch.zeros(len(self.targets), len(self.test) + len(self.tests), dtype=torch.float64)
        for row, target in zip(rows, self.targets, strict=True):
            row[list(target.of)] = 1 / len(target.of)
        return rows

    @property
    def at_end(self) -> Protocol:
        """The protocol with test losses at its end alone."""
        return replace(self.protocol, evaluate_every="end")

    @cached_property
    def rule(self) -> LeaveOut:
        """The protocol's leave-out rule."""
        return make_rule(self.protocol, self.train)

    @property
    def steps(self) -> int:
        """Optimizer steps of a full run."""
        return self.protocol.total_steps(len(self.train))


@dataclass(frozen=True)
class Settings:
    """How an audit goes about it.

    Args:
        top: rows of interest on each side of each target; half as many more are verified.
        q: false discovery rate at which verdicts shall hold.
        verify: leave rows out by real further training; else only scores are computed.
        minutes: after which no further round of seeds, and no further stage, is begun; None for no limit.
        seeds: most seeds with which a row is left out; the screen follows as many others.
        controls: random rows that are left out besides; twice ``top`` when None.
        certain_labels: whoever knows a row's inputs knows its label; see
            :func:`~fimo.audit.suspects.suspects`.
        act: leave out groups of rows too, and the rows of named predictions together, and prove what cleaning
            is worth.

    Raises:
        InputError: naming the key under ``audit`` at fault.
    """

    top: int = 20
    q: float = 0.1
    verify: bool = True
    minutes: float | None = None
    seeds: int = 10
    controls: int | None = None
    certain_labels: bool = False
    act: bool = True

    def __post_init__(self) -> None:
        for key, least in (("top", 1), ("seeds", 2), ("controls", 8)):
            value = getattr(self, key)
            if value is None and key == "controls":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"audit.{key}", f"expected a whole number from {least} on but got {value!r}")
        for key in ("verify", "certain_labels", "act"):
            if not isinstance(getattr(self, key), bool):
                raise InputError(f"audit.{key}", f"expected true or false but got {getattr(self, key)!r}")
        if not isinstance(self.q, float | int) or not 0 < self.q < 1:
            raise InputError("audit.q", f"expected a rate in (0, 1) but got {self.q!r}")
        number = isinstance(self.minutes, float | int) and not isinstance(self.minutes, bool)
        if self.minutes is not None and not (number and self.minutes > 0):
            raise InputError("audit.minutes", f"expected more than 0, or null, but got {self.minutes!r}")

    def fitting(self, instances: int) -> None:
        """Refuse more rows on a side than there are.

        Raises:
            InputError: ``audit.top``.
        """
        if self.top > instances:
            problem = f"expected at most {instances}, the number of training rows, but got {self.top}"
            raise InputError("audit.top", problem)


@dataclass(frozen=True)
class Resources:
    """Where an audit computes, and what it keeps.

    Args:
        store: of runs and scores; nothing is kept when None.
        device: of the screen.
        trainer: arguments of the Lightning Trainer, for real runs.
        problem: the description of final model and training rows, where it is known already.
    """

    store: Store | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trainer: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | Indescribable | None = None

    def described(self, final_model: FinalModel, train: Instances) -> Problem:
        """Return the description of a final model that measures what it is asked to.

        Raises:
            Indescribable: a part has none.
        """
        if isinstance(self.problem, Indescribable):
            raise self.problem
        known = self.problem
        return Problem.of(final_model, train) if known is None else known.measuring(final_model)


def positions(names: Sequence[Any] | str | int, origin: Origin, key: str) -> tuple[int, ...]:
    """Return the positions of instances that are named by identifier or row; a single name is a list of one.

    Raises:
        InputError: with ``key``: there is none of that name, or one is named twice.
    """
    names = [names] if isinstance(names, str | int) else names
    found = [origin.position(name, key) for name in names]
    for k, position in enumerate(found):
        if position in found[:k]:
            raise InputError(key, f"{names[k]!r} is named twice")
    return tuple(found)


def origin_of(names: Origin | Sequence[Any] | None, source: Any, count: int, key: str) -> Origin:
    """Return the origin of instances by the names given, else by a DataFrame's index, else by position.

    Args:
        source: what the instances come from.
        count: how many there are.
        key: of ``names``, for errors.

    Raises:
        InputError: several instances have the same name, or there are more or fewer names.
    """
    frame = source[0] if isinstance(source, tuple) and len(source) == 2 else source
    if names is None and isinstance(frame, pd.DataFrame) and not isinstance(frame.index, pd.RangeIndex):
        names = frame.index.tolist()
    if names is None:
        return Origin.counted(count)
    if len(names) != count:
        raise InputError(key, f"expected {count} names but got {len(names)}")
    if isinstance(names, Origin):
        return names
    try:
        return Origin(np.arange(count, dtype=np.int64), tuple(map(str, names)))
    except InputError as error:
        raise InputError(key, error.problem) from None
