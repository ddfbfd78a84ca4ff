"""Tables: features and a target in columns, split and standardised as in the paper."""

from __future__ import annotations

import difflib
import logging
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split, held_out
from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.errors import InputError, shortened

log = logging.getLogger(__name__)

LARGEST = 1e100
"""Of a table's values: squares and sums of larger ones, of which standard deviations are made, overflow."""


@dataclass(frozen=True)
class Table:
    """A table as read: numbers only, in original units.

    Args:
        features: ``[n, d]``, one named column per feature.
        target: ``[n]``, values, or class names as text or numbers.
        unit: of a regression target, for display.
        indicators: columns of zeros and ones that are left as they are, not standardised.
        origin: ``[n]``, of which rows of the source; None where they are all of them, in their order.
    """

    features: pd.DataFrame
    target: pd.Series
    unit: str = ""
    indicators: tuple[str, ...] = ()
    origin: Origin | None = None


class TabularModule(InstancesModule):
    """A table as a data set.

    Protocol (paper, appendix): a random split, then features, and the target of a regression, standardised
    by the training part's mean and standard deviation. Constant features become zero.

    Args:
        name: of the data set.
        task: ``regression`` or ``classification``.
        batch_size: of the final model's training.
        test_size: share of instances held out.
        split_seed: ``random_state`` of the split.
    """

    def __init__(self, name: str, task: str, batch_size: int, test_size: float, split_seed: int) -> None:
        super().__init__(name, batch_size)
        if task not in ("regression", "classification"):
            raise InputError("dataset.task", f"expected regression or classification but got {task!r}")
        if not 0 < test_size < 1:
            raise InputError("dataset.test_size", f"expected a share between 0 and 1 but got {test_size}")
        self.task = task  # type: ignore[assignment]
        self.test_size, self.split_seed = test_size, split_seed

    @abstractmethod
    def read(self) -> Table:
        """Read the whole table."""

    def load(self) -> None:
        table = self.read()
        origin = table.origin or Origin.counted(len(table.features))
        check_numeric(table.features, origin=origin)
        self._features, self.unit = table.features, table.unit
        if len(table.features) < 4:
            raise InputError("dataset", f"expected at least 4 rows but got {len(table.features)}")
        train, test = held_out(len(table.features), self.test_size, self.split_seed)
        self._rows = {"train": train, "test": test}
        self.origins = {"train": origin[train], "test": origin[test]}
        targets = self._encode(table.target, origin)
        features = table.features.to_numpy(dtype=np.float64)
        inputs = standardise(features, train)
        kept = table.features.columns.isin(table.indicators)
        inputs[:, kept] = features[:, kept]
        if self.task == "regression":
            targets = standardise(targets[:, None], train)
        self.train, self.test = (
            Instances(
                torch.tensor(inputs[rows], dtype=torch.float32),
                torch.tensor(
                    targets[rows], dtype=torch.float32 if self.task == "regression" else torch.int64
                ),
            )
            for rows in (train, test)
        )
        self.outputs = len(self.class_names) if self.task == "classification" else 1

    def _encode(self, target: pd.Series, origin: Origin) -> np.ndarray:
        """Return the target as values, or as class indices; keeps what displays show."""
        name = str(target.name)
        if target.isna().any():
            row = int(np.flatnonzero(target.isna())[0])
            raise InputError("dataset.target", f"column {name!r} has a missing value in {origin.where(row)}")
        self._shown_target = target
        if self.task == "regression":
            check_numeric(target.to_frame(), "dataset.target", origin)
            values = target.to_numpy(dtype=np.float64)
            if np.ptp(values) == 0:
                raise InputError("dataset.target", f"column {name!r} has one value only ({values[0]:g})")
            return values
        classes = sorted(target.unique().tolist())
        if len(classes) < 2:
            raise InputError("dataset.target", f"column {name!r} has one class only ({classes[0]!r})")
        if len(classes) > max(2, len(target) // 2):
            raise InputError(
                "dataset.target",
                f"column {name!r} has {len(classes)} classes in {len(target)} rows; is this regression?",
            )
        counts = target.value_counts()
        if single := [c for c in classes if counts[c] == 1]:
            words = (
                "only one row of its class" if len(single) == 1 else "only one row of each of these classes"
            )
            log.warning("dataset.target: column %r has %s: %s", name, words, shortened(single))
        self.class_names = tuple(map(str, classes))
        return target.map({c: k for k, c in enumerate(classes)}).to_numpy(dtype=np.int64)

    def prediction(self, outputs: Tensor) -> str:
        if self.task == "classification":
            return super().prediction(outputs)
        train = self._shown_target.to_numpy(dtype=np.float64)[self._rows["train"]]
        return f"{float(outputs) * train.std() + train.mean():.4g} {self.unit}".strip()

    def display(self, split: Split, index: int) -> Display:
        row = self._rows[split][index]
        target = self._shown_target.iloc[row]
        text = f"{target:.6g}" if isinstance(target, (float, np.floating)) else str(target)
        values = {str(c): float(v) for c, v in self._features.iloc[row].items()}
        return Display(f"{text} {self.unit}".strip(), values)


def standardise(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Subtract the training rows' mean and divide by their standard deviation (population, as scikit-learn).

    Args:
        values: ``[n, d]``.
        train: row indices of the training part.
    """
    deviation = values[train].std(0)
    deviation[deviation == 0] = 1.0
    standard: np.ndarray = (values - values[train].mean(0)) / deviation
    return standard


def check_numeric(frame: pd.DataFrame, key: str = "dataset.path", origin: Origin | None = None) -> None:
    """Refuse text, missing and infinite values, naming the first column and row at fault.

    Args:
        origin: of the rows; counted when None.

    Raises:
        InputError: with ``key``.
    """
    origin = origin or Origin.counted(len(frame))
    if frame.shape[1] == 0:
        raise InputError(key, "there is no feature column besides the target")
    for column in frame:
        values = pd.to_numeric(frame[column], errors="coerce")
        numbers = values.to_numpy(dtype=np.float64)
        bad = ~np.isfinite(numbers)
        if not bad.any() and (large := np.abs(numbers) > LARGEST).any():
            row = int(np.flatnonzero(large)[0])
            problem = f"{numbers[row]:g} in {origin.where(row)}, too large to be standardised"
            raise InputError(key, f"column {column!r} has {problem}")
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            found = frame[column].iloc[row]
            what = "a missing value (NaN)" if pd.isna(found) else repr(str(found))
            where = origin.where(row)
            raise InputError(key, f"column {column!r} has {what} in {where}; expected finite numbers only")


def pick_target(frame: pd.DataFrame, target: str | int) -> tuple[pd.DataFrame, pd.Series]:
    """Split a frame into features and the target column, given by name or by index (-1 the last).

    Raises:
        InputError: there is no such column.
    """
    columns = list(frame.columns)
    if target in columns:
        name = target
    elif isinstance(target, int) or str(target).lstrip("-").isdigit():
        index = int(target)
        if not -len(columns) <= index < len(columns):
            raise InputError("dataset.target", f"expected an index below {len(columns)} but got {index}")
        name = columns[index]
    else:
        close = difflib.get_close_matches(str(target), map(str, columns), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError("dataset.target", f"no column {target!r}; there are {shortened(columns)}{hint}")
    return frame.drop(columns=[name]), frame[name]
