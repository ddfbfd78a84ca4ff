"""Cells of text as numbers, dates and truth values, a whole column at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

EMPTY = ("?", "-", "--", "---", "\N{EN DASH}", "\N{EM DASH}", ".", "na", "n.a.", "n/a", "nan", "none", "null",
         "(null)", "nil", "missing", "#n/a")  # fmt: skip
"""Cells that say that they are empty, in any case of letters."""

TRUTHS = (
    ("false", "true"), ("f", "t"), ("no", "yes"), ("n", "y"), ("off", "on"), ("nein", "ja"), ("n", "j"),
    ("non", "oui"), ("no", "si"), ("no", "sí"), ("falsch", "wahr"), ("nee", "ja"), ("nej", "ja"),
)  # fmt: skip
"""Pairs of words for 0 and 1."""

SPACES = " '\u2019\u00a0\u202f\u2009"
"""What separates thousands besides points and commas."""

AROUND = r"^[\s€$£¥]+|[\s€$£¥%]+$"


def filled(column: pd.Series, empty: tuple[str, ...] = ()) -> pd.Series:
    """Return a column of text, stripped, whose cells that say that they are empty are NaN.

    Args:
        empty: more words for an empty cell, besides :data:`EMPTY`.
    """
    words = {w.casefold() for w in (*EMPTY, *empty, "")}
    codes, levels = pd.factorize(column)  # each value once: columns are long, and their values few
    stripped = [text if (text := str(v).strip()).casefold() not in words else np.nan for v in levels]
    return pd.Series(np.array([*stripped, np.nan], dtype=object)[codes], column.index, name=column.name)


def by_level(text: pd.Series, read: Callable[[pd.Series], pd.Series]) -> pd.Series:
    """Return what a function of cells makes of a column, asked of each different cell once."""
    levels = levels_of(text)
    known = text.notna()
    positions = pd.Index(levels).get_indexer(pd.Index(text[known]))
    found = read(levels)
    return found.take(positions).set_axis(text.index[known]).reindex(text.index)


def levels_of(text: pd.Series) -> pd.Series:
    """Return a column's different cells, those that are not empty."""
    return pd.Series(text.dropna().unique(), dtype=object)


def numbers(text: pd.Series, comma: bool) -> pd.Series:
    """Return cells as float64, NaN where they are no numbers.

    Args:
        text: stripped cells, NaN where empty.
        comma: whether decimals follow a comma and thousands a point, or the other way round. Currency and per
            cent signs around a number are left out.
    """
    point, thousands = (",", ".") if comma else (".", ",")
    cells = text.astype(str).str.replace(AROUND, "", regex=True).str.replace("\N{MINUS SIGN}", "-")
    separators = re.escape(thousands + SPACES)
    number = (
        rf"[+-]?(?:\d{{1,3}}(?:[{separators}]\d{{3}})+|\d+)(?:{re.escape(point)}\d*)?(?:[eE][+-]?\d+)?"
        rf"|[+-]?{re.escape(point)}\d+(?:[eE][+-]?\d+)?|[+-]?inf"
    )
    fits = text.notna() & cells.str.fullmatch(number, case=False)
    plain = cells[fits].str.replace(rf"[{separators}]", "", regex=True).str.replace(point, ".")
    return plain.map(float).reindex(text.index).astype(float)


def truths(text: pd.Series) -> pd.Series | None:
    """Return cells as 0.0 and 1.0, NaN where empty, or None where they are no pair of truth values."""
    found = {str(v).casefold() for v in text.dropna().unique()}
    for no, yes in TRUTHS:
        if found == {no, yes}:
            return text.astype(str).str.casefold().map({no: 0.0, yes: 1.0})
    return None


MONTH = r"(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
DATES = {
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}": None,
    r"\d{1,2}\.\d{1,2}\.\d{2,4}": True,
    r"\d{1,2}[/-]\d{1,2}[/-]\d{2,4}": "either",
    rf"\d{{1,2}}[. -]+{MONTH}[. -]+\d{{2,4}}|{MONTH} +\d{{1,2}},? +\d{{4}}": False,
}
"""Forms of dates, and whether the day comes before the month where both are numbers."""
TIME = r"(?:[T ]+\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[AaPp][Mm])?(?:Z| ?[+-]\d{2}:?\d{2})?)?"


def looks_like_dates(text: pd.Series) -> str | None:
    """Return the form of dates that all cells have, one of :data:`DATES`; None where they have none."""
    cells = text.dropna().astype(str)
    first = cells.iloc[:20]
    for form in DATES:
        whole = f"(?:{form}){TIME}"
        if first.str.fullmatch(whole).all() and cells.str.fullmatch(whole).all():
            return form
    return None


def day_first(text: pd.Series, form: str) -> bool | None:
    """Return whether days come before months, or None where the dates don't tell."""
    known = DATES[form]
    if known != "either":
        return bool(known)
    parts = text.dropna().astype(str).str.extract(r"^(\d{1,2})[/-](\d{1,2})").astype(int)
    if (parts[0] > 12).any():
        return True
    return False if (parts[1] > 12).any() else None


def dates(text: pd.Series, day_first: bool) -> pd.Series | None:
    """Return cells as times without a zone (UTC); None where some are no dates."""
    read = pd.to_datetime(text, format="mixed", dayfirst=day_first, errors="coerce", utc=True)
    return None if read.isna().any() else read.dt.tz_localize(None)
