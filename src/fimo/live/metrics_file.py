"""``metrics.csv``: all points that a run has logged, a row each, written as they come."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from fimo.store.files import written_aside

FIRST = ("row", "time", "axis")
"""Columns that every row has: its number from 0, when it was logged (Unix time), and against which of its
columns the others are drawn."""

Row = dict[str, float | str]


class MetricsFile:
    """The points logged so far, by this process or before it.

    Args:
        path: of the file; what it holds already is read, and goes on.

    Attributes:
        rows: values by column, numbers but for ``axis``; a column that a row lacks is empty in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, self._whole = _read(path)
        self._columns = list(dict.fromkeys([*FIRST, *(name for row in self.rows for name in row)]))

    def add(self, row: Mapping[str, float | str]) -> None:
        """Append a row; the whole file is written anew where it has a column that none before had."""
        self.rows.append(dict(row))
        new = [name for name in row if name not in self._columns]
        if self._whole and not new:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
            return
        self._columns += new
        with written_aside(self.path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)
        self._whole = True


def _read(path: Path) -> tuple[list[Row], bool]:
    """Return a file's rows, without a last one that a killed process left half written.

    Returns:
        the rows, and whether the file is there and ends with a whole one.
    """
    try:
        content = path.read_text()
    except FileNotFoundError:
        return [], False
    lines = content.splitlines()
    whole = content.endswith("\n")
    rows = csv.DictReader(lines if whole else lines[:-1])
    return [{k: v if k == "axis" else float(v) for k, v in row.items() if v} for row in rows], whole
