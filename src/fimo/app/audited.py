"""``mode=audit``: which of all training rows matter, surely."""

from __future__ import annotations

import functools
from typing import Any

from omegaconf import DictConfig

from fimo.app.build import AUDIT_FIELDS
from fimo.app.journal import Journal
from fimo.app.run import Run
from fimo.audit import Audit
from fimo.audit.audit import audit
from fimo.audit.explained import Shown, refuse_several
from fimo.audit.question import Question, Resources, Settings, positions
from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule


def settings_of(config: DictConfig, data: InstancesModule) -> Settings:
    """Read what an audit shall do, and check it against the data.

    Raises:
        InputError: naming the key under ``audit`` at fault.
    """
    values: dict[str, Any] = {name: config.audit[name] for name in AUDIT_FIELDS}
    settings = Settings(**values)
    settings.fitting(len(data.train))
    named_tests(config, data)
    return settings


def named_tests(config: DictConfig, data: InstancesModule) -> tuple[int, ...]:
    """Return the positions of the test instances that are explained one by one.

    Raises:
        InputError: ``audit.test``: there is none of a name, or an instance has several target values.
    """
    found = positions(list(config.audit.test), data.origin("test"), "audit.test")
    if found and data.test.targets.is_floating_point():
        refuse_several(data.test.targets[0].numel())
    return found


def shown_by(data: InstancesModule) -> Shown:
    """Return how a data set's predictions and training rows are read."""
    row = functools.partial(data.named, "train")
    return Shown(data.class_names, data.original, data.unit, row, data.table)


def audited(run: Run, data: InstancesModule, config: DictConfig, journal: Journal) -> Audit:
    """Audit a run's training rows.

    Args:
        run: of what is trained.
        data: the whole network's, by which rows are read and compared.
    """
    question = Question(
        run.final_model, run.data.train, run.data.test, run.plan.protocol, named_tests(config, data),
        data.origin("train"), data.origin("test"),
        tuple(data.shown_targets("train")), shown_by(data), original=data.train,
    )  # fmt: skip
    resources = Resources(run.store, run.device, run.trainer, run.problem)
    journal.log.stage("audit")
    journal.ahead.begin("audit", journal.log)
    found = audit(question, settings_of(config, data), resources)
    stages = found.summary["stages"]
    journal.costs.extend(Cost(stage, seconds) for stage, seconds in stages.items())
    journal.ahead.ended(Cost("audit", sum(stages.values())))
    return found
