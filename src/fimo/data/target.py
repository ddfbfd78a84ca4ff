"""A table's target: values or classes, and what tells which."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd

from fimo.data import cells
from fimo.data.datamodule import Task
from fimo.data.origin import Origin
from fimo.errors import InputError, shortened

log = logging.getLogger(__name__)

LARGEST = 1e100
"""Of a table's values: squares and sums of larger ones, of which standard deviations are made, overflow."""
KEY = "dataset.target"
FEW = 10
"""Different whole numbers that are taken for classes."""

Place = Callable[[int], str]
"""Names a row of a table, by its position, for errors."""


def seen_task(target: pd.Series) -> tuple[Task, str]:
    """Return what is predicted, as the target's values say, with the reason in a line.

    Text, truth values and few different whole numbers are classes, all else is a regression.
    """
    name, other = str(target.name), "dataset.task={} says otherwise"
    kinds = target.dropna()
    levels = kinds.nunique()
    if not pd.api.types.is_numeric_dtype(target) or pd.api.types.is_bool_dtype(target):
        said = f"{name} is text with {levels} values, so this is classification"
        return "classification", f"{said}; {other.format('regression')}"
    whole = bool((kinds == kinds.round()).all())
    if whole and (levels == 2 or levels <= min(FEW, len(kinds) // FEW)):
        said = f"{name} has {levels} different whole numbers, so this is classification"
        return "classification", f"{said}; {other.format('regression')}"
    return "regression", f"{name} is a number, so this is regression; {other.format('classification')}"


def target_values(target: pd.Series, decimal: str) -> pd.Series:
    """Return a target as read: numbers that are written as text as numbers, other text stripped.

    A cell that is ``?`` alone is empty; other words for that (``none``, ``-``) may be classes.

    Args:
        decimal: ``,``, ``.`` or ``auto``.

    Raises:
        InputError: ``dataset.decimal``: numbers that may be read in two ways; ``dataset.target``: lists.
    """
    if pd.api.types.is_numeric_dtype(target):
        return target
    if cells.is_nested(target):
        raise InputError(KEY, f"column {str(target.name)!r} holds lists or records, not single values")
    text = target.where(target.isna(), target.astype(str).str.strip()).replace(["", "?"], np.nan)
    known = cells.filled(text).dropna()
    styles = [n for comma in (False, True) if (n := cells.numbers(known, comma)).notna().all()]
    if not len(known) or not styles:
        return text
    if len(styles) == 2 and not styles[0].equals(styles[1]):
        if decimal == "auto":
            raise InputError(
                "dataset.decimal",
                f"the target {target.name!r} has numbers such as {known.iloc[0]}: is the comma before "
                "decimals or thousands? expected ',' or '.'",
            )
        styles = [styles[decimal == ","]]
    return styles[0].reindex(target.index)


def regression_target(target: pd.Series, where: Place) -> np.ndarray:
    """Return a regression's target as values ``[n]`` float64.

    Raises:
        InputError: ``dataset.target``: an empty cell, text, or one value only.
    """
    _check_filled(target, where)
    check_numeric(target.to_frame(), KEY, where)
    values = target.to_numpy(dtype=np.float64)
    if np.ptp(values) == 0:
        raise InputError(KEY, f"column {str(target.name)!r} has one value only ({values[0]:g})")
    return values


def class_target(
    target: pd.Series, train: np.ndarray, test: np.ndarray, where: Place
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes' names, and each row's class ``[n]`` int64.

    Args:
        train, test: positions of the two parts.

    Raises:
        InputError: ``dataset.target``: an empty cell, one class only, about as many classes as rows, or a
            class in the test part only, which no training row can explain.
    """
    _check_filled(target, where)
    numbers = pd.api.types.is_numeric_dtype(target)
    target = as_classes(target)
    name, values = str(target.name), target.tolist()
    classes = sorted(target.unique().tolist())
    if len(classes) < 2:
        raise InputError(KEY, f"column {name!r} has one class only ({classes[0]!r})")
    if len(classes) > max(2, len(target) // 2):
        doubt = "is this regression?" if numbers else "does it name rows, and another column is the target?"
        raise InputError(KEY, f"column {name!r} has {len(classes)} classes in {len(target)} rows; {doubt}")
    counts = target.value_counts()
    if single := [c for c in classes if counts[c] == 1]:
        words = "only one row of its class" if len(single) == 1 else "only one row of each of these classes"
        log.warning("dataset.target: column %r has %s: %s", name, words, shortened(single))
    learnt = {values[row] for row in train.tolist()}
    if len(learnt) < 2:
        raise InputError(KEY, f"column {name!r} has one class only in the training part")
    for row in test.tolist():
        if (found := values[row]) not in learnt:
            number = "; a number, no class: dataset.task=regression" if isinstance(found, int | float) else ""
            raise InputError(
                KEY,
                f"column {name!r} has the class {found!r} in the test part only ({where(row)}), of which the "
                "model can know nothing; move such rows, or leave them out (dataset.split_seed draws others)"
                + number,
            )
    indices = {c: k for k, c in enumerate(classes)}
    return tuple(map(str, classes)), target.map(indices).to_numpy(dtype=np.int64)


def as_classes(target: pd.Series) -> pd.Series:
    """Return a target whose floating-point numbers are called as classes are: whole ones without ``.0``."""
    if not pd.api.types.is_float_dtype(target):
        return target
    codes, levels = pd.factorize(target)
    called = [_class_of(float(str(level))) for level in levels.to_numpy()]  # of float32, its own digits
    return pd.Series(np.array(called, dtype=object)[codes], target.index, name=target.name)


def _class_of(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _check_filled(target: pd.Series, where: Place) -> None:
    if target.isna().any():
        row, count = int(np.flatnonzero(target.isna())[0]), int(target.isna().sum())
        more = f" and {count - 1} more" if count > 1 else ""
        raise InputError(
            KEY,
            f"column {str(target.name)!r} has a missing value in {where(row)}{more}; dataset.missing=drop "
            "leaves rows with empty cells out",
        )


def check_numeric(frame: pd.DataFrame, key: str = "dataset.path", where: Place | None = None) -> None:
    """Refuse text, missing and infinite values, naming the first column and row at fault.

    Args:
        where: names a row by its position; counted when None.

    Raises:
        InputError: with ``key``.
    """
    where = where or Origin.counted(len(frame)).where
    if frame.shape[1] == 0:
        raise InputError(key, "there is no feature column besides the target")
    for column in frame:
        values = pd.to_numeric(frame[column], errors="coerce")
        numbers = values.to_numpy(dtype=np.float64)
        bad = ~np.isfinite(numbers)
        if not bad.any() and (large := np.abs(numbers) > LARGEST).any():
            row = int(np.flatnonzero(large)[0])
            problem = f"{numbers[row]:g} in {where(row)}, too large to be standardised"
            raise InputError(key, f"column {column!r} has {problem}")
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            found = frame[column].iloc[row]
            what = "a missing value (NaN)" if pd.isna(found) else repr(str(found))
            raise InputError(
                key, f"column {column!r} has {what} in {where(row)}; expected finite numbers only"
            )
