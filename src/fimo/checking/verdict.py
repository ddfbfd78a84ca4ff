"""What a check found: lines that pass, warn or fail."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import pandas as pd

from fimo.store.files import written_aside


class Verdict(StrEnum):
    """Pass: can be trusted. Warn: read the text first. Fail: results would be wrong."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Line:
    """One part's verdict.

    Args:
        name: of the part.
        text: what was measured, on what, and what to do about it.
        value: the number that decided; NaN where there is none.
    """

    name: str
    verdict: Verdict
    text: str
    value: float = math.nan


@dataclass(frozen=True)
class Check:
    """A check's lines, in the order in which they were tried.

    Args:
        seconds: that it took.
    """

    lines: tuple[Line, ...]
    seconds: float = math.nan

    @property
    def passed(self) -> bool:
        """Whether no line failed; warnings pass."""
        return all(line.verdict != Verdict.FAIL for line in self.lines)

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __getitem__(self, name: str) -> Line:
        """Return the line of a part by its name."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def to_frame(self) -> pd.DataFrame:
        """Return ``verdict,name,text,value``, a row per line."""
        return pd.DataFrame(
            {
                "verdict": [str(line.verdict) for line in self.lines],
                "name": [line.name for line in self.lines],
                "text": [line.text for line in self.lines],
                "value": [line.value for line in self.lines],
            }
        )

    def save(self, path: Path) -> None:
        """Write ``check.json``: whether it passed, and the lines."""
        lines = [
            {**asdict(line), "value": line.value if math.isfinite(line.value) else None}
            for line in self.lines
        ]
        with written_aside(path) as aside:
            aside.write_text(
                json.dumps(
                    {"passed": self.passed, "seconds": round(self.seconds, 1), "lines": lines}, indent=1
                )
            )

    def __str__(self) -> str:
        width = max((len(line.name) for line in self.lines), default=0)
        shown = []
        for line in self.lines:
            text = textwrap.wrap(line.text, max(40, 108 - width)) or [""]
            shown.append(f"{line.verdict}  {line.name:{width}}  {text[0]}")
            shown += [f"{'':6}{'':{width}}  {more}" for more in text[1:]]
        counts = ", ".join(
            f"{sum(line.verdict == v for line in self.lines)} {v}"
            for v in (Verdict.PASS, Verdict.WARN, Verdict.FAIL)
        )
        return "\n".join(
            [*shown, f"{'passed' if self.passed else 'FAILED'}: {counts} ({self.seconds:.0f} s)"]
        )


def passes(name: str, text: str, value: float = math.nan) -> Line:
    return Line(name, Verdict.PASS, text, value)


def warns(name: str, text: str, value: float = math.nan) -> Line:
    return Line(name, Verdict.WARN, text, value)


def fails(name: str, text: str, value: float = math.nan) -> Line:
    return Line(name, Verdict.FAIL, text, value)
