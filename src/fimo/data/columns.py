"""What each column of a table as people have them is: a number, a category, a date, or no feature at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from fimo.data import cells
from fimo.errors import InputError

Role = Literal["number", "truth", "category", "date", "aside"]

FEW_OTHERS = 0.05
"""Cells that are no numbers, of a column of numbers: so few are rather mistakes than categories."""
FEW_LEVELS = 10
"""Values of text that are categories in any case (``0, 1, 2, 3+``)."""
MANY_LEVELS = 0.5
"""Of a text's values, as a share of the rows that have one: so many name rows, and don't group them."""
ID_NAMES = ("id", "nr", "no", "number", "index", "key", "uuid", "guid", "row", "unnamed: 0")


@dataclass(frozen=True)
class Choices:
    """What the user says of columns.

    Args:
        one_hot: names of columns of categories, whatever they hold.
        keep: names of columns that are features, though they look like identifiers or constants.
        empty: more words for an empty cell.
        decimal: ``,`` or ``.``; ``auto`` to see from each column.
        day_first: of dates such as 03/04/2021; None to see from each column.
    """

    one_hot: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    decimal: str = "auto"
    day_first: bool | None = None


@dataclass(frozen=True)
class Column:
    """A column and what it is.

    Args:
        values: numbers and truth values as float64, dates as datetime64, categories as they are; NaN where
            empty.
        said: why, where that is worth a line.
    """

    name: str
    role: Role
    values: pd.Series
    said: str = ""


@dataclass
class _Open:
    """What the table as a whole may tell of columns that don't tell it themselves."""

    decimal_comma: bool | None = None
    day_first: bool | None = None
    problems: list[str] = field(default_factory=list)


def decide(frame: pd.DataFrame, choices: Choices, where: Callable[[int], str]) -> list[Column]:
    """Return what every column is.

    Args:
        frame: features as read: numbers, or text in any form.
        where: names a row, by position, for errors.

    Raises:
        InputError: ``dataset``: columns that may be read in several ways; one message with all of them, and
            the settings that decide.
    """
    text = {str(c): cells.filled(frame[c], choices.empty) for c in frame if _is_text(frame[c])}
    whole = _Open(
        {"auto": None, ",": True, ".": False}[choices.decimal]
        if choices.decimal != "auto"
        else (
            True if any(_has_decimal_comma(t) for n, t in text.items() if n not in choices.one_hot) else None
        ),
        choices.day_first,
    )
    if whole.day_first is None:
        told = [
            d
            for n, t in text.items()
            if n not in choices.one_hot
            and (f := cells.looks_like_dates(t))
            and (d := _told(t, f)) is not None
        ]
        whole.day_first = told[0] if told and len(set(told)) == 1 else None
    found = [_decide(str(c), frame[c], text.get(str(c)), choices, whole, where) for c in frame]
    if whole.problems:
        count = len(whole.problems)
        many = f"{count} columns of the table mean" if count > 1 else "a column of the table means"
        raise InputError("dataset", f"can't tell what {many}: {'; '.join(whole.problems)}")
    return found


def is_running(column: pd.Series) -> bool:
    """Return whether whole numbers count the rows, in any order."""
    if not pd.api.types.is_integer_dtype(column) or len(column) < 4:
        return False
    values = column.to_numpy()
    return bool(values.max() - values.min() == len(values) - 1 and len(np.unique(values)) == len(values))


def is_plain(frame: pd.DataFrame) -> bool:
    """Return whether a table holds finite numbers only, so that nothing is to be decided."""
    return all(
        pd.api.types.is_numeric_dtype(frame[c])
        and not pd.api.types.is_complex_dtype(frame[c])
        and bool(np.isfinite(frame[c].to_numpy(np.float64, na_value=np.nan)).all())
        for c in frame
    )


def _is_text(column: pd.Series) -> bool:
    return (
        not pd.api.types.is_numeric_dtype(column)
        and not pd.api.types.is_datetime64_any_dtype(column)
        and not pd.api.types.is_timedelta64_dtype(column)
    )


