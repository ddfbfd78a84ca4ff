"""Any table in a text file."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pandas as pd

from fimo.data.tabular import Table, TabularModule, pick_target
from fimo.errors import InputError

SEPARATORS = {"auto": None, "comma": ",", "semicolon": ";", "tab": "\t", "whitespace": r"\s+"}


class CsvData(TabularModule):
    """A table read from ``path``; every column but the target is a feature.

    Args:
        path: of the file.
        target: the target's column: its name, or its index (-1 the last).
        header: whether the first line names the columns.
        separator: ``auto``, ``comma``, ``semicolon``, ``tab``, ``whitespace``, or the character itself.
    """

    def __init__(
        self,
        path: str,
        target: str | int = -1,
        task: str = "regression",
        header: bool = True,
        separator: str = "auto",
        name: str | None = None,
        batch_size: int = 32,
        test_size: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        super().__init__(name or Path(path).stem, task, batch_size, test_size, split_seed)
        self.path, self.target, self.header, self.separator = Path(path), target, header, separator

    def read(self) -> Table:
        frame = read_frame(self.path, self.header, self.separator)
        return Table(*pick_target(frame, self.target))


def read_frame(path: Path, header: bool | None, separator: str) -> pd.DataFrame:
    """Read a text table.

    Args:
        header: whether the first line names the columns; None to see from whether it holds numbers only.

    Raises:
        InputError: naming ``dataset.path``: no such file, or not a table.
    """
    if not path.is_file():
        raise InputError("dataset.path", f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("dataset.path", f"{path} is not a UTF-8 text file") from None
    if not text.strip():
        raise InputError("dataset.path", f"{path} is empty")
    found = SEPARATORS.get(separator, separator) or guess_separator(text)
    first = next(line for line in text.splitlines() if line.strip())
    numbers_only = all(_is_number(cell) for cell in re.split(found, first.strip()))
    if header and numbers_only:
        raise InputError(
            "dataset.header", f"the first line of {path} holds numbers only; set dataset.header=false"
        )
    header = not numbers_only if header is None else header
    try:
        frame = pd.read_csv(
            path, sep=found, header=0 if header else None, encoding="utf-8-sig", skipinitialspace=True
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError("dataset.path", f"{path} is not a table separated by {found!r} ({error})") from None
    if frame.shape[1] < 2:
        raise InputError("dataset.separator", f"{path} has one column only when separated by {found!r}")
    return frame if header else frame.rename(columns=str)


def guess_separator(text: str) -> str:
    """Return the separator that the first lines agree on: comma, semicolon, tab, else whitespace."""
    lines = [line for line in text.splitlines()[:20] if line.strip()]
    for candidate in (",", ";", "\t"):
        widths = {len(row) for row in csv.reader(lines, delimiter=candidate)}
        if len(widths) == 1 and widths.pop() > 1:
            return candidate
    return r"\s+"


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True
