"""A user's table, as it is: any common file, columns of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fimo.data.cells import mixes_percent
from fimo.data.columns import (
    Choices,
    Column,
    decide,
    filled,
    has_decimal_commas,
    is_plain,
    noticed,
    refuse_empty,
    said_of_aside,
)
from fimo.data.features import features
from fimo.data.origin import Origin, Sources
from fimo.data.parts import parts
from fimo.data.preprocessing import OwnScale, transformed
from fimo.data.reading import EXACT, Form, as_written, read_file, read_frame
from fimo.data.tabular import Scale, Table, TabularModule, pick_target
from fimo.data.target import check_numeric, target_values
from fimo.errors import InputError, nearest

__all__ = ["EXACT", "CsvData", "read_frame"]

MISSING = ("impute", "drop", "refuse")

SHARE = 0.1
"""Of a table that is held out, where nothing else is said."""


class CsvData(TabularModule):
    """A table read from ``path``; every column but the target is a feature, if it can be one.

    What each column is, is seen from its values (:func:`fimo.data.columns.decide`), and a line says what was
    decided: text becomes categories, empty cells are filled, dates become numbers, and what names rows or is
    constant is set aside. A table of finite numbers alone is taken as it is.

    Args:
        path: text in any form, maybe compressed, an Excel sheet, parquet, JSON (lines).
        test_path: a second file, whose rows are the test part.
        split: name of a column that says which rows are the test part.
        target: the target's column: its name, or else its index (-1 the last). A name comes before an index.
        id: name of the column that says what a row is called; it is no feature.
        task: ``regression``, ``classification``, or ``auto`` to see from the target.
        header: whether the first line names the columns.
        separator: ``auto``, ``comma``, ``semicolon``, ``tab``, ``whitespace``, or the character itself.
        encoding: of text, such as ``latin-1``; ``auto``: UTF-8, else as Windows writes.
        sheet: of Excel: its name, or its number from 0.
        decimal: ``.`` or ``,``; ``auto`` to see from the columns.
        day_first: of dates such as 03/04/2021; None to see from the columns. Dates with points have the day
            first, unless their cells tell otherwise.
        empty: words that mean an empty cell, besides the usual ones.
        drop: names of columns that are no features, such as a row's number or date.
        keep: names of columns that are features, though they name rows or are constant.
        one_hot: names of columns of categories that look like numbers.
        max_levels: most columns that a category becomes.
        missing: ``impute`` empty cells, ``refuse`` them, or ``drop`` their rows.
        standardise: whether numbers, and the target of a regression, are standardised.
        transform: preprocessing of one's own: see :func:`fimo.data.preprocessing.transformed`. Its values are
            taken as they come.
        target_transform: the same for the target of a regression; its inverse is used for display.
    """

    def __init__(
        self,
        path: str,
        target: str | int = -1,
        task: str = "auto",
        header: bool = True,
        separator: str = "auto",
        encoding: str = "auto",
        drop: Sequence[str | int] = (),
        one_hot: Sequence[str | int] = (),
        missing: str = "impute",
        name: str | None = None,
        batch_size: int = 32,
        test_size: float = SHARE,
        split_seed: int = 0,
        id: str | int | None = None,
        test_path: str | None = None,
        split: str | int | None = None,
        sheet: str | int = 0,
        decimal: str = "auto",
        day_first: bool | None = None,
        empty: Sequence[str] = (),
        keep: Sequence[str | int] = (),
        max_levels: int = 50,
        standardise: bool = True,
        transform: Callable[[pd.DataFrame], Any] | None = None,
        target_transform: Callable[[pd.Series], Any] | None = None,
    ) -> None:
        super().__init__(name or Path(path).stem, task, batch_size, test_size, split_seed, standardise)
        if missing not in MISSING:
            raise InputError("dataset.missing", f"expected {', '.join(MISSING)} but got {missing!r}")
        if decimal not in ("auto", ".", ","):
            raise InputError("dataset.decimal", f"expected auto, '.' or ',' but got {decimal!r}")
        if max_levels < 2:
            raise InputError("dataset.max_levels", f"expected at least 2 but got {max_levels}")
        if test_path is not None and split is not None:
            raise InputError("dataset.split", "expected either dataset.test_path or dataset.split")
        if test_size != SHARE and (test_path is not None or split is not None):
            problem = f"the data have a test part, of which no share is held out ({test_size}); leave it out"
            raise InputError("dataset.test_size", problem)
        self.path, self.test_path, self.target = Path(path), test_path, target
        self.id, self.split = (None if column is None else str(column) for column in (id, split))
        self.form = Form(header, separator, encoding, sheet, "," if decimal == "," else ".", self.id)
        self.decimal, self.missing, self.max_levels = decimal, missing, max_levels
        self.drop, self.one_hot, self.keep = (list(map(str, names)) for names in (drop, one_hot, keep))
        self.choices = Choices(
            tuple(self.one_hot), tuple(self.keep), tuple(map(str, empty)), decimal, day_first
        )
        self.transform, self.target_transform = transform, target_transform

    def read(self) -> Table:
        frame, sources, said = self._read_files()
        rest, target = pick_target(frame, self.target)
        self._check_names(list(map(str, frame)), str(target.name))
        said_of_target, target = mixes_percent(target), target_values(target, self.choices.decimal)
        if said_of_target and pd.api.types.is_numeric_dtype(target):
            said = (*said, f"{target.name} {said_of_target}")
        rest = rest.drop(columns=[c for c in (*self.drop, self.id, self.split) if c is not None])
        own, said_of_parts = self._own_parts(frame, sources)
        if self.missing == "drop":
            kept = np.flatnonzero(filled(rest, self.choices).notna().all(axis=1) & target.notna())
            said = (*said, f"{len(frame) - len(kept)} of {len(frame)} rows have empty cells and are dropped")
            frame, rest = (part.iloc[kept].reset_index(drop=True) for part in (frame, rest))
            target, sources = target.iloc[kept].reset_index(drop=True), sources.some(kept)
            if own is not None:
                own = np.flatnonzero(np.isin(kept, own[0])), np.flatnonzero(np.isin(kept, own[1]))
        shown, self._columns, said_of_columns = self._decided(rest, sources)
        read = [str(target.name), *map(str, shown), *([] if self.split is None else [self.split])]
        sources = sources.with_names(frame, self.id, read)
        return Table(
            shown, target, origin=sources, parts=own, decisions=(*said, *said_of_parts, *said_of_columns)
        )

    def inputs_of(self, table: Table, train: np.ndarray, sources: Sources) -> np.ndarray:
        if self.transform is not None:
            return transformed(self.transform, table.features, train)
        if self._columns is None:
            return super().inputs_of(table, train, sources)
        made = features(self._columns, train, self.max_levels)
        self.decisions = (*self.decisions, *made.decisions)
        return self.scaled(made.values, made.indicators, train)

    def table(self) -> pd.DataFrame:
        return as_written(self.path, self.form)

    def target_scale(self, target: pd.Series, train: np.ndarray) -> Scale:
        if self.target_transform is not None:
            return OwnScale(self.target_transform, target, train)
        return super().target_scale(target, train)

    def _read_files(self) -> tuple[pd.DataFrame, Sources, tuple[str, ...]]:
        """Return the rows of the file, or of both, one after the other, and where they are."""
        files = [("dataset.path", self.path)]
        if self.test_path is not None and Path(self.test_path).resolve() == self.path.resolve():
            raise InputError("dataset.test_path", "is dataset.path itself; test rows must be others")
        files += [] if self.test_path is None else [("dataset.test_path", Path(self.test_path))]
        read = [read_file(path, self.form, key) for key, path in files]
        guessed = {path.name: encoding for (_, path), (_, _, encoding) in zip(files, read, strict=True)}
        said = [f"{name} is read as {e} (dataset.encoding)" for name, e in guessed.items() if e]
        if self.decimal == "auto" and any(has_decimal_commas(frame) for frame, _, _ in read):
            read = [read_file(path, replace(self.form, decimal=","), key) for key, path in files]
            self.choices = replace(self.choices, decimal=",")
            said.append("numbers are read with decimal commas (dataset.decimal)")
        origins = tuple(
            Origin(np.arange(len(frame)), None, path.name, line)
            for (_, path), (frame, line, _) in zip(files, read, strict=True)
        )
        frame = read[0][0]
        if len(read) == 2:
            other = read[1][0]
            if lacking := [c for c in frame if c not in other]:
                hint = nearest(str(lacking[0]), list(map(str, other)))
                raise InputError(
                    "dataset.test_path", f"{self.test_path} has no column {lacking[0]!r}; {hint}"
                )
            frame = pd.concat([frame, other[list(frame)]], ignore_index=True)
        return frame, Sources(origins), tuple(said)

    def _own_parts(
        self, frame: pd.DataFrame, sources: Sources
    ) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple[str, ...]]:
        if self.split is not None:
            train, test, said = parts(frame[self.split], sources.where)
            return (train, test), (said,)
        if self.test_path is None:
            return None, ()
        first = len(sources.files[0])
        return (np.arange(first), np.arange(first, len(frame))), ()

    def _decided(
        self, rest: pd.DataFrame, sources: Sources
    ) -> tuple[pd.DataFrame, list[Column] | None, tuple[str, ...]]:
        """Return the features as they are shown, what they are (None: numbers all), and what was decided."""
        if self.transform is not None:
            return rest, None, ("features are what dataset.transform makes of them",)
        if not self.one_hot and is_plain(rest):
            return rest, None, tuple(noticed(rest, self.keep))
        columns = decide(rest, self.choices, sources.where)
        aside = [c for c in columns if c.role == "aside"]
        used = [c for c in columns if c.role != "aside"]
        if not used:
            said = "; ".join(f"{c.name} {c.said}" for c in aside)
            raise InputError("dataset.path", f"there is no feature column besides the target ({said})")
        numbers = pd.DataFrame({c.name: c.values for c in used if c.role == "number"})
        if len(numbers.columns):
            check_numeric(numbers.fillna(0.0), where=sources.where)
        if self.missing == "refuse":
            refuse_empty(used, sources.where)
        read = {c.name: c.values for c in used if c.role in ("number", "category")}
        shown = rest[[c.name for c in used]].assign(**read)
        return shown, used, tuple(said_of_aside(aside, self.id is not None))

    def _check_names(self, columns: list[str], target: str) -> None:
        """Refuse names of columns that are not there, or are the target's."""
        for key, name in (("id", self.id), ("split", self.split)):
            if name is not None and name not in columns:
                raise InputError(f"dataset.{key}", f"no column {name!r}; {nearest(name, columns)}")
            if name is not None and name == target:
                raise InputError(f"dataset.{key}", f"column {name!r} is the target")
        others = [c for c in columns if c not in (target, self.id, self.split)]
        for key, names in (("drop", self.drop), ("one_hot", self.one_hot), ("keep", self.keep)):
            for name in names:
                if name not in others and not (key == "drop" and name in (self.id, self.split)):
                    raise InputError(f"dataset.{key}", f"no feature column {name!r}; {nearest(name, others)}")
