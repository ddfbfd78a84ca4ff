"""Tables: features and a target in columns, split and standardised as in the paper."""

from __future__ import annotations

import difflib
import logging
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split, held_out, plain
from fimo.data.display import Display, figures
from fimo.data.instances import Instances
from fimo.data.origin import Origin, Sources, cells_of
from fimo.data.target import as_classes, check_numeric, class_target, regression_target, seen_task
from fimo.errors import InputError, shortened

log = logging.getLogger(__name__)

COLUMNS = 16
"""Of a table, computed in float64 at a time: all of them would take several times the table's memory."""


@dataclass(frozen=True)
class Table:
    """A table as read, in original units.

    Args:
        features: ``[n, d]``, one named column per feature; numbers, unless the data set makes some of them.
        target: ``[n]``, values, or class names as text or numbers.
        unit: of a regression target, for display.
        indicators: columns of zeros and ones that are left as they are, not standardised.
        origin: ``[n]``, of which rows of the source; None where they are all of them, in their order.
        parts: positions of the training and of the test rows; None to draw them.
        decisions: what was decided about the table, a line each.
    """

    features: pd.DataFrame
    target: pd.Series
    unit: str = ""
    indicators: tuple[str, ...] = ()
    origin: Origin | Sources | None = None
    parts: tuple[np.ndarray, np.ndarray] | None = None
    decisions: tuple[str, ...] = ()


