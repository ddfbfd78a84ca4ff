"""Lines of text tables: as many cells as the first has, and quotation marks that close."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fimo.errors import InputError


def check_lines(path: Path, text: str, separator: str, key: str, **quoting: Any) -> None:
    """Refuse a line with more cells than the first (pandas might take some for an index), and broken quotes.

    A quoted cell may go over several lines. It is broken where it is never closed, where text follows its
    closing mark, and where the lines that it holds are whole rows: then rows are lost in it.

    Args:
        path: for errors.
        quoting: choices of ``csv.reader``, by which cells are read.

    Raises:
        InputError: naming the line.
    """
    if len(separator) > 1:
        return
    limit = csv.field_size_limit(len(text) + 1)  # else a cell of more than 131072 characters is an error
    try:
        rows = _quoted_rows(text, separator, **quoting) if '"' in text else _rows(text, separator)
        first, suspects = 0, []
        for number, width, lines in rows:
            first = first or width
            if len(lines) > 1:
                began = _last_opened(path, key, number, "".join(lines), separator, **quoting)
                cells = [line.rstrip("\n").split(separator) for line in lines if line.strip()]
                if first > 1 and all(len(row) == first for row in cells):
                    suspects.append((began, number + len(lines) - 1, cells))
            if width > first:
                said = f"line {number} has {width} cells where the first has {first}"
                raise InputError(key, f"{path} is not a table separated by {separator!r}: {said}")
        if suspects and (lost := _holding_rows(text, separator, first, suspects, **quoting)) is not None:
            began, last = lost
            problem = f"the quoted cell that begins in line {began} holds whole rows, up to line {last}"
            raise InputError(key, f"{path}: {problem}; {CLOSE}")
    finally:
        csv.field_size_limit(limit)


CLOSE = 'close it (a " that is text is written "")'


def _rows(text: str, separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the number of each line that is not blank, how many cells it has, and itself."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.count(separator) + 1, [line]


def _quoted_rows(text: str, separator: str, **quoting: Any) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the same of rows with quoted cells, which may go over several lines; the first is named."""
    lines: list[str] = []

    def read() -> Iterator[str]:
        for line in io.StringIO(text):
            lines.append(line)
            yield line

    reader = csv.reader(read(), delimiter=separator, **quoting)
    for row in reader:
        if len(row) > 1 or any(map(str.strip, row)):
            yield reader.line_num - len(lines) + 1, len(row), lines
        lines = []


def _last_opened(
    path: Path, key: str, number: int, row: str, separator: str, skipinitialspace: bool = False, **_: Any
) -> int:
    """Return the line where a row's last cell of several lines begins.

    Args:
        number: of the row's first line.
        row: its lines as they are written.

    Raises:
        InputError: such a cell is never closed, or followed by text.
    """
    cell = _cell(separator, skipinitialspace)
    position, found = 0, number
    while position < len(row):
        match = cell.match(row, position)
        assert match is not None  # a cell may be empty
        content, closed, after = match.groups()
        if content is not None and (not closed or "\n" in content):
            found = number + row.count("\n", 0, position)
            said = f"{path}: the quoted cell that begins in line {found}"
            if not closed:
                raise InputError(key, f"{said} is never closed; {CLOSE}")
            if after.strip():
                last = number + row.count("\n", 0, match.end())
                raise InputError(key, f"{said} is followed by text in line {last}; {CLOSE}")
        position = match.end() + 1
    return found


@functools.cache
def _cell(separator: str, skipinitialspace: bool) -> re.Pattern[str]:
    """Return what a cell matches; of a quoted one its content, its closing mark, and text behind that."""
    rest = f"[^{re.escape(separator)}\n]*"
    return re.compile(rf'{" *" if skipinitialspace else ""}"([^"]*(?:""[^"]*)*)("?)({rest})|{rest}')


def _holding_rows(
    text: str,
    separator: str,
    width: int,
    suspects: Sequence[tuple[int, int, list[list[str]]]],
    **quoting: Any,
) -> tuple[int, int] | None:
    """Return the first and the last line of a quoted cell that holds whole rows; None where there is none.

    In one column, such as that of labels, its lines have what other rows have there. Of two lines alone
    numbers don't tell, since a text may end in ``4,5``.

    Args:
        suspects: quoted cells, whose lines have as many cells as other rows.
    """
    telling, wanted = [], [set[str]() for _ in range(width)]
    for began, last, cells in suspects:
        for k, values in enumerate(map(set, zip(*cells, strict=True))):
            if "" not in values and (len(cells) > 2 or not all(map(is_number, values))):
                telling.append((began, last, k, values))
                wanted[k] |= values
    others = [set[str]() for _ in range(width)]
    for _, _, lines in _quoted_rows(text, separator, **quoting):
        if len(lines) == 1 and len(row := lines[0].rstrip("\n").split(separator)) == width:
            for k, cell in enumerate(row):
                if cell in wanted[k]:
                    others[k].add(cell)
    return next(((began, last) for began, last, k, values in telling if values <= others[k]), None)


def is_number(text: object) -> bool:
    """Return whether Python reads it as a number."""
    try:
        float(str(text))
    except ValueError:
        return False
    return True
