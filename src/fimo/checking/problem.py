"""What is checked, and how much of it fits into the time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.pace import Pace
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica, Unit
from fimo.further_training.resolution import some
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel

MOST_TESTS = 16
"""Test instances on which effects are measured, evenly spaced."""

MOST_LEFT_OUT = 8
"""Instances that short runs leave out: some of those in a seed's first batch, so that a few steps show it."""

CPU = torch.device("cpu")

MEMORY = 2 * 2**30
"""Bytes of parameters, gradients and wide copies of runs made together."""


@dataclass(frozen=True)
class Problem:
    """A final model with its data and protocol.

    Args:
        seeds: S of them.
        units: what the gold standard leaves out.
        methods: by name, to be timed.
        subtract_mean: as the sensitivity is adjusted.
        device: of the runs.
    """

    final_model: FinalModel
    train: Instances
    test: Instances
    protocol: Protocol
    seeds: Sequence[int]
    units: Sequence[Unit]
    methods: Mapping[str, AttributionMethod] = field(default_factory=dict)
    subtract_mean: bool = True
    device: torch.device = CPU

    @property
    def total_steps(self) -> int:
        return self.protocol.total_steps(len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        return self.protocol.batches_per_epoch(len(self.train))

    @property
    def few_tests(self) -> Instances:
        return some(self.test, MOST_TESTS)

    @cached_property
    def setting(self) -> Setting:
        """The engine's setting of the protocol, with a few test instances."""
        return Setting.build(self.final_model, self.train, self.few_tests, self.protocol, self.device)

    @cached_property
    def wide(self) -> Setting:
        """The same with runs and losses in float64."""
        return Setting.build(
            self.final_model, self.train, self.few_tests, self.protocol.in_float64(), self.device
        )

    def affordable(
        self, pace: Pace, seconds: float, most: int, runs: int = 1, steps: float = 2
    ) -> list[Unit]:
        """Return 2 to ``most`` early units: as many as a step without each, and its evaluation, fit.

        Args:
            runs: for each unit.
            steps: that a run's step and evaluation cost, in those of the protocol (float64 takes about two).
        """
        fit = int(seconds / (runs * steps * (pace.step + pace.evaluation))) - 1
        return self.early(max(2, min(most, fit)), runs)

    def early(self, most: int = MOST_LEFT_OUT, runs: int = 1) -> list[Unit]:
        """Return single instances of the first seed's first batch (evenly spaced in it).

        Args:
            most: at most so many, and at most as many as fit into ``MEMORY`` with ``runs`` of each.
        """
        most = max(1, min(most, int(MEMORY / (3 * 8 * self.final_model.size * runs))))
        first = torch.Generator().manual_seed(self.seeds[0])
        size = min(self.protocol.batch_size, len(self.train) - 1)
        batch = torch.randperm(len(self.train), generator=first)[:size].tolist()
        count = min(most, size)
        return [(batch[k * size // count],) for k in range(count)]


@dataclass(frozen=True)
class Clock:
    """The time that a part may take.

    Args:
        until: of ``time.monotonic``.
    """

    until: float

    @classmethod
    def of(cls, seconds: float) -> Clock:
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


def effects(
    setting: Setting, seed: int, units: Sequence[Unit], steps: int, clock: Clock
) -> tuple[Tensor, int]:
    """Return raw changes ``[J, L]`` (float64) by real runs, and the optimizer steps that were taken.

    Args:
        steps: at most so many.
    """
    chunks = [Chunk(setting, [Replica(seed)]), Chunk(setting, [Replica(seed, unit) for unit in units])]
    steps = min(steps, aligned_steps(setting, steps))
    while chunks[1].step < steps and (clock.left > 0 or not chunks[1].step):
        for chunk in chunks:
            chunk.advance(chunk.step + 1)
    return changes(chunks[0], chunks[1]), chunks[1].step


def changes(full: Chunk, leaving_out: Chunk) -> Tensor:
    """Return the raw changes ``[J, L]`` at the chunks' present steps."""
    return (leaving_out.evaluate()[0] - full.evaluate()[0]).T


def aligned_steps(setting: Setting, steps: int) -> int:
    """Return after how many steps runs can be compared: all, but where leaving out shortens an epoch."""
    if not setting.rule.shortens_epochs(setting.protocol):
        return steps
    return min(steps, max(1, setting.protocol.batches_per_epoch(setting.rule.kept(1))))


def steps_within(pace: Pace, replicas: int, seconds: float, most: int, workers: int = 1) -> int:
    """Return how many optimizer steps of so many replicas fit into the time: at least one."""
    return max(1, min(most, int(seconds / max(1e-9, replicas * pace.step * workers))))


def cosine(left: Tensor, right: Tensor) -> float:
    """Return the cosine of two tensors as vectors; NaN where one is zero."""
    left, right = left.double().flatten(), right.double().flatten()
    return float(left @ right / (left.norm() * right.norm()))
