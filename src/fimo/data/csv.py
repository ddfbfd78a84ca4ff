"""Any table in a text file."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fimo.data.origin import Origin, first_line
from fimo.data.tabular import Table, TabularModule, pick_target
from fimo.errors import InputError, nearest

log = logging.getLogger(__name__)

EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)
"""For ``pandas.read_csv``: numbers become the nearest float, as they do by default from pandas 3.1 on."""

SEPARATORS = {"auto": None, "comma": ",", "semicolon": ";", "tab": "\t", "whitespace": r"\s+"}


class CsvData(TabularModule):
    """A table read from ``path``; every column but the target is a feature.

    Args:
        path: of the file.
        target: the target's column: its name, or its index (-1 the last).
        header: whether the first line names the columns.
        separator: ``auto``, ``comma``, ``semicolon``, ``tab``, ``whitespace``, or the character itself.
        encoding: of the file, such as ``utf-8`` or ``latin-1``.
        drop: names of columns that are no features, such as a row's number or date.
        one_hot: names of columns of categories; each becomes a column of zeros and ones per category.
        missing: ``refuse`` a table with empty cells, or ``drop`` their rows.
        id: name of the column that says what a row is called; it is no feature.
    """

    def __init__(
        self,
        path: str,
        target: str | int = -1,
        task: str = "regression",
        header: bool = True,
        separator: str = "auto",
        encoding: str = "utf-8",
        drop: Sequence[str | int] = (),
        one_hot: Sequence[str | int] = (),
        missing: str = "refuse",
        name: str | None = None,
        batch_size: int = 32,
        test_size: float = 0.1,
        split_seed: int = 0,
        id: str | int | None = None,
    ) -> None:
        super().__init__(name or Path(path).stem, task, batch_size, test_size, split_seed)
        if missing not in ("refuse", "drop"):
            raise InputError("dataset.missing", f"expected refuse or drop but got {missing!r}")
        self.path, self.target, self.header, self.separator = Path(path), target, header, separator
        self.encoding, self.missing = encoding, missing
        self.id = None if id is None else str(id)
        self.drop, self.one_hot = list(map(str, drop)), list(map(str, one_hot))

    def read(self) -> Table:
        frame = read_frame(self.path, self.header, self.separator, self.encoding)
        features, target = pick_target(frame, self.target)
        read = [c for c in frame.columns if c not in self.drop]
        line = first_line(self.path.read_text(self.encoding), len(frame), self.header)
        origin = Origin.of_frame(frame, self.id, read, self.path.name, line)
        if self.id == target.name:
            raise InputError("dataset.id", f"column {self.id!r} is the target")
        features = features.drop(columns=[] if self.id is None else [self.id])
        for key, columns in (("drop", self.drop), ("one_hot", self.one_hot)):
            for column in columns:
                if column not in features:
                    hint = nearest(column, list(features.columns))
                    raise InputError(f"dataset.{key}", f"no feature column {column!r}; {hint}")
        features = features.drop(columns=self.drop)
        if self.missing == "drop":
            kept = features.notna().all(axis=1) & target.notna()
            log.info("%d of %d rows have empty cells and are dropped", len(kept) - kept.sum(), len(kept))
            features, target = features[kept].reset_index(drop=True), target[kept].reset_index(drop=True)
            origin = origin[np.flatnonzero(kept)]
        for column in self.one_hot:
            if features[column].isna().any():
                where = origin.where(int(np.flatnonzero(features[column].isna())[0]))
                raise InputError("dataset.one_hot", f"column {column!r} has a missing value in {where}")
        numbers = list(features.columns.difference(self.one_hot, sort=False))
        encoded = pd.get_dummies(features, columns=self.one_hot, prefix_sep="=", dtype=float)
        indicators = tuple(c for c in encoded.columns if c not in numbers)
        return Table(encoded, target, indicators=indicators, origin=origin)


def read_frame(path: Path, header: bool | None, separator: str, encoding: str = "utf-8") -> pd.DataFrame:
    """Read a text table.

    Args:
        header: whether the first line names the columns; None to see from whether it holds numbers only.

    Raises:
        InputError: naming ``dataset.path``: no such file, or not a table.
    """
    if not path.is_file():
        problem = f"expected a file but {path} is a folder" if path.is_dir() else f"no such file: {path}"
        raise InputError("dataset.path", problem)
    encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    try:
        text = path.read_text(encoding=encoding)
    except UnicodeError:
        problem = f"{path} is not {encoding.removesuffix('-sig')} text; set dataset.encoding, such as latin-1"
        raise InputError("dataset.path", f"{problem} or utf-16") from None
    except LookupError:
        raise InputError("dataset.encoding", f"Python knows no encoding {encoding!r}") from None
    if not text.strip():
        raise InputError("dataset.path", f"{path} is empty")
    if separator not in SEPARATORS and len(separator) != 1:
        allowed = ", ".join(SEPARATORS)
        raise InputError("dataset.separator", f"expected {allowed} or one character but got {separator!r}")
    found = SEPARATORS.get(separator, separator) or guess_separator(text)
    _check_lines(path, text, found)
    first = next(line for line in text.splitlines() if line.strip())
    pattern = found if found == r"\s+" else re.escape(found)
    numbers_only = all(_is_number(cell) for cell in re.split(pattern, first.strip()))
    if header and numbers_only:
        raise InputError(
            "dataset.header", f"the first line of {path} holds numbers only; set dataset.header=false"
        )
    header = not numbers_only if header is None else header
    if header and len(found) == 1:
        names = [name.strip() for name in next(csv.reader([first], delimiter=found))]
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise InputError("dataset.path", f"{path} has several columns named {twice[0]!r}; rename them")
    try:
        frame: pd.DataFrame = pd.read_csv(
            path, sep=found, header=0 if header else None, encoding=encoding, skipinitialspace=True, **EXACT
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError("dataset.path", f"{path} is not a table separated by {found!r} ({reason})") from None
    if frame.shape[1] < 2:
        raise InputError("dataset.separator", f"{path} has one column only when separated by {found!r}")
    return frame if header else frame.rename(columns=str)


def guess_separator(text: str) -> str:
    """Return the separator that (nearly) all first lines agree on: comma, semicolon, tab, else whitespace."""
    lines = [line for line in text.splitlines()[:20] if line.strip()]
    for least in (1.0, 0.8):  # a line of another length is said to be wrong, not its separator
        for candidate in (",", ";", "\t"):
            widths = Counter(len(row) for row in csv.reader(lines, delimiter=candidate))
            width, count = widths.most_common(1)[0]
            if width > 1 and count >= least * widths.total():
                return candidate
    return r"\s+"


def _check_lines(path: Path, text: str, separator: str) -> None:
    """Refuse a line that has more cells than the first; pandas might take some for an index.

    Raises:
        InputError: ``dataset.path``, naming the line.
    """
    if len(separator) > 1 or '"' in text:  # quoted cells may go over several lines
        return
    lines = [(k, line) for k, line in enumerate(text.splitlines(), 1) if line.strip()]
    width = lines[0][1].count(separator)
    for number, line in lines:
        if (count := line.count(separator)) > width:
            cells = f"line {number} has {count + 1} cells where the first has {width + 1}"
            raise InputError("dataset.path", f"{path} is not a table separated by {separator!r}: {cells}")


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True
