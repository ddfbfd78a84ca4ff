"""A user's own data: any map-style data set, or one of the ``datasets`` library, as instances in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fimo.data.datamodule import InstancesModule, Split, Task
from fimo.data.display import Display
from fimo.data.instances import Inputs, Instances
from fimo.errors import InputError, shortened

TASKS = ("regression", "classification", "language_modelling")


class CustomData(InstancesModule):
    """Training and test sets of the user's own.

    Args:
        train, test: each an :class:`~fimo.data.instances.Instances`, or anything with a length whose elements
            are ``(inputs, target)`` or mappings from column names: a ``torch.utils.data.Dataset``, a
            ``datasets.Dataset``, a list, a pandas DataFrame. Inputs are numbers, arrays, tensors, or mappings
            of them.
        inputs: of mappings: the column that is the network's one argument, or a list of columns passed by
            name; None takes every column but ``target``.
        target: of mappings: the target's column.
        task: ``classification``, ``regression``, ``language_modelling``, or None to see from the targets:
            whole numbers are classes.
        class_names: by class index, for display.
        text: of mappings: a column that is shown to people and is no input.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        inputs: str | Sequence[str] | None = None,
        target: str = "label",
        task: str | None = None,
        class_names: Sequence[str] = (),
        text: str | None = None,
        name: str = "custom",
        batch_size: int = 32,
    ) -> None:
        super().__init__(name, batch_size)
        if task is not None and task not in TASKS:
            raise InputError("dataset.task", f"expected one of {', '.join(TASKS)} or null but got {task!r}")
        self._sources = {"train": rows(train), "test": rows(test)}
        self.input_columns, self.target, self.text = inputs, target, text
        self._given_task, self.class_names = task, tuple(class_names)

    def load(self) -> None:
        self.train, self.test = (
            to_instances(self._sources[split], self.input_columns, self.target, f"dataset.{split}", self.text)
            for split in ("train", "test")
        )
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
        instances: Instances = getattr(self, split)
        target = instances.targets[index]
        if self.task == "classification":
            shown = self.class_names[int(target)] if self.class_names else str(int(target))
        else:
            shown = ", ".join(f"{v:.4g}" for v in target.flatten()[:3].tolist())
        if self.text is not None:
            return Display(shown, text=str(self._sources[split][index][self.text]))
        parts = instances.inputs if isinstance(instances.inputs, dict) else {"x": instances.inputs}
        row = {
            f"{name}[{k}]" if part[index].numel() > 1 else name: round(float(v), 6)
            for name, part in parts.items()
            for k, v in enumerate(part[index].flatten()[:12])
        }
        return Display(shown, row)


def to_instances(
    source: Any,
    inputs: str | Sequence[str] | None = None,
    target: str = "label",
    key: str = "dataset",
    text: str | None = None,
) -> Instances:
    """Return any data set's elements as instances in memory.

    Args:
        source, inputs, target, text: see :class:`CustomData`.
        key: for errors.

    Raises:
        InputError: no elements, elements of another form, inputs that differ in shape, NaN.
    """
    if isinstance(source, Instances):
        return source
    source = rows(source)
    try:
        count = len(source)
        elements = [source[i] for i in range(count)]
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(key, f"expected a data set with a length and elements ({error!r})") from error
    if not elements:
        raise InputError(key, "the data set is empty")
    if isinstance(elements[0], Mapping):
        found, targets = _columns(elements, inputs, target, key, text)
    else:
        if not isinstance(elements[0], Sequence | tuple) or len(elements[0]) != 2:
            raise InputError(
                key, f"expected elements (inputs, target) or mappings but got {type(elements[0]).__name__}"
            )
        found = _inputs([x for x, _ in elements], key)
        targets = _stack([y for _, y in elements], key, "target")
    instances = Instances(found, targets)
    for name, tensor in instances.tensors().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).nonzero()[0, 0])
            raise InputError(key, f"element {row} has NaN or infinite {name}")
    return instances


def rows(source: Any) -> Any:
    """Return a pandas DataFrame as a list of mappings, anything else as it is."""
    return source.to_dict("records") if isinstance(source, pd.DataFrame) else source


def values(instances: Instances) -> Instances:
    """Return a regression's targets as ``[n, D]`` in floating point."""
    targets = instances.targets if instances.targets.is_floating_point() else instances.targets.float()
    return Instances(instances.inputs, targets[:, None] if targets.ndim == 1 else targets)


def _columns(
    elements: list[Any], inputs: str | Sequence[str] | None, target: str, key: str, text: str | None
) -> tuple[Inputs, Tensor]:
    there = list(elements[0])
    one = isinstance(inputs, str)
    wanted = [inputs] if one else list(inputs or [c for c in there if c not in (target, text)])
    for column in (*wanted, target):
        if column not in there:
            raise InputError(key, f"elements have no column {column!r}; there are {shortened(there)}")
    stacked = {str(c): _stack([e[c] for e in elements], key, str(c)) for c in wanted}
    targets = _stack([e[target] for e in elements], key, target)
    return (next(iter(stacked.values())) if one else stacked), targets


def _inputs(found: list[Any], key: str) -> Inputs:
    if isinstance(found[0], Mapping):
        return {str(c): _stack([x[c] for x in found], key, str(c)) for c in found[0]}
    return _stack(found, key, "inputs")


def _stack(items: list[Any], key: str, name: str) -> Tensor:
    """Return ``[n, ...]``: float64 arrays and Python floats become the default dtype, whole numbers int64."""
    try:
        tensors = [x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x)) for x in items]
    except TypeError:
        raise InputError(key, f"{name} of an element is {type(items[0]).__name__}, not numbers") from None
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1:
        first, second = sorted(shapes)[:2]
        raise InputError(
            key, f"{name} differ in shape between elements ({first} and {second}); pad or resize them"
        )
    stacked = torch.stack(tensors)
    if stacked.is_floating_point():
        return stacked if isinstance(items[0], Tensor) else stacked.to(torch.get_default_dtype())
    return stacked.to(torch.int64)
