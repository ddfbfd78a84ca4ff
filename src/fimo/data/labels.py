"""Labels of texts and images as classes, whatever file they are from."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from fimo.data.cells import is_nested
from fimo.data.target import KEY, Place, as_classes
from fimo.errors import InputError, shortened

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
EXACT = 2.0**53
"""Whole numbers below it are those that they are written as."""


def read_labels(labels: pd.Series) -> pd.Series:
    """Return labels as classes are called, as a table's target: numbers where all are (``01`` is 1, ``1.0``
    too), truth values where all are, and else text without spaces around it.

    Raises:
        InputError: ``dataset.target``: lists.
    """
    if is_nested(labels):
        raise InputError(KEY, f"column {str(labels.name)!r} holds lists or records, not single labels")
    if pd.api.types.is_numeric_dtype(labels):
        return as_classes(labels)
    text = labels.astype(str).str.strip()
    levels = [str(level) for level in text.unique()]
    if all(NUMBER.fullmatch(level) and abs(float(level)) < EXACT for level in levels):
        return as_classes(text.map(float))
    if {level.casefold() for level in levels} <= {"false", "true"}:
        return text.str.casefold() == "true"
    return text


def class_indices(labels: pd.Series, names: Sequence[str], where: Place, numbered: bool) -> list[int]:
    """Return each label's class: the one of its name, or else, where that fits more of them, of its number.

    Args:
        labels: ``[n]``, of all parts, as they are written.
        names: by class index.
        where: names an instance by its position, for errors.
        numbered: whether labels may be class indices.

    Raises:
        InputError: ``dataset.target``: a label that is no class.
    """
    by_name = {name: k for k, name in enumerate(names)}
    called = read_labels(labels).astype(str)
    readings = [labels.astype(str).str.strip().map(by_name), called.map(by_name)]
    readings += [called.map({str(k): k for k in range(len(names))})] if numbered else []
    classes = max(readings, key=lambda reading: int(reading.notna().sum()))  # the first of equal ones
    if classes.isna().any():
        row = int(classes.isna().to_numpy().argmax())
        problem = f"label {str(labels.iloc[row])!r} in {where(row)} is not among the classes"
        raise InputError(KEY, f"{problem} {shortened(names)}")
    return [int(k) for k in classes]
