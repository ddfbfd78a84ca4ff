"""From columns as people have them to numbers: imputed, with indicators, categories as zeros and ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder

from fimo.data.columns import Column

NO_VALUE = "(empty)"
"""The category of cells without one."""


@dataclass(frozen=True)
class Features:
    """A network's inputs, before they are standardised.

    Args:
        values: ``[n, d]`` float64, one named column for each feature.
        indicators: names of columns of zeros and ones, which are not standardised.
        decisions: what was done, a line each.
    """

    values: pd.DataFrame
    indicators: tuple[str, ...]
    decisions: tuple[str, ...]


def features(columns: Sequence[Column], train: np.ndarray, max_levels: int) -> Features:
    """Return what a table's columns are to a network; medians and categories are the training part's.

    Numbers (and dates, as days since 1970 with month and weekday) come first, then truth values, then
    indicators of empty cells and of categories. An empty number is the training part's median, an empty truth
    value its most frequent one; an empty category is one of its own.

    Args:
        train: positions of the training part.
        max_levels: most indicators of a category: the least frequent values share one.
    """
    numbers = {c.name: c.values for c in columns if c.role == "number"}
    parts: dict[str, pd.Series] = {}
    for column in columns:
        if column.role == "date":
            days, others = dates(column, train)
            numbers |= days
            parts |= others
    truths = {c.name: c.values for c in columns if c.role == "truth"}
    categories = {c.name: _levels(c.values) for c in columns if c.role == "category"}
    frame = pd.concat({**numbers, **parts, **truths, **categories}, axis=1)
    transformer = ColumnTransformer(
        [
            ("numbers", _imputer("median"), list(numbers)),
            ("parts", _imputer("median", add_indicator=False), list(parts)),  # their date's day says it
            ("truths", _imputer("most_frequent"), list(truths)),
            ("categories", _encoder(max_levels), list(categories)),
        ],
        verbose_feature_names_out=False,
    ).fit(frame.iloc[train])
    names = [_said_of_cells(name) for name in transformer.get_feature_names_out()]
    values = pd.DataFrame(np.asarray(transformer.transform(frame), np.float64), columns=names)
    indicators = tuple(name for name in names if name not in numbers and name not in parts)
    return Features(values, indicators, tuple(_said(columns, transformer, frame)))


def _imputer(strategy: str, add_indicator: bool = True) -> SimpleImputer:
    return SimpleImputer(strategy=strategy, add_indicator=add_indicator, keep_empty_features=True)


def _said_of_cells(name: str) -> str:
    """Return a column's name: ``age is empty`` for scikit-learn's ``missingindicator_age``."""
    mark = "missingindicator_"
    return f"{name.removeprefix(mark)} is empty" if name.startswith(mark) else name


def dates(column: Column, train: np.ndarray) -> tuple[dict[str, pd.Series], dict[str, pd.Series]]:
    """Return a date as days since 1970-01-01; and month, weekday (Monday is 0) and hour where they vary."""
    times = column.values
    days = (times - pd.Timestamp("1970-01-01")) / pd.Timedelta(days=1)
    found = {}
    for part in ("month", "day_of_week", "hour"):
        values = getattr(times.dt, part).astype(float)
        if values.iloc[train].nunique() > 1:
            found[f"{column.name}: {part.replace('day_of_week', 'weekday')}"] = values
    return {f"{column.name}: day": days}, found


def _levels(values: pd.Series) -> pd.Series:
    """Return categories that can be sorted: all text where a cell is empty or text, else as they are."""
    if values.isna().any():
        return values.map(str, na_action="ignore").astype(object).where(values.notna(), NO_VALUE)
    return values if pd.api.types.is_numeric_dtype(values) else values.map(str).astype(object)


def _encoder(max_levels: int) -> OneHotEncoder:
    return OneHotEncoder(
        sparse_output=False,
        handle_unknown="infrequent_if_exist",
        max_categories=max_levels,
        feature_name_combiner=_level_name,
    )


def _level_name(name: str, level: object) -> str:
    return f"{name}={'other' if level == 'infrequent_sklearn' else level}"


def _said(columns: Sequence[Column], transformer: ColumnTransformer, frame: pd.DataFrame) -> list[str]:
    """Return what was decided, a line for each kind of decision."""

    def named(role: str) -> list[Column]:
        return [c for c in columns if c.role == role]

    def holes(found: Sequence[Column]) -> str:
        return ", ".join(f"{c.name} ({k})" for c in found if (k := int(c.values.isna().sum())))

    lines = [f"{c.name} {c.said}" for c in named("number") if c.said]
    if found := named("date"):
        names = ", ".join(c.name + (f" ({c.said})" if c.said else "") for c in found)
        lines.append(f"dates, as days since 1970-01-01 with month and weekday: {names}")
    if found := named("truth"):
        lines.append(f"truth values, as 0 and 1: {', '.join(c.name for c in found)}")
    if found := named("category"):
        lines += _said_of_categories([c.name for c in found], transformer, frame)
    if said := holes([*named("number"), *named("date")]):
        lines.append(f"empty cells are the training part's median, and a column says so: {said}")
    if said := holes(named("truth")):
        lines.append(f"empty cells are the training part's most frequent value, and a column says so: {said}")
    if said := holes(named("category")):
        lines.append(f"empty cells are a category of their own: {said}")
    return lines


def _said_of_categories(
    names: Sequence[str], transformer: ColumnTransformer, frame: pd.DataFrame
) -> list[str]:
    encoder = transformer.named_transformers_["categories"]
    known = dict(zip(names, encoder.categories_, strict=True))
    sizes = ", ".join(f"{name} ({len(levels)})" for name, levels in known.items())
    lines = [f"categories, a column of zeros and ones for each value: {sizes}"]
    rare = dict(zip(names, encoder.infrequent_categories_, strict=True))
    if grouped := [f"{name} ({len(levels)})" for name, levels in rare.items() if levels is not None]:
        lines.append(f"rare values that share one column: {', '.join(grouped)}")
    for name, levels in known.items():
        if new := sorted(set(frame[name]) - set(levels), key=str):
            lines.append(f"{name} has values in the test part only: {', '.join(map(str, new[:5]))}")
    return lines
