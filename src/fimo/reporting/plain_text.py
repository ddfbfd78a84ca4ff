"""An answer as text for a terminal, a log file or an e-mail."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from fimo.reporting.answer import Answer, NamedRow
from fimo.reporting.numbers import MINUS, Unit

WIDEST = 110
"""Columns of a line that is still easily read."""


def as_text(answer: Answer, width: int | None = None) -> str:
    """Return the answer in lines of at most ``width`` columns; the terminal's when None (80 without one)."""
    return "\n".join(_lines(answer, width or terminal_width()))


def terminal_width() -> int:
    """Return the columns of a line: the terminal's, of those that are easily read; 80 without a terminal."""
    return max(40, min(shutil.get_terminal_size().columns, WIDEST))


def _lines(answer: Answer, width: int) -> Iterator[str]:
    yield from textwrap.wrap(answer.question, width)
    if answer.about:
        yield from textwrap.wrap(answer.about, width)
    yield ""
    for sentence in answer.verdict:
        yield from textwrap.wrap(sentence, width)
    rows = [*answer.helpful, *answer.harmful]
    if rows:
        unit = Unit.of([row.effect for row in rows])
        scaled = f" ({unit.label})" if unit.label else ""
        yield ""
        yield from textwrap.wrap(f"Change of the {answer.effects} without the row{scaled}:", width)
        yield from table(_cells(rows, unit), width)
    for title, sentences in (
        ("Why these predictions?", answer.why),
        ("How good is the ranking of the others?", answer.others),
        ("What to do", answer.do),
        ("What to distrust", answer.distrust),
    ):
        if sentences:
            yield ""
            yield title
            for sentence in sentences:
                yield from textwrap.wrap(sentence, width, initial_indent="- ", subsequent_indent="  ")
    if answer.files:
        yield ""
        widest = max(map(len, answer.files))
        beside = widest + 2 + max(map(len, answer.files.values())) <= width
        for name, what in answer.files.items():
            yield f"{name:<{widest}}  {what}" if beside else name  # a path is never broken
            yield from [] if beside else textwrap.wrap(f"  {what}", width, subsequent_indent="  ")


def _cells(rows: Sequence[NamedRow], unit: Unit) -> list[list[str]]:
    """Return a header and a line for each row, without columns that are empty throughout."""
    digits = unit.digits([row.error for row in rows])
    lines = [["", "effect", "verdict", "target", "model says", "values"]]
    for row in rows:
        error = "" if row.error is None else f" ± {row.error / unit.size:.{digits}f}"
        effect = f"{row.effect / unit.size:+.{digits}f}".replace("-", MINUS) + error
        lines.append([row.name, effect, row.verdict, row.target, row.prediction, row.line])
    filled = [k for k in range(len(lines[0])) if any(line[k] for line in lines[1:])]
    return [[line[k] for k in filled] for line in lines]


def table(lines: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yield lines of a table whose last column is cut where the width ends.

    Args:
        lines: cells; the first line has the columns' names.
    """
    most = max(12, width // 4)
    cut = [[cell if len(cell) <= most else f"{cell[: most - 1]}…" for cell in line[:-1]] for line in lines]
    widths = [max(len(line[k]) for line in cut) for k in range(len(lines[0]) - 1)]
    for cells, line in zip(cut, lines, strict=True):
        start = "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        text = (start + " ".join(line[-1].split())).rstrip()
        yield text if len(text) <= width else f"{text[: width - 1]}…"
