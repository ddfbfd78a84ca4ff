"""Preprocessing of the user's own in the place of the package's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from fimo.errors import InputError, reason

KEY, TARGET_KEY = "dataset.transform", "dataset.target_transform"


def transformed(
    transform: Callable[[pd.DataFrame], Any], features: pd.DataFrame, train: np.ndarray
) -> np.ndarray:
    """Return every row's inputs ``[n, d]`` float64, as a function of the user's makes them.

    Args:
        transform: is given the training rows' features and returns a fitted scikit-learn transformer
            (anything with a method ``transform``), which then transforms all rows; or it returns the rows'
            numbers themselves, ``[n, d]``, each of which may depend on its own row only.
        features: of all rows, as the file has them.
        train: positions of the training rows.

    Raises:
        InputError: ``dataset.transform``: it fails, returns something else than finite numbers, or gives a
            row other numbers when other rows are beside it.
    """
    learnt = _called(transform, features.iloc[train], KEY)
    if hasattr(learnt, "transform") and not isinstance(learnt, pd.DataFrame | pd.Series):
        return _array(_called(learnt.transform, features, KEY), len(features), KEY)
    everything = _array(_called(transform, features, KEY), len(features), KEY)
    halves = [train[: len(train) // 2], train[len(train) // 2 :]]  # one of which lacks the largest value, say
    alone = [_array(_called(transform, features.iloc[h], KEY), len(h), KEY) for h in halves]
    for rows, found in zip([train, *halves], [_array(learnt, len(train), KEY), *alone], strict=True):
        whole = everything[rows]
        if whole.shape != found.shape or not np.allclose(whole, found, rtol=1e-9, atol=1e-12):
            raise InputError(
                KEY,
                "gives rows other numbers when other rows are beside them; return the fitted transformer "
                "instead of its numbers, so that it learns of the training rows alone",
            )
    return everything


class OwnScale:
    """A target's scale that the user's function returns.

    Args:
        transform: is given the training rows' target and returns a transformer with ``transform`` and
            ``inverse_transform`` of ``[n, 1]``, as scikit-learn's are, such as
            ``FunctionTransformer(np.log, np.exp)``.

    Raises:
        InputError: ``dataset.target_transform``: it lacks one of them, or they are no inverses.
    """

    def __init__(self, transform: Callable[[pd.Series], Any], target: pd.Series, train: np.ndarray) -> None:
        self.own = _called(transform, target.iloc[train], TARGET_KEY)
        lacking = [n for n in ("transform", "inverse_transform") if not hasattr(self.own, n)]
        if lacking:
            found = type(self.own).__name__
            raise InputError(TARGET_KEY, f"expected a fitted transformer but {found} has no {lacking[0]}")
        values = target.to_numpy(np.float64)[train, None]
        back = self.inverse_transform(self.transform(values))
        if not np.allclose(back, values, rtol=1e-4, atol=1e-6 * float(np.abs(values).max())):
            raise InputError(
                TARGET_KEY, "inverse_transform does not return the values that transform was given"
            )

    def transform(self, values: np.ndarray) -> np.ndarray:
        return _array(_called(self.own.transform, values, TARGET_KEY), len(values), TARGET_KEY)

    def inverse_transform(self, values: np.ndarray) -> np.ndarray:
        back = _called(self.own.inverse_transform, values, TARGET_KEY)
        return np.asarray(back, np.float64).reshape(len(values), -1)


def _called(function: Callable[[Any], Any], values: Any, key: str) -> Any:
    try:
        return function(values.copy())
    except Exception as error:  # the user's own code fails in any way
        raise InputError(key, reason(error)) from error


def _array(values: Any, rows: int, key: str) -> np.ndarray:
    """Return the user's numbers as ``[n, d]`` float64."""
    dense = values.toarray() if hasattr(values, "toarray") else values  # sparse
    try:
        found = np.asarray(dense, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(key, f"expected numbers but got {type(values).__name__} ({error})") from None
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or len(found) != rows:
        raise InputError(key, f"expected {rows} rows of numbers but got shape {found.shape}")
    if not np.isfinite(found).all():
        row, column = (int(k) for k in np.argwhere(~np.isfinite(found))[0])
        raise InputError(key, f"gives {found[row, column]} in column {column} of row {row}")
    return found