class TabularModule(InstancesModule):
    """A table as a data set.

    Protocol (paper, appendix): a random split, then features, and the target of a regression, standardised
    by the training part's mean and standard deviation. Constant features become zero.

    Args:
        name: of the data set.
        task: ``regression``, ``classification``, or ``auto`` to see from the target.
        batch_size: of the final model's training.
        test_size: share of instances held out.
        split_seed: ``random_state`` of the split.
        standardised: whether values are standardised, or taken as they are.
    """

    def __init__(
        self,
        name: str,
        task: str,
        batch_size: int,
        test_size: float,
        split_seed: int,
        standardised: bool = True,
    ) -> None:
        super().__init__(name, batch_size)
        if task not in ("regression", "classification", "auto"):
            raise InputError("dataset.task", f"expected regression, classification or auto but got {task!r}")
        if not 0 < test_size < 1:
            raise InputError("dataset.test_size", f"expected a share between 0 and 1 but got {test_size}")
        self.task = task  # type: ignore[assignment]
        self.test_size, self.split_seed, self.standardised = test_size, split_seed, standardised

    @abstractmethod
    def read(self) -> Table:
        """Read the whole table."""

    def inputs_of(self, table: Table, train: np.ndarray, sources: Sources) -> np.ndarray:
        """Return every row's inputs ``[n, d]``; what they learn of the data is the training part's.

        Args:
            train: positions of the training rows.
            sources: of the rows, for errors.
        """
        check_numeric(table.features, where=sources.where)
        return self.scaled(table.features, table.indicators, train)

    def scaled(self, features: pd.DataFrame, indicators: Collection[str], train: np.ndarray) -> np.ndarray:
        """Return numbers standardised in float64, and indicators as they are, ``[n, d]`` float32."""
        inputs = np.empty(features.shape, dtype=np.float32)
        kept = features.columns.isin(list(indicators))
        for start in range(0, len(kept), COLUMNS):
            part = slice(start, start + COLUMNS)
            values = features.iloc[:, part].to_numpy(dtype=np.float64)
            if self.standardised:
                values = np.where(kept[part], values, standardise(values, train))
            with np.errstate(over="ignore"):  # what is infinite then is refused with the network's outputs
                inputs[:, part] = values
        return inputs

    def target_scale(self, target: pd.Series, train: np.ndarray) -> Scale:
        """Return how a regression's target is scaled, from the training rows' values."""
        values = target.to_numpy(dtype=np.float64)[train, None]
        return (
            Standard(float(values.mean(0)[0]), float(values.std(0)[0]))
            if self.standardised
            else Standard(0, 1)
        )

    def load(self) -> None:
        table = self.read()
        origin = table.origin or Origin.counted(len(table.features))
        sources = origin if isinstance(origin, Sources) else Sources((origin,))
        self._cells = cells_of(table.features)
        self._shown_target, self.unit = table.target, table.unit
        if len(table.features) < 4:
            raise InputError("dataset", f"expected at least 4 rows but got {len(table.features)}")
        if table.features.shape[1] == 0:
            raise InputError("dataset.path", "there is no feature column besides the target")
        train, test = table.parts or held_out(len(table.features), self.test_size, self.split_seed)
        for name, rows in (("training", train), ("test", test)):
            if not len(rows):
                raise InputError("dataset", f"the {name} part has no rows")
        self._rows = {"train": train, "test": test}
        self.origins = {"train": sources[train], "test": sources[test]}
        self.decisions = table.decisions
        if self.task == "auto":  # type: ignore[comparison-overlap]
            self.task, said = seen_task(table.target)
            self.decisions = (said, *self.decisions)
        inputs = self.inputs_of(table, train, sources)
        if self.task == "regression":
            values = regression_target(table.target, sources.where)
            self.scale = self.target_scale(table.target, train)
            targets = torch.tensor(self.scale.transform(values[:, None]), dtype=torch.float32)
            self.outputs = 1
        else:
            self.class_names, classes = class_target(table.target, train, test, sources.where)
            self._shown_target = as_classes(table.target)
            targets = torch.tensor(classes, dtype=torch.int64)
            self.outputs = len(self.class_names)
        self.train, self.test = (
            Instances(torch.as_tensor(inputs[rows], dtype=torch.float32), targets[torch.from_numpy(rows)])
            for rows in (train, test)
        )
        for line in self.decisions:
            log.info("%s", line)

    def prediction(self, outputs: Tensor) -> str:
        if self.task == "classification":
            return super().prediction(outputs)
        return f"{figures(float(self.original(outputs)))} {self.unit}".strip()

    def original(self, values: Tensor) -> Tensor:
        """Return outputs or targets of a regression ``[...]`` in the target's own units."""
        if self.task == "classification":
            return values
        numbers = self.scale.inverse_transform(values.detach().double().cpu().numpy().reshape(-1, 1))
        return torch.from_numpy(np.asarray(numbers, np.float64)).reshape(values.shape)

    def display(self, split: Split, index: int) -> Display:
        row = self._rows[split][index]
        values = {name: plain(cells[row]) for name, cells in self._cells.items()}
        return Display(self._target_text(self._shown_target.iat[row]), values)

    def shown_targets(self, split: Split) -> list[float | int | str]:
        return [self._target_text(target) for target in self._shown_target.iloc[self._rows[split]]]

    def _target_text(self, target: object) -> str:
        is_value = self.task == "regression" and isinstance(target, (float, np.floating))
        text = f"{target:.6g}" if is_value else str(target)
        return f"{text} {self.unit}".strip()


class Scale(Protocol):
    """A regression target's scale, as scikit-learn's transformers have it; values are ``[n, 1]``."""

    def transform(self, values: np.ndarray) -> np.ndarray: ...

    def inverse_transform(self, values: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Standard:
    """Subtraction of a mean and division by a (population) standard deviation."""

    mean: float
    deviation: float

    def transform(self, values: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = (values - self.mean) / (self.deviation or 1.0)
        return scaled

    def inverse_transform(self, values: np.ndarray) -> np.ndarray:
        original: np.ndarray = values * self.deviation + self.mean
        return original


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


def pick_target(frame: pd.DataFrame, target: str | int) -> tuple[pd.DataFrame, pd.Series]:
    """Split a frame into features and the target column, given by name or by index (-1 the last).

    A name comes before an index: 1 is the column called ``1``, if there is one.

    Raises:
        InputError: there is no such column.
    """
    columns = list(frame.columns)
    if target in columns or str(target) in columns:
        name = target if target in columns else str(target)
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
