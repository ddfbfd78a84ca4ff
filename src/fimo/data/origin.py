"""Where instances came from: rows of the user's file, their names, and what else it says of them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fimo.errors import InputError, nearest, shortened

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Names of n instances, kept through dropping, splitting and drawing.

    Args:
        row: ``[n]`` int64, the 0-based data row of the file or source (its header not counted).
        id: ``[n]``, the user's identifiers (``dataset.id``) as text; None where there are rows only.
        source: the file's name, where there is one.
        first_line: the file's line of data row 0, where rows are lines; for error messages.
        beside: ``[n]`` rows of columns that are no features, shown only; None where there are none.

    Raises:
        InputError: an identifier that occurs twice.
    """

    row: np.ndarray
    id: tuple[str, ...] | None = None
    source: str = ""
    first_line: int | None = None
    beside: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        for name, part in (("id", self.id), ("beside", self.beside)):
            if part is not None and len(part) != len(self.row):
                raise InputError(f"dataset.{name}", f"expected {len(self.row)} values but got {len(part)}")
        if self.id is not None and len(set(self.id)) < len(self.id):
            twice = pd.Series(self.id)
            found = twice[twice.duplicated()].unique().tolist()
            raise InputError("dataset.id", f"several rows are called {shortened(found)}")

    @classmethod
    def counted(cls, n: int) -> Origin:
        """Return the origin of instances that are known by their position alone."""
        return cls(np.arange(n, dtype=np.int64))

    @classmethod
    def of_frame(
        cls,
        frame: pd.DataFrame,
        identifier: str | int | None,
        read: Sequence[str],
        source: str = "",
        first_line: int | None = None,
    ) -> Origin:
        """Return the origin of a whole table's rows; see :meth:`with_names`."""
        counted = cls(np.arange(len(frame), dtype=np.int64), None, source, first_line)
        return counted.with_names(frame, identifier, read)

    def with_names(self, frame: pd.DataFrame, identifier: str | int | None, read: Sequence[str]) -> Origin:
        """Return the same rows with what their table says of them.

        Args:
            frame: of the rows, in their order.
            identifier: the column that names them.
            read: columns that are features or targets; all others are shown beside.

        Raises:
            InputError: ``dataset.id``: no such column, an empty cell, or a name that occurs twice.
        """
        columns = list(frame.columns)
        if identifier is not None and identifier not in columns:
            raise InputError("dataset.id", f"no column {identifier!r}; {nearest(str(identifier), columns)}")
        ids = None if identifier is None else named(frame[identifier], self.where)
        rest = [c for c in columns if c not in read and c != identifier]
        beside = frame[rest].reset_index(drop=True) if rest else None
        return replace(self, id=ids, beside=beside)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def ids(self) -> list[str]:
        """Each instance's identifier; its row where none was given."""
        return [str(row) for row in self.row.tolist()] if self.id is None else list(self.id)

    @functools.cached_property
    def cells(self) -> dict[str, np.ndarray]:
        """The columns beside, by name."""
        return {} if self.beside is None else cells_of(self.beside)

    def name(self, position: int) -> str:
        """Return what an instance is called: its identifier, or its row."""
        return f"row {self.row[position]}" if self.id is None else self.id[position]

    def where(self, position: int) -> str:
        """Return the place of an instance in its file, for errors: ``data row 3 (line 5)``."""
        row = int(self.row[position])
        return f"data row {row}" + (f" (line {row + self.first_line})" if self.first_line is not None else "")

    def __getitem__(self, index: Sequence[int] | np.ndarray | slice) -> Origin:
        """Return the origin of some of the instances, by position."""
        positions = np.arange(len(self))[index]
        return Origin(
            self.row[positions],
            None if self.id is None else tuple(self.id[k] for k in positions),
            self.source,
            self.first_line,
            None if self.beside is None else self.beside.iloc[positions].reset_index(drop=True),
        )

    def position(self, name: int | str, key: str) -> int:
        """Return the position of the instance with an identifier, or else with a row: ``row 11``, or ``11``.

        Where some identifiers are numbers, a number is one of them: no row of it is looked for.

        Args:
            key: that errors name.

        Raises:
            InputError: there is none.
        """
        if self.id is not None and str(name) in self.id:
            return self.id.index(str(name))
        row, rows = re.fullmatch(r"(row )?(\d+)", str(name)), self.row.tolist()
        there = row is not None and int(row[2]) in rows
        numbered = self.id is not None and any(identifier.isdigit() for identifier in self.id)
        if row is not None and there and (row[1] or not numbered):
            position: int = rows.index(int(row[2]))
            if self.id is not None:
                log.info("%s: %s is called %s", key, self.where(position), self.id[position])
            return position
        kind = "row" if self.id is None else "id" if there else "id or row"
        hint = f"; data row {name} is called 'row {name}'" if there else ""
        raise InputError(key, f"there is no {kind} {name!r}; there are {shortened(self.ids)}{hint}")


@dataclass(frozen=True)
class Sources:
    """Where a table's rows came from: one file, or a training and a test file, one after the other."""

    files: tuple[Origin, ...]

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def where(self, position: int) -> str:
        """Return the place of a row, for errors; with its file, where there are two."""
        first = len(self.files[0])
        if position < first:
            return self.files[0].where(position)
        return f"{self.files[1].where(position - first)} of {self.files[1].source}"

    def some(self, positions: np.ndarray) -> Sources:
        """Return the sources of some rows, in their order."""
        found, first = [], 0
        for file in self.files:
            inside = positions[(positions >= first) & (positions < first + len(file))] - first
            found.append(file[inside])
            first += len(file)
        return Sources(tuple(found))

    def with_names(self, frame: pd.DataFrame, identifier: str | None, read: Sequence[str]) -> Sources:
        """Return the same with what the table says of its rows; see :meth:`Origin.with_names`."""
        found, first = [], 0
        for file in self.files:
            rows = frame.iloc[first : first + len(file)]
            found.append(file.with_names(rows, identifier, read))
            first += len(file)
        return Sources(tuple(found))

    def __getitem__(self, positions: np.ndarray) -> Origin:
        """Return the origin of some rows of one of the files."""
        first = len(self.files[0])
        in_first = len(self.files) == 1 or bool((positions < first).all())
        return self.files[0][positions] if in_first else self.files[1][positions - first]


def first_line(text: str, rows: int, header: bool) -> int | None:
    """Return the line of data row 0 of a text table; None where rows are not one line each."""
    numbers = [k for k, line in enumerate(text.split("\n"), 1) if line.strip()][int(header) :]
    one_each = len(numbers) == rows and bool(rows) and numbers[-1] - numbers[0] == rows - 1
    return numbers[0] if one_each else None


def cells_of(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return a table's columns, to be read row by row; those of numbers as they are, without a copy.

    Numbers of Python's own would take eight times the memory of float32. All else is Python's own values.
    """
    return {str(name): _cells_of(frame[name]) for name in frame}


def _cells_of(column: pd.Series) -> np.ndarray:
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    return column.to_numpy() if kind in "biuf" else column.to_numpy(dtype=object)


def named(column: pd.Series, where: Callable[[int], str]) -> tuple[str, ...]:
    """Return a column of identifiers as text.

    Args:
        where: names a row by its position, for errors.

    Raises:
        InputError: ``dataset.id``: an empty cell.
    """
    blank = column.isna() | (column.astype(str).str.strip() == "")
    if blank.any():
        row = int(np.flatnonzero(blank)[0])
        raise InputError("dataset.id", f"column {str(column.name)!r} is empty in {where(row)}")
    return tuple(str(value) for value in column.tolist())
