"""Tables of many numbers as CSV text, as pandas writes them, in a third of the time.

pandas makes each number's text by NumPy, which takes most of the time. Arrow finds the same shortest digits a
few times as fast; numbers that the two put down in another form (whole, very small or large ones) are left to
NumPy.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CELLS = 2**21
"""That are written at a time."""

PLAIN = (1e-3, 1e6)
"""Sizes of numbers that are not whole within which the text is digits and a point."""


def write_csv(table: pd.DataFrame, path: Path, header: bool = True) -> None:
    """Write a table, without its index, byte for byte as ``DataFrame.to_csv`` does.

    Args:
        header: whether the first line names the columns.

    Raises:
        OSError: the disk is full or not writable.
    """
    numbers = [dtype in (np.float32, np.float64) for dtype in table.dtypes]
    # runs of other columns are made one by one, which few of a wide table's numbers pay for
    fast = len(numbers) > 1 and 2 * sum(numbers) > len(numbers)
    rows = max(1, CELLS // max(1, len(numbers)))
    with path.open("wb") as file:
        file.write(_by_pandas(table[:0], header))
        for start in range(0, len(table), rows):
            part = table.iloc[start : start + rows]
            file.write((_joined(part, numbers) if fast else None) or _by_pandas(part))


def _by_pandas(part: pd.DataFrame, header: bool = False) -> bytes:
    text: str = part.to_csv(index=False, header=header, lineterminator="\n")
    return text.encode()


def _joined(part: pd.DataFrame, numbers: list[bool]) -> memoryview | None:
    """Return the lines of some rows; None where a cell goes over several.

    Args:
        numbers: which columns hold floating-point numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    cells: list[Any] = []
    for number, run in itertools.groupby(range(len(numbers)), numbers.__getitem__):
        columns = list(run)
        if number:
            cells += [_texts(part.iloc[:, k].to_numpy()) for k in columns]
            continue
        lines = _by_pandas(part.iloc[:, columns]).split(b"\n")[:-1]
        if len(lines) != len(part):
            return None
        if len(columns) == 1:  # alone in its line, an empty cell is quoted
            lines = [b"" if line == b'""' else line for line in lines]
        cells.append(pa.array(lines, pa.large_string()))
    comma, end, nothing = (pa.scalar(text, pa.large_string()) for text in (",", "\n", ""))
    cells[-1] = pc.binary_join_element_wise(cells[-1], end, nothing)
    joined = pc.binary_join_element_wise(*cells, comma)
    _, offsets, content = joined.buffers()  # one line behind another
    return memoryview(content)[: np.frombuffer(offsets, np.int64)[len(part)]]


def _texts(values: np.ndarray) -> Any:
    """Return an Arrow array of the texts of numbers ``[n]``; empty for NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = pc.cast(pa.array(values), pa.large_string())
    size = np.abs(values)
    with np.errstate(invalid="ignore"):
        other = ~((size >= PLAIN[0]) & (size < PLAIN[1]) & (values != np.rint(values)))
    if other.any():
        left = values[other]
        by_numpy = np.where(np.isnan(left), "", left.astype(str))
        texts = pc.replace_with_mask(
            texts, pa.array(other), pa.array(by_numpy.astype(object), pa.large_string())
        )
    return texts