def _decide(
    name: str,
    column: pd.Series,
    text: pd.Series | None,
    choices: Choices,
    whole: _Open,
    where: Callable[[int], str],
) -> Column:
    cleaned = column if text is None else text
    if name in choices.one_hot:
        return Column(name, "category", cleaned)
    levels = int(cleaned.nunique())
    if levels == 0:
        return Column(name, "aside", cleaned, "is empty")
    if levels == 1 and not cleaned.isna().any() and name not in choices.keep:
        return Column(name, "aside", cleaned, f"has one value only ({cleaned.iloc[0]!s})")
    if text is not None:
        return _text(name, text, choices, whole, where)
    if pd.api.types.is_datetime64_any_dtype(column):
        times = column.dt.tz_convert("UTC").dt.tz_localize(None) if column.dt.tz is not None else column
        return Column(name, "date", times)
    if pd.api.types.is_timedelta64_dtype(column):
        return Column(name, "number", column.dt.total_seconds() / 86400, "is read as days")
    if pd.api.types.is_bool_dtype(column):
        return Column(name, "truth", column.astype(float))
    if name not in choices.keep and _numbers_rows(name, column):
        return Column(name, "aside", column, "numbers the rows")
    return Column(name, "number", column.astype(float))


def _text(name: str, text: pd.Series, choices: Choices, whole: _Open, where: Callable[[int], str]) -> Column:
    levels, filled_cells = cells.levels_of(text), int(text.notna().sum())
    if (truth := cells.truths(levels)) is not None:
        return Column(name, "truth", cells.by_level(text, lambda _: truth))
    if (form := cells.looks_like_dates(levels)) is not None:
        first = cells.day_first(levels.rename(name), form, choices.day_first)
        first = whole.day_first if first is None else first
        if first is None:
            whole.problems.append(
                f"{name!r} has dates such as {levels.iloc[0]}, with the day or the month first? "
                "(dataset.day_first=true or false)"
            )
            return Column(name, "aside", text)
        if (times := cells.dates(levels, first)) is not None:
            said = "two-digit years are 1969 to 2068" if cells.has_short_years(levels) else ""
            return Column(name, "date", cells.by_level(text, lambda _: times), said)
    styles = {comma: cells.numbers(levels, comma) for comma in (False, True)}
    if (number := _number(name, text, styles, whole)) is not None:
        return number
    others = levels[max(styles.values(), key=lambda read: read.notna().sum()).isna()]
    at = np.flatnonzero(text.isin(others))
    few_words = len(others) <= 2 and len(levels) > FEW_LEVELS and len(at) < filled_cells / 2
    if few_words or len(at) < FEW_OTHERS * filled_cells:
        words, plural = ",".join(map(str, others[:3])), "s" if len(at) > 1 else ""
        whole.problems.append(
            f"column {name!r} has {text.iloc[at[0]]!r} in {where(int(at[0]))} among numbers, {len(at)} such "
            f"cell{plural} (dataset.empty=[{words}] takes them for empty, dataset.one_hot=[{name}] all for "
            f"categories, dataset.drop=[{name}] leaves the column out)"
        )
        return Column(name, "aside", text)
    if name not in choices.keep and len(levels) > max(FEW_LEVELS, MANY_LEVELS * filled_cells):
        every = len(levels) == filled_cells
        many = (
            "has another value in every row" if every else f"has {len(levels)} values in {filled_cells} rows"
        )
        return Column(name, "aside", text, f"{many}: it names rows, and does not group them")
    return Column(name, "category", text)


