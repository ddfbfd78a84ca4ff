"""A user's own data: any map-style data set, or one of the ``datasets`` library, as instances in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pandas as pd

from fimo.data.conversion import train_and_test
from fimo.data.datamodule import InstancesModule, Split, Task
from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.data.origin import Origin, named
from fimo.errors import InputError, nearest

TASKS = ("regression", "classification", "language_modelling")


class CustomData(InstancesModule):
    """Training and test sets of the user's own.

    Args:
        train, test, inputs, target: see :func:`~fimo.data.conversion.to_instances`.
        task: ``classification``, ``regression``, ``language_modelling``, or None to see from the targets:
            whole numbers are classes.
        class_names: by class index, for display.
        text: of mappings: a column that is shown to people and is no input.
        id: of mappings and DataFrames: the column that says what an instance is called; no input.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        inputs: str | Sequence[str] | None = None,
        target: str | None = None,
        task: str | None = None,
        class_names: Sequence[str] = (),
        text: str | None = None,
        name: str = "custom",
        batch_size: int = 32,
        id: str | None = None,
    ) -> None:
        super().__init__(name, batch_size)
        if task is not None and task not in TASKS:
            raise InputError("dataset.task", f"expected one of {', '.join(TASKS)} or null but got {task!r}")
        self._sources = {"train": train, "test": test}
        self.input_columns, self.target, self.text, self.id = inputs, target, text, id
        self._given_task, self.class_names = task, tuple(class_names)

    def load(self) -> None:
        if self.id is not None:
            self._element("train", 0, self.id, "id")  # a wrong name would be taken for an input
        aside = [c for c in (self.text, self.id) if c is not None]
        self.train, self.test = train_and_test(
            self._sources["train"], self._sources["test"], self.input_columns, self.target, text=aside
        )
        self.origins = {"train": self._origin("train"), "test": self._origin("test")}
        targets = self.train.targets
        found = "classification" if targets.ndim == 1 and not targets.is_floating_point() else "regression"
        self.task = cast(Task, self._given_task or found)
        if self.task == "regression":
            self.train, self.test = (values(instances) for instances in (self.train, self.test))
            self.outputs = self.train.targets[0].numel()
            return
        if targets.is_floating_point():
            raise InputError(
                "dataset.task", f"{self.task} needs whole numbers as targets but got {targets.dtype}"
            )
        self._check_classes()

    def _origin(self, split: Split) -> Origin:
        rows = Origin.counted(len(getattr(self, split)))
        if self.id is None:
            return rows
        source = self._sources[split]
        if isinstance(source, pd.DataFrame) and self.id in source:
            return replace(rows, id=named(source[self.id], rows.where))
        values = [self._element(split, k, self.id, "id") for k in range(len(rows))]
        return replace(rows, id=named(pd.Series(values, name=self.id, dtype=object), rows.where))

    def _element(self, split: Split, index: int, column: str, key: str) -> Any:
        """Return what a source's element has in a column.

        Raises:
            InputError: it has none, or no columns.
        """
        source = getattr(self._sources[split], "dataset", self._sources[split])  # of a DataLoader
        row = source.iloc[index] if hasattr(source, "iloc") else source[index]
        columns = list(row.keys()) if hasattr(row, "keys") else []
        if column not in columns:
            hint = nearest(column, list(map(str, columns))) if columns else "its elements are no mappings"
            raise InputError(f"dataset.{key}", f"no column {column!r} in dataset.{split}; {hint}")
        return row[column]

    def _check_classes(self) -> None:
        largest = int(self.train.targets.max()) + 1
        self.outputs = len(self.class_names) or largest
        if self.task == "classification" and self.outputs < 2:
            raise InputError("dataset.train", "the targets have one class only")
        lowest = 0 if self.task == "classification" else -100
        for split in ("train", "test"):
            targets = getattr(self, split).targets
            bad = (targets >= self.outputs) | (targets < lowest)
            if bad.any():
                where = tuple(int(i) for i in bad.nonzero()[0])
                row = where[0]
                raise InputError(
                    f"dataset.{split}",
                    f"element {row} has the label {int(targets[where])}; there are {self.outputs} classes",
                )

    def display(self, split: Split, index: int) -> Display:
        instance = self._instance(split, index)
        target = instance.targets[0]
        if self.task == "classification":
            shown = self.class_names[int(target)] if self.class_names else str(int(target))
        else:
            shown = ", ".join(f"{v:.4g}" for v in target.flatten()[:3].tolist())
        if self.text is not None:
            return Display(shown, text=str(self._element(split, index, self.text, "text")))
        parts = instance.inputs if isinstance(instance.inputs, dict) else {"x": instance.inputs}
        numbers = {
            f"{name}[{k}]" if part.numel() > 1 else name: round(float(v), 6)
            for name, part in parts.items()
            for k, v in enumerate(part.flatten()[:12])
        }
        return Display(shown, numbers)


def values(instances: Instances) -> Instances:
    """Return a regression's targets as ``[n, D]`` in floating point."""
    targets = instances.targets if instances.targets.is_floating_point() else instances.targets.float()
    return Instances(instances.inputs, targets[:, None] if targets.ndim == 1 else targets)
