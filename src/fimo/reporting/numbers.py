"""Numbers and times as people write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SUPERSCRIPTS = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"


def duration(seconds: float) -> str:
    """Return seconds as people say them: 0.35 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def number(value: Any, digits: int = 4) -> str:
    """Return a value for a table's cell: a number with a true minus sign and no needless zeros."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value)}".replace("-", MINUS)
    if 10**digits <= abs(value) < 1e9:  # 226830, without an exponent
        return f"{value:.0f}".replace("-", MINUS)
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa.replace("-", MINUS) + (
        f" \N{MULTIPLICATION SIGN} {power(int(exponent))}" if exponent else ""
    )


def power(exponent: int) -> str:
    """Return a power of ten in superscript digits."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", SUPERSCRIPTS))


@dataclass(frozen=True)
class Unit:
    """A power of ten that a column of small numbers shares; ``label`` is empty where none is needed."""

    size: float
    label: str

    def digits(self, errors: Sequence[float | None]) -> int:
        """Return the decimals with which values and their errors are written: 2, or 3 for small errors."""
        known = [e / self.size for e in errors if e]
        return 3 if known and min(known) < 0.01 else 2

    @classmethod
    def of(cls, values: Sequence[float]) -> Unit:
        largest = max(map(abs, values), default=0.0)
        exponent = math.floor(math.log10(largest)) if largest > 0 else 0
        if -1 <= exponent <= 3:
            return cls(1.0, "")
        return cls(10.0**exponent, f"\N{MULTIPLICATION SIGN} {power(exponent)}")
