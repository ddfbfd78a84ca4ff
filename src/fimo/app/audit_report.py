"""What is shown of an audit: its instances as people read them, its page, its answer in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from fimo.app.config import plain
from fimo.app.displayed import displayed
from fimo.app.environment import versions
from fimo.app.journal import Journal
from fimo.app.run import Run
from fimo.app.summary import dataset_facts, quality_facts
from fimo.audit.result import Audit
from fimo.data.datamodule import InstancesModule, Split
from fimo.models.final_model import FinalModel
from fimo.models.training import Quality
from fimo.reporting.audit_answer import audit_answer
from fimo.reporting.audit_run import AuditRun, test_rows, train_rows
from fimo.reporting.instance_table import InstanceDisplay
from fimo.reporting.wandb_audit import tell_audit


def write_audit(found: Audit, run: Run, quality: Quality, config: DictConfig, journal: Journal) -> None:
    """Write an audit's tables, its answer, and its page where the configuration asks for one."""
    with journal.stage("report"):
        shown = audit_run(found, run, quality, plain(config))
        shown.save(journal.folder)
        audit_answer(shown).save(journal.folder)
        if config.report:
            from fimo.reporting import write_audit_report  # with packages that nothing else needs

            write_audit_report(shown, journal.folder / "report.html")
    tell_audit(journal.log, shown, journal.folder / "report.html")


def audit_run(found: Audit, run: Run, quality: Quality, config: Mapping[str, Any]) -> AuditRun:
    """Return an audit with the instances that its page shows, under their data rows."""
    data = run.data
    first = data.shown("train", 0)
    columns = None if first.text or first.image or not first.row else len(first.row)
    wanted: dict[Split, Sequence[int]] = {"train": train_rows(found, columns), "test": test_rows(found)}
    return AuditRun(
        found,
        name=data.name or "",
        dataset=dataset_facts(data),
        final_model=quality_facts(quality),
        config=config,
        versions=versions(),
        shown={split: displays(data, run.final_model, split, rows) for split, rows in wanted.items()},
    )


def displays(
    data: InstancesModule, final_model: FinalModel, split: Split, rows: Sequence[int]
) -> dict[int, InstanceDisplay]:
    """Return instances, and what the final model makes of them, by their data rows."""
    position = {int(row): k for k, row in enumerate(data.origin(split).row)}
    return dict(zip(rows, displayed(data, final_model, split, [position[r] for r in rows]), strict=True))
