"""What an audit finds, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fimo.data.reading import EXACT, NAMELESS
from fimo.errors import InputError
from fimo.store.csv_tables import write_csv
from fimo.store.files import written_aside

Verdict = Literal["helpful", "harmful", "unclear", ""]

ROWS = (
    "row", "id", "target", "score", "score_sem", "effect", "effect_sem", "q", "verdict",
    "own_loss", "self_effect", "suspect_q", "suggested",
)  # fmt: skip
"""Of ``rows.csv``: every training row, its effect on the mean test loss, and its own loss."""

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

PROOF = ("removed", "rows", "metric", "mean", "sem", "seeds")
"""Of ``proof.csv``: further training without some rows, on test rows that did not choose them."""

NAMELESS_CLEANED = "cleaned_without_names"
"""Of ``audit.json``: ``cleaned.csv`` has no line of names, as the user's file has none."""


@dataclass(frozen=True)
class Audit:
    """Which of all N training rows matter, surely, and what to do about them.

    Effects are changes of test losses by removal: positive where the row helps.

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

    def save(self, folder: Path | str) -> None:
        """Write a CSV file of each table, ``cleaned.csv`` where there is one, and ``audit.json``.

        ``cleaned.csv`` has a line of names if the user's file has one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {name: getattr(self, name) for name in ("rows", "pairs", "groups", "proof", "cleaned")}
        for name, table in tables.items():
            if table is not None:
                with written_aside(folder / f"{name}.csv") as path:
                    write_csv(table, path, header=NAMELESS not in table.attrs)
        summary = dict(self.summary)
        if self.cleaned is not None and NAMELESS in self.cleaned.attrs:
            summary[NAMELESS_CLEANED] = True
        with written_aside(folder / "audit.json") as path:
            path.write_text(json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False))

    @classmethod
    def load(cls, folder: Path | str) -> Audit:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the folder holds no audit.
        """
        folder = Path(folder)
        if not (folder / "audit.json").exists():
            raise InputError(str(folder), "audit.json is missing: this is no folder of a finished audit")
        names = {"id": str, "ids": str, "rows": str, "test_id": str, "verdict": str, "suggested": str}
        summary = json.loads((folder / "audit.json").read_text())
        nameless = summary.pop(NAMELESS_CLEANED, False)
        tables = {}
        for name in ("rows", "pairs", "groups", "proof", "cleaned"):
            path = folder / f"{name}.csv"
            if path.exists():
                text = {} if name in ("cleaned", "proof") else names
                header = None if nameless and name == "cleaned" else 0
                table = pd.read_csv(path, dtype=text, header=header, **EXACT)
                if header is None:
                    table = table.rename(columns=str)
                    table.attrs[NAMELESS] = True
                for column in set(table) & {"verdict", "suggested"}:
                    table[column] = table[column].fillna("")
                tables[name] = table
        return cls(**tables, summary=summary)
