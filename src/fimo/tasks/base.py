"""What a task is handed: a run's final model, data, plan and methods, and the engine with its store."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from omegaconf import DictConfig

from fimo.app.build import build
from fimo.app.config import plain
from fimo.app.environment import trainer_settings
from fimo.app.plan import Plan
from fimo.app.scoring import Scoring
from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule
from fimo.errors import InputError
from fimo.further_training import further_train
from fimo.further_training.sensitivity import Sensitivity
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.reporting.results import TASKS, Results, task_file
from fimo.reporting.task_curves import Curve
from fimo.scores import Scores
from fimo.store.files import Store, written_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """A run whose methods are judged.

    Args:
        config: of the run.
        data: its training and test instances.
        plan: the protocol of further training, its seeds and the test instances.
        final_model: trained, on the CPU.
        methods: by name.
        store: where scores and further training are kept.
        device: of the methods' computations.
        cost: gets the gradient evaluations of the task.
    """

    config: DictConfig
    data: InstancesModule
    plan: Plan
    final_model: FinalModel
    methods: Mapping[str, AttributionMethod]
    store: Store
    device: torch.device
    cost: Cost

    def scores(self, left_out: Sequence[int] | None = None) -> dict[str, Scores]:
        """Return every method's scores.

        Args:
            left_out: training instances; all N when None.
        """
        chosen = list(range(len(self.data.train)) if left_out is None else left_out)
        plan = replace(self.plan, left_out=chosen)
        scoring = Scoring.of(self.final_model, self.data, plan, self.config.seed, self.store, self.device)
        settings, found = plain(self.config.methods), {}
        for name, method in self.methods.items():
            cost = Cost(name)
            found[name] = scoring.scores(name, method, settings[name], cost)
            self.cost.gradient_evaluations += cost.gradient_evaluations
        return found

    def leave_out(self, groups: Sequence[Any], seeds: Sequence[int] | None = None) -> Sensitivity:
        """Further train with and without each of some instances or groups of them.

        Args:
            seeds: as many as the run's gold standard when None.
        """
        plan, cost = self.plan, Cost("further_training")
        found = further_train(
            self.final_model,
            self.data.train,
            self.data.test[plan.test],
            plan.protocol,
            plan.seeds if seeds is None else seeds,
            groups,
            test_index=plan.test,
            store=self.store,
            chunk=plan.chunk,
            subtract_mean=plan.subtract_mean,
            trainer=trainer_settings(self.config),
            cost=cost,
        )
        self.cost.gradient_evaluations += cost.gradient_evaluations
        return found


class Task(ABC):
    """One more way to judge methods.

    Attributes:
        curve: as what the task's table is drawn in reports, figures and dashboards; None: it is only written.
    """

    curve: ClassVar[Curve | None] = None

    def check(self, config: DictConfig, data: InstancesModule) -> None:  # noqa: B027, as most need none
        """Refuse a run that the task can't judge, before any training.

        Raises:
            InputError: naming the key at fault.
        """

    @abstractmethod
    def __call__(self, run: Judged) -> pd.DataFrame | Sensitivity:
        """Judge a run's methods: a table, or another gold standard to compare with."""


def build_tasks(config: DictConfig, data: InstancesModule) -> dict[str, Task]:
    """Build every configured task by name, and check that it applies.

    Raises:
        InputError: naming the key under ``evaluation.tasks`` at fault.
    """
    tasks = {}
    for name, node in (config.evaluation.tasks or {}).items():
        task = build(node, f"evaluation.tasks.{name}", _convert_="all")
        if not isinstance(task, Task):
            raise InputError(f"evaluation.tasks.{name}", f"expected a Task but got {type(task).__name__}")
        task.check(config, data)
        tasks[str(name)] = task
    return tasks


def with_findings(
    results: Results,
    findings: Mapping[str, pd.DataFrame | Sensitivity],
    folder: Path,
    tasks: Mapping[str, Task] | None = None,
) -> Results:
    """Add what tasks found to a run's results; tables that nothing draws are only written.

    Args:
        tasks: by name, those that say as what their tables are drawn.
    """
    tables = {n: found for n, found in findings.items() if isinstance(found, pd.DataFrame)}
    curves = {}
    for name, table in tables.items():
        curve = tasks[name].curve if tasks and name in tasks else None
        if curve is not None and (missing := curve.missing(table.columns)):
            log.warning("%s is not drawn: its table has no column %s", name, ", ".join(missing))
        elif curve is not None:
            curves[name] = curve
    drawn = {name: table for name, table in tables.items() if name in curves or name in TASKS}
    for name in tables.keys() - drawn.keys():
        with written_aside(task_file(folder, name)) as path:
            tables[name].to_csv(path, index=False)
    again = next((f for f in findings.values() if isinstance(f, Sensitivity)), None)
    results = replace(results, tasks=drawn, retraining=again)
    return replace(results, curves=curves) if curves else results


def seeds_of(value: int | None, plan: Plan, key: str) -> list[int]:
    """Return the first so many of the run's seeds; all when None.

    Raises:
        InputError: with ``key``.
    """
    if value is None:
        return plan.seeds
    if not 1 <= value <= len(plan.seeds):
        raise InputError(key, f"expected 1 to {len(plan.seeds)} (further_training.seeds) but got {value}")
    return plan.seeds[:value]
