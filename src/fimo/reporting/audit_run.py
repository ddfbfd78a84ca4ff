"""An audit with what its page shows beside it: instances as people read them, the model, the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fimo.audit.result import Audit
from fimo.errors import InputError
from fimo.reporting.instance_table import InstanceDisplay, Shown, Split, noun
from fimo.store.files import written_aside

FILE = "audit_report.json"
JSON_FIELDS = ("name", "dataset", "final_model", "config", "versions")

EVERY_ROW = 5_000
"""Training rows up to which the page lists all."""

MOST_VALUES = 100_000
"""Of a table, up to which the values of every training row are kept."""

PER_SIDE = 25
"""Rows shown of each side of a ranking, whether they were verified or not."""

PER_TEST = 15
"""The same for each named test instance."""

MOST_SUSPECTS = 100

LEADING_SUSPECTS = 20
"""Listed where none is sure."""

MOST_VERIFIED = 1_000


@dataclass(frozen=True)
class AuditRun:
    """What the page of an audit shows.

    Args:
        audit: with its tables.
        name: of the data set.
        dataset: where known ``name, task, description, target, train, test`` (sizes), ``classes``.
        final_model: ``train_loss, test_loss``, and where known accuracies and baselines.
        config: the composed configuration as plain containers.
        versions: by package.
        shown: instances by split, then by **data row** of the user's file.
    """

    audit: Audit
    name: str = ""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    final_model: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    shown: Shown = field(default_factory=lambda: {"train": {}, "test": {}})

    @property
    def noun(self) -> str:
        """What an instance of this data set is called: ``row``, ``text`` or ``picture``."""
        return noun(self.shown)

    def show(self, split: Split, row: int) -> InstanceDisplay | None:
        """Return the instance of a data row, or None where it was not kept."""
        return self.shown.get(split, {}).get(row)

    def save(self, folder: Path | str) -> None:
        """Write the audit's own files, and ``audit_report.json``: what they don't hold."""
        folder = Path(folder)
        self.audit.save(folder)
        content = {key: getattr(self, key) for key in JSON_FIELDS}
        content["shown"] = {
            split: {str(row): display.as_dict() for row, display in instances.items()}
            for split, instances in self.shown.items()
        }
        with written_aside(folder / FILE) as path:
            path.write_text(json.dumps(_plain(content), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> AuditRun:
        """Read a folder; ``audit_report.json`` may be missing, as where :meth:`Audit.save` wrote it.

        Raises:
            InputError: the folder holds no audit.
        """
        audit, path = Audit.load(folder), Path(folder) / FILE
        if not path.exists():
            return cls(audit)
        content = json.loads(path.read_text("utf-8"))
        content["shown"] = {
            split: {int(row): InstanceDisplay(**display) for row, display in instances.items()}
            for split, instances in content["shown"].items()
        }
        return cls(audit, **content)

    @classmethod
    def of_frames(
        cls, audit: Audit, train: pd.DataFrame | None = None, test: pd.DataFrame | None = None
    ) -> AuditRun:
        """Return an audit with the rows of the user's own tables; a data row is a position there.

        Raises:
            InputError: ``train`` or ``test`` is too short to be the table that was audited.
        """
        targets = dict(zip(audit.rows["row"], audit.rows["target"], strict=True))
        shown: dict[str, dict[int, InstanceDisplay]] = {"train": {}, "test": {}}
        for split, table, rows in (
            ("train", train, train_rows(audit, None if train is None else len(train.columns))),
            ("test", test, test_rows(audit)),
        ):
            if table is None:
                continue
            if rows and max(rows) >= len(table):
                problem = f"has {len(table)} rows, but the audit is of a table with a data row {max(rows)}"
                raise InputError(split, problem)
            for row in rows:
                values = {str(c): _scalar(v) for c, v in table.iloc[row].items()}
                target = _scalar(targets.get(row, "")) if split == "train" else ""
                shown[split][row] = InstanceDisplay(target, row=values)
        return cls(audit, shown=shown)


def train_rows(audit: Audit, columns: int | None = None) -> list[int]:
    """Return the data rows of the training instances that the page shows.

    Args:
        columns: of a table, so that all its rows are shown where they are few; None for texts and pictures.
    """
    rows = audit.rows
    if columns is not None and len(rows) * columns <= MOST_VALUES and len(rows) <= EVERY_ROW:
        return [int(row) for row in rows["row"]]
    wanted = [
        *rows.loc[rows["verdict"] != "", "row"].head(MOST_VERIFIED),
        *_ends(rows, "score"),
        *_ends(rows, "effect"),
        *audit.suspects.head(MOST_SUSPECTS)["row"],
        *audit.looked_at.head(LEADING_SUSPECTS)["row"],
        *(row for rows_ in audit.groups["rows"].head(PER_SIDE) for row in str(rows_).split()[:PER_TEST]),
    ]
    for _, pairs in audit.pairs.groupby("test_row"):
        wanted += [*_ends(pairs, "effect", PER_TEST), *_ends(pairs, "score", PER_TEST)]
    return sorted({int(row) for row in wanted})


def test_rows(audit: Audit) -> list[int]:
    """Return the data rows of the named test instances."""
    return sorted({int(row) for row in audit.pairs["test_row"]})


def _ends(table: pd.DataFrame, column: str, count: int = PER_SIDE) -> Sequence[Any]:
    known = table.dropna(subset=[column]).sort_values(column, kind="stable")["row"].tolist()
    return [*known[:count], *known[-count:]]


def _scalar(value: Any) -> float | int | str:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    from fimo.reporting.results import plain

    return plain(value)
