"""Further training as methods see it: the protocol, and the trajectories of the full runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.errors import InputError


@dataclass(frozen=True)
class Trajectory:
    """One seed's full run, at the final model and at every evaluation point.

    Args:
        seed: of the run.
        parameters: E + 1 dicts by name; the first is θ^f.
        second_moment: E + 1 dicts, Adam's bias-corrected second moment (the first is zero); None for SGD.
    """

    seed: int
    parameters: tuple[Mapping[str, Tensor], ...]
    second_moment: tuple[Mapping[str, Tensor], ...] | None = None

    def until(self, points: int) -> Trajectory:
        """Return the run up to and with its first so many evaluation points."""
        moments = None if self.second_moment is None else self.second_moment[: points + 1]
        return Trajectory(self.seed, self.parameters[: points + 1], moments)


@dataclass(frozen=True)
class FurtherTraining:
    """What a method that follows further training is handed.

    Args:
        protocol: optimizer, learning rate, batch size, leave-out rule.
        steps: optimizer steps of the full run at the E evaluation points, ascending.
        seeds: whose runs the gold standard averages.
        full_runs: runs the seeds' full runs (or reads them) and yields their trajectories, one at a time.
    """

    protocol: Protocol
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    full_runs: Callable[[], Iterator[Trajectory]]

    def refusing_divergence(self) -> FurtherTraining:
        """Return the same, whose full runs end in an InputError where one's last parameters aren't finite."""

        def finite() -> Iterator[Trajectory]:
            for run in self.full_runs():
                if not all(p.isfinite().all() for p in run.parameters[-1].values()):
                    raise InputError(
                        "further_training.lr", f"the full run of seed {run.seed} diverges; lower it?"
                    )
                yield run

        return replace(self, full_runs=finite)

    def first(self, seeds: int) -> FurtherTraining:
        """Return the further training of the first so many seeds."""
        runs = self.full_runs
        return replace(self, seeds=self.seeds[:seeds], full_runs=lambda: itertools.islice(runs(), seeds))

    def part(
        self, trajectories: Iterator[Trajectory], seeds: tuple[int, ...], points: int
    ) -> FurtherTraining:
        """Return some seeds' further training up to and with its first so many evaluation points.

        Args:
            trajectories: of these seeds, in this order; consumed by the first use of ``full_runs``.
        """
        some = (t.until(points) for t in trajectories)
        return replace(self, steps=self.steps[:points], seeds=seeds, full_runs=lambda: some)
