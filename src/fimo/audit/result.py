"""What an audit finds, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fimo.data.reading import EXACT, NAMELESS
from fimo.errors import InputError
from fimo.models.measured import Measured
from fimo.store.csv_tables import write_csv
from fimo.store.files import written_aside

Verdict = Literal["helpful", "harmful", "unclear", ""]

ROWS = (
    "row", "id", "target", "score", "score_sem", "effect", "effect_sem", "q", "verdict",
    "own_loss", "self_effect", "suspect_q", "suggested",
)  # fmt: skip
"""Of ``rows.csv``: every training row, its effect on the mean test loss, and its own training loss."""

PAIRS = (
    "test_row", "test_id", "row", "id", "target", "score", "score_sem", "effect", "effect_sem", "q",
    "verdict", "prediction_effect", "prediction_effect_sem",
)  # fmt: skip
"""Of ``pairs.csv``: the same for named test instances; the last two in the target's units, or probability."""

GROUPS = (
    "group", "kind", "size", "rows", "ids", "score", "effect", "effect_sem",
    "beyond_random", "beyond_random_sem", "q", "verdict", "shared",
)  # fmt: skip
"""Of ``groups.csv``: rows that act together or are duplicates; ``rows`` and ``ids`` separated by spaces.
Verdicts are of what is beyond the effect of as many random rows."""

SUSPECTS = (
    "row", "id", "target", "suggested", "suspect_q", "own_loss", "self_effect", "effect", "effect_sem",
)  # fmt: skip
"""Of ``suspects.csv``: rows whose targets are probably wrong, the surest first."""

PROOF = ("removed", "rows", "metric", "mean", "sem", "seeds")
"""Of ``proof.csv``: further training without some rows, on test rows that did not choose them."""

KEPT = ("row", "id")
"""Of ``cleaned.csv`` where the training instances are in no table."""

TEXTS = {
    "rows": ("id", "verdict", "suggested"),
    "pairs": ("test_id", "id", "verdict"),
    "groups": ("kind", "rows", "ids", "verdict", "shared"),
    "proof": ("removed", "metric"),
}
"""Columns of text, by table; a ``target`` is text where it is no number, and the others are numbers."""

AUDIT = "audit.json"
"""The file that says that a folder is an audit's."""

NAMELESS_CLEANED = "cleaned_without_names"
"""Of ``audit.json``: ``cleaned.csv`` has no line of names, as the user's file has none."""


@dataclass(frozen=True)
class Audit:
    """Which of all N training rows matter, surely, and what to do about them.

    Effects are changes of test losses by removal: positive where the row helps. Where the final model has
    another measurement, they are changes of that, and positive where the row harms if a larger value is
    better (:attr:`measured`).

    Args:
        rows: N lines with the columns ``ROWS``, in the order of the user's file. ``score`` is the
            predicted effect on the mean test loss, ``effect`` the measured one (NaN where the row was not
            verified, ``verdict`` empty), ``q`` the smallest false discovery rate at which the verdict holds;
            ``self_effect`` the predicted (where measured, the measured) effect on the row's own loss;
            ``suspect_q`` the false discovery rate of the list of suspects that ends with this row;
            ``suggested`` the label or value that the model would give, where it is suspect.
        pairs: lines with the columns ``PAIRS`` for each named test instance, its N rows by size of score.
        groups: lines with the columns ``GROUPS``.
        proof: lines with the columns ``PROOF``; empty where nothing was removed.
        cleaned: the user's table without suspects and verified harmful rows; None where there is no table.
        summary: what the first screen says, as JSON can hold it (``audit.json``).
    """

    rows: pd.DataFrame
    pairs: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PAIRS)))
    groups: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(GROUPS)))
    proof: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PROOF)))
    cleaned: pd.DataFrame | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, columns in (("rows", ROWS), ("pairs", PAIRS), ("groups", GROUPS), ("proof", PROOF)):
            missing = [c for c in columns if c not in getattr(self, name)]
            if missing:
                raise InputError(name, f"lacks the columns {', '.join(missing)}")

    @property
    def measured(self) -> Measured:
        """What effects are changes of."""
        return Measured(**self.summary.get("measured", {}))

    @property
    def looked_at(self) -> pd.DataFrame:
        """The rows whose targets were looked at, the most suspect first, whether any is sure or not."""
        rows = self.rows[self.rows["suspect_q"].notna()]
        order = [True, self.measured.better < 0]
        return rows.sort_values(["suspect_q", "self_effect"], ascending=order, kind="stable")

    @property
    def suspects(self) -> pd.DataFrame:
        """The rows whose targets are probably wrong, the surest first: those with a suggestion."""
        rows = self.looked_at
        return rows[rows["suggested"].fillna("").astype(str) != ""]

    def save(self, folder: Path | str) -> None:
        """Write a CSV file of each table and of :attr:`suspects`, ``cleaned.csv`` where there is one, and
        ``audit.json``.

        ``cleaned.csv`` has a line of names if the user's file has one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {name: getattr(self, name) for name in (*TEXTS, "cleaned")}
        tables["suspects"] = self.suspects[list(SUSPECTS)]
        for name, table in tables.items():
            if table is not None:
                with written_aside(folder / f"{name}.csv") as path:
                    write_csv(table, path, header=NAMELESS not in table.attrs)
        summary = dict(self.summary)
        if self.cleaned is not None and NAMELESS in self.cleaned.attrs:
            summary[NAMELESS_CLEANED] = True
        with written_aside(folder / AUDIT) as path:
            path.write_text(json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False))

    @classmethod
    def load(cls, folder: Path | str) -> Audit:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the folder holds no audit.
        """
        folder = Path(folder)
        if not (folder / AUDIT).exists():
            raise InputError(str(folder), "audit.json is missing: this is no folder of a finished audit")
        summary = json.loads((folder / AUDIT).read_text())
        nameless = summary.pop(NAMELESS_CLEANED, False)
        tables = {}
        for name, texts in TEXTS.items():
            if (path := folder / f"{name}.csv").exists():
                tables[name] = _read(path, texts)
        if (path := folder / "cleaned.csv").exists():
            tables["cleaned"] = _as_written(path, nameless)
        return cls(**tables, summary=summary)


def _as_written(path: Path, nameless: bool) -> pd.DataFrame:
    """Return a table of the user's, every cell as text."""
    cells: pd.DataFrame = pd.read_csv(path, dtype=str, keep_default_na=False, header=None)
    if not nameless:
        return cells[1:].set_axis(cells.iloc[0].tolist(), axis=1).reset_index(drop=True)
    cells = cells.rename(columns=str)
    cells.attrs[NAMELESS] = True
    return cells


def _read(path: Path, texts: Sequence[str]) -> pd.DataFrame:
    """Return a table of an audit's: texts as they are, and numbers, NaN where there is none."""
    texts = [*texts, "target"]
    numbers = [c for c in pd.read_csv(path, nrows=0).columns if c not in texts]
    table: pd.DataFrame = pd.read_csv(
        path, dtype=dict.fromkeys(texts, str), keep_default_na=False,
        na_values={column: [""] for column in numbers}, **EXACT,
    )  # fmt: skip
    if "target" in table:
        table["target"] = _numbers(table["target"])
    return table


def _numbers(texts: pd.Series) -> pd.Series:
    """Return texts as numbers, if numbers were written so; else as they are, as labels such as ``007``."""
    found: pd.Series = pd.to_numeric(texts, errors="coerce")
    missing = texts == ""
    return found if (missing | (found.astype(str) == texts)).all() and found.notna().any() else texts
