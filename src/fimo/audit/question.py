"""What an audit is asked: a final model, all its training rows, and which test losses are explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.engine.leave_out import LeaveOut, make_rule
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.store.description import Indescribable
from fimo.store.files import Store
from fimo.store.fingerprint import Problem

MEAN = "mean test loss"
"""Name of the first target."""


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
    """

    final_model: FinalModel
    train: Instances
    test: Instances
    protocol: Protocol
    tests: tuple[int, ...]
    train_origin: Origin
    test_origin: Origin
    shown: tuple[str | float, ...] | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the M explained losses: the mean over all test instances, then single ones."""
        ids = self.test_origin.ids
        return (MEAN, *(ids[j] for j in self.tests))

    @cached_property
    def weight(self) -> Tensor:
        """``[M, J]`` float64, of each test loss in each explained one."""
        rows = torch.zeros(1 + len(self.tests), len(self.test), dtype=torch.float64)
        rows[0] = 1 / len(self.test)
        for m, j in enumerate(self.tests, 1):
            rows[m, j] = 1.0
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
        top: rows verified on each side of each target.
        q: false discovery rate at which verdicts shall hold.
        verify: leave rows out by real further training; else only scores are computed.
        minutes: after which no further round of seeds is begun; None for no limit.
        seeds: most seeds with which a row is left out; the screen follows as many others.
        controls: random rows that are left out besides; twice ``top`` when None.

    Raises:
        InputError: naming the key under ``audit`` at fault.
    """

    top: int = 20
    q: float = 0.1
    verify: bool = True
    minutes: float | None = None
    seeds: int = 10
    controls: int | None = None

    def __post_init__(self) -> None:
        for key, least in (("top", 1), ("seeds", 2), ("controls", 8)):
            value = getattr(self, key)
            if value is None and key == "controls":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"audit.{key}", f"expected a whole number from {least} on but got {value!r}")
        if not isinstance(self.q, float | int) or not 0 < self.q < 1:
            raise InputError("audit.q", f"expected a rate in (0, 1) but got {self.q!r}")
        if self.minutes is not None and not self.minutes > 0:
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

    def described(self, question: Question) -> Problem:
        """Return the description, made once per audit.

        Raises:
            Indescribable: a part has none.
        """
        if isinstance(self.problem, Indescribable):
            raise self.problem
        return self.problem or Problem.of(question.final_model, question.train)


def positions(names: Sequence[Any], origin: Origin, key: str) -> tuple[int, ...]:
    """Return the positions of instances that are named by identifier or row.

    Raises:
        InputError: with ``key``: there is none of that name, or one is named twice.
    """
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
