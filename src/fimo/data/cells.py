"""Cells of text as numbers, dates and truth values, a whole column at a time."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from fimo.errors import InputError

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

    Raises:
        InputError: ``dataset.path``: the cells are lists or records.
    """
    if is_nested(column):
        raise InputError(
            "dataset.path",
            f"column {str(column.name)!r} holds lists or records, not single values; leave it out with "
            f"dataset.drop=[{column.name}]",
        )
    words = {w.casefold() for w in (*EMPTY, *empty, "")}
    codes, levels = pd.factorize(column)  # each value once: columns are long, and their values few
    stripped = [text if (text := str(v).strip()).casefold() not in words else np.nan for v in levels]
    return pd.Series(np.array([*stripped, np.nan], dtype=object)[codes], column.index, name=column.name)


def is_nested(column: pd.Series) -> bool:
    """Return whether some cells are lists, arrays or records, as parquet and JSON may have them."""
    if not pd.api.types.is_object_dtype(column):
        return False
    return any(isinstance(value, (list, dict, set, np.ndarray)) for value in column)


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


def mixes_percent(column: pd.Series) -> str:
    """Return what is to be said where some cells have a per cent sign and others don't; else nothing."""
    if pd.api.types.is_numeric_dtype(column) or is_nested(column):
        return ""
    levels = [text for value in levels_of(column) if (text := str(value).strip()).casefold() not in EMPTY]
    with_sign, without = ([t for t in levels if t.endswith("%") is sign and t] for sign in (True, False))
    if not with_sign or not without:
        return ""
    return f"has {with_sign[0]} and {without[0]}: cells with and without % are read alike"


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
"""Forms of dates, and whether the day usually comes before the month where both are numbers."""
SHORT_YEAR = re.compile(
    rf"^(?P<before>\d{{1,2}}[./-]\d{{1,2}}[./-]|\d{{1,2}}[. -]+{MONTH}[. -]+)(?P<year>\d{{2}})(?!\d)"
)
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


def day_first(text: pd.Series, form: str, given: bool | None = None) -> bool | None:
    """Return whether days come before months, or None where the dates don't tell.

    Args:
        form: one of :data:`DATES`.
        given: what the user says of dates such as 03/04/2021. Those with points have the day first, unless
            their cells tell otherwise.

    Raises:
        InputError: ``dataset.day_first``: some cells have the day first and others the month, or some can't
            be dates as it is given.
    """
    known = DATES[form]
    if known is False or known is None:
        return False
    cells = text.dropna().astype(str)
    parts = cells.str.extract(r"^(\d{1,2})[./-](\d{1,2})").astype(int)
    day, month = (cells[(parts[one] > 12) & (parts[other] <= 12)] for one, other in ((0, 1), (1, 0)))
    column = f"column {str(text.name)!r} has "
    remedy = (
        f"; dataset.one_hot=[{text.name}] takes them for categories, dataset.drop=[{text.name}] leaves it out"
    )
    if len(day) and len(month):
        problem = f"{day.iloc[0]} with the day first and {month.iloc[0]} with the month first"
        raise InputError("dataset.day_first", column + problem + remedy)
    if given is not None and (given or known == "either"):
        if len(against := month if given else day):
            first = "day" if given else "month"
            problem = f"{against.iloc[0]}, which is no date with the {first} first"
            raise InputError("dataset.day_first", column + problem + remedy)
        return given
    if len(day):
        return True
    return False if len(month) else True if known is True else None


def has_short_years(text: pd.Series) -> bool:
    """Return whether some dates have years of two digits."""
    return bool(text.dropna().astype(str).map(SHORT_YEAR.match).notna().any())


def dates(text: pd.Series, day_first: bool) -> pd.Series | None:
    """Return cells as times without a zone (UTC); None where some are no dates.

    Years of two digits are 1969 to 2068, whatever the year is now.
    """

    def whole(date: re.Match[str]) -> str:
        return f"{date['before']}{'19' if int(date['year']) >= 69 else '20'}{date['year']}"

    text = text.astype(str).str.replace(SHORT_YEAR, whole, regex=True).where(text.notna())
    read = pd.to_datetime(text, format="mixed", dayfirst=day_first, errors="coerce", utc=True)
    return None if read.isna().any() else read.dt.tz_localize(None)
