"""What a task is: one more way to judge a run's methods, and what it sees of the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import pandas as pd
from torch import Tensor

from fimo.data.datamodule import InstancesModule
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol as FurtherTraining
from fimo.errors import InputError
from fimo.further_training.sensitivity import Sensitivity
from fimo.models.final_model import FinalModel
from fimo.models.measured import Measured
from fimo.reporting.task_curves import Curve
from fimo.scores import Scores


class Judged(Protocol):
    """What a task sees of a run whose methods are judged: instances, scores, and the engine."""

    @property
    def data(self) -> InstancesModule:
        """Training and test instances."""

    @property
    def final_model(self) -> FinalModel:
        """On the CPU; untrained where a task is checked before any training."""

    @property
    def trained_here(self) -> bool:
        """Whether the final model is trained, and not read from a checkpoint."""

    @property
    def protocol(self) -> FurtherTraining:
        """Of further training."""

    @property
    def seeds(self) -> Sequence[int]:
        """Of the gold standard."""

    @property
    def left_out(self) -> Sequence[Any]:
        """Instances, or groups of them, that the gold standard leaves out."""

    def scores(self, left_out: Sequence[int] | None = None) -> dict[str, Scores]:
        """Return every method's scores of some training instances; of all N when None."""

    def leave_out(self, groups: Sequence[Any], seeds: Sequence[int] | None = None) -> Sensitivity:
        """Further train with and without each of some instances or groups; as many seeds as the run's."""

    def retrain(self, groups: Sequence[Any], seeds: Sequence[int]) -> Sensitivity:
        """Train from scratch with and without them."""

    def why_not_from_scratch(self) -> str | None:
        """Return why :meth:`retrain` can't be asked for, or None."""

    def with_targets(self, targets: Tensor) -> Judged:
        """Return the run with other training targets ``[N]``, and a final model trained on them."""

    def with_training_set(self, train: Instances) -> Judged:
        """Return the run with as many other training instances, and a final model trained on them."""

    def randomised(self, seed: int) -> Judged:
        """Return the run of an untrained network, with the initial parameters of a seed."""

    def explaining(self, test: Instances) -> Judged:
        """Return the run of other test instances."""

    def measuring_loss(self) -> Judged:
        """Return the run in which the training loss is measured, whatever is in this one."""


class Task(ABC):
    """One more way to judge methods.

    Attributes:
        curve: as what the task's table is drawn in reports, figures and dashboards; None: it is only written.
    """

    curve: ClassVar[Curve | None] = None

    def check(self, run: Judged) -> None:  # noqa: B027, as most need none
        """Refuse a run that the task can't judge, before any training.

        Raises:
            InputError: naming the key at fault.
        """

    @abstractmethod
    def __call__(self, run: Judged) -> pd.DataFrame | Sensitivity:
        """Judge a run's methods: a table, or another gold standard to compare with."""


def better(run: Judged) -> int:
    """Return 1 where a run's scores are positive of instances that help, -1 where of those that harm.

    Raises:
        InputError: ``model.measurement``: a function of the user's own that doesn't say it.
    """
    return Measured.of(run.final_model).better


def seeds_of(value: int | None, run: Judged, key: str) -> list[int]:
    """Return the first so many of the run's seeds; all when None.

    Raises:
        InputError: with ``key``.
    """
    seeds = list(run.seeds)
    if value is None:
        return seeds
    if not 1 <= value <= len(seeds):
        raise InputError(key, f"expected 1 to {len(seeds)} (further_training.seeds) but got {value}")
    return seeds[:value]