def _number(name: str, text: pd.Series, styles: dict[bool, pd.Series], whole: _Open) -> Column | None:
    """Return a column of numbers that were written as text, or None.

    Args:
        styles: its levels as numbers, without and with decimal commas.
    """
    fits = {comma: bool(read.notna().all()) for comma, read in styles.items()}
    if not any(fits.values()):
        return None
    comma = not fits[False]
    if all(fits.values()) and not styles[False].equals(styles[True]):
        if whole.decimal_comma is None:
            whole.problems.append(
                f"{name!r} has numbers such as {text.dropna().iloc[0]}: is the comma before decimals or "
                "thousands? (dataset.decimal=',' or '.')"
            )
            return Column(name, "aside", text)
        comma = whole.decimal_comma
    return Column(name, "number", cells.by_level(text, lambda _: styles[comma]), cells.mixes_percent(text))


def _has_decimal_comma(text: pd.Series) -> bool:
    """Return whether all cells are numbers, and only if decimals follow a comma."""
    known = cells.levels_of(text)
    if not any("," in word for word in known):
        return False
    return bool(cells.numbers(known, True).notna().all() and cells.numbers(known, False).isna().any())


def _told(text: pd.Series, form: str) -> bool | None:
    return cells.day_first(text, form) if cells.DATES[form] == "either" else None  # else it need not be told


def _numbers_rows(name: str, column: pd.Series) -> bool:
    if is_running(column):
        return True
    words = name.casefold().replace("-", "_").replace(" ", "_").split("_")
    called = name.casefold() in ID_NAMES or words[-1] in ID_NAMES or words[0] == "id"
    whole = pd.api.types.is_integer_dtype(column)
    return called and whole and bool(column.is_unique)


def filled(frame: pd.DataFrame, choices: Choices) -> pd.DataFrame:
    """Return a table whose cells that say that they are empty are NaN."""
    return pd.DataFrame(
        {c: cells.filled(frame[c], choices.empty) if _is_text(frame[c]) else frame[c] for c in frame}
    )


def has_decimal_commas(frame: pd.DataFrame) -> bool:
    """Return whether a column of a table holds numbers that can only be read with decimal commas."""
    return any(_has_decimal_comma(cells.filled(frame[c])) for c in frame if _may_be_numbers(frame[c]))


def _may_be_numbers(column: pd.Series) -> bool:
    return _is_text(column) and not cells.is_nested(column)


def noticed(frame: pd.DataFrame, keep: Sequence[str]) -> list[str]:
    """Return what is odd about a table of numbers, which is taken as it is."""
    lines = []
    for name in frame:
        if name in keep:
            continue
        if is_running(frame[name]):
            lines.append(f"{name} numbers the rows and is a feature; dataset.drop=[{name}] leaves it out")
        elif len(frame) and bool((frame[name] == frame[name].iloc[0]).all()):
            lines.append(f"{name} has one value only ({frame[name].iloc[0]}), which becomes zero")
    return lines


def said_of_aside(columns: Sequence[Column], has_id: bool) -> list[str]:
    """Return why columns are no features, and how to use them."""
    lines = []
    for c in columns:
        names_rows = c.values.notna().all() and c.values.is_unique
        uses = [] if has_id or not names_rows else [f"dataset.id={c.name} calls rows by it"]
        uses += [f"dataset.keep=[{c.name}] makes it a feature"] if c.values.notna().any() else []
        lines.append(f"{c.name} {c.said}: set aside" + (f" ({', '.join(uses)})" if uses else ""))
    return lines


def refuse_empty(columns: Sequence[Column], where: Callable[[int], str]) -> None:
    """Refuse empty cells, where they are not to be filled.

    Raises:
        InputError: ``dataset.path``, with all columns that have some.
    """
    holes = [c for c in columns if c.values.isna().any()]
    if holes:
        row = int(np.flatnonzero(holes[0].values.isna())[0])
        others = f"; so have {', '.join(c.name for c in holes[1:])}" if len(holes) > 1 else ""
        remedy = "dataset.missing=impute fills them, dataset.missing=drop leaves their rows out"
        raise InputError(
            "dataset.path",
            f"column {holes[0].name!r} has a missing value (NaN) in {where(row)}{others}; {remedy}",
        )
