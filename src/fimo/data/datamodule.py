"""A data set as a LightningDataModule: training and test instances in memory, shown to people by index."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from fimo.data.display import Display, figures
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.errors import InputError

Task = Literal["regression", "classification", "language_modelling"]
Split = Literal["train", "test"]


class InstancesModule(pl.LightningDataModule):
    """Training and test instances with what people need to read them.

    A subclass fills the attributes in :meth:`load`, which raises
    :class:`~fimo.errors.InputError` naming the key and what was found.

    Args:
        name: of the data set, for titles.
        batch_size: of the final model's training.

    Attributes:
        train, test: the instances, after :meth:`setup`.
        task: what is predicted.
        outputs: width of the network's output (classes, or regression targets).
        class_names: by class index; empty for regression.
        unit: of a regression's target in its own units (:meth:`original`); empty where it has none.
        decisions: what was decided about the data on the way, a line each.
        origins: where the instances of a part came from; counted by position where nothing is said.
    """

    train: Instances
    test: Instances
    task: Task
    outputs: int
    class_names: tuple[str, ...] = ()
    unit: str = ""
    decisions: tuple[str, ...] = ()
    origins: Mapping[Split, Origin]

    def __init__(self, name: str, batch_size: int) -> None:
        super().__init__()
        self.name, self.batch_size = name, batch_size
        self.origins = {}
        self._loaded = False

    @abstractmethod
    def load(self) -> None:
        """Read the data and fill the attributes."""

    @abstractmethod
    def display(self, split: Split, index: int) -> Display:
        """Return an instance as a person reads it, in original units."""

    def origin(self, split: Split) -> Origin:
        """Return where the instances of a part came from: their rows in the user's file, and their names."""
        return self.origins[split] if split in self.origins else Origin.counted(len(getattr(self, split)))

    def shown_targets(self, split: Split) -> list[float | int | str]:
        """Return the targets of a part as people read them, as :meth:`display` does."""
        return [self.display(split, k).target for k in range(len(getattr(self, split)))]

    def table(self) -> pd.DataFrame | None:
        """Return the file of the training rows as it is, all rows and columns; None where there is no table.

        ``origin("train").row`` are rows of it.
        """
        return None

    def named(self, split: Split, index: int) -> Display:
        """Return an instance as a person reads it, under its own name, with what its source says beside."""
        shown, origin = self.display(split, index), self.origin(split)
        row = dict(shown.row or {})
        row |= {name: plain(cells[index]) for name, cells in origin.cells.items() if name not in row}
        identifier = None if origin.id is None else origin.id[index]
        return dataclasses.replace(
            shown, row=row or shown.row, data_row=int(origin.row[index]), id=identifier
        )

    def prediction(self, outputs: Tensor) -> str:
        """Return one instance's network outputs as a person reads them: the class, or the values."""
        if self.task == "classification":
            return self.class_names[int(outputs.argmax())] if self.class_names else str(int(outputs.argmax()))
        return ", ".join(figures(v) for v in outputs.flatten()[:3].tolist())

    def original(self, values: Tensor) -> Tensor:
        """Return outputs or targets of a regression ``[...]`` in the target's own units."""
        return values

    @property
    def inputs(self) -> int:
        """Width of an instance's flattened input (what an MLP is built for)."""
        assert isinstance(self.train.inputs, torch.Tensor)
        return self.train.inputs[0].numel()

    def setup(self, stage: str | None = None) -> None:
        if not self._loaded:
            self.load()
            self._loaded = True

    def train_dataloader(self) -> DataLoader[Instances]:
        # a generator of its own, seeded from the global one, which the experiment seeds
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        order = RandomSampler(range(len(self.train)), generator=generator)
        return _loader(self.train, BatchSampler(order, self.batch_size, drop_last=False))

    def val_dataloader(self) -> DataLoader[Instances]:
        order = SequentialSampler(range(len(self.test)))
        return _loader(self.test, BatchSampler(order, max(self.batch_size, 256), drop_last=False))

    test_dataloader = val_dataloader


def held_out(total: int, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the training and of the test part, drawn as in the paper.

    Args:
        total: number of instances.
        test_size: share of them, or their number.
        seed: ``random_state`` of the split.

    Raises:
        InputError: a part would be empty.
    """
    if not 0 <= seed < 2**32:
        raise InputError("dataset.split_seed", f"expected a number from 0 to 2^32 - 1 but got {seed}")
    try:
        train, test = train_test_split(np.arange(total), test_size=test_size, random_state=seed)
    except ValueError:
        raise InputError("dataset.test_size", f"{test_size} of {total} instances can't be held out") from None
    return train, test


def plain(value: Any) -> float | int | str:
    """Return a table's value as a display holds it: a number of Python's own, or text."""
    if isinstance(value, (bool, np.bool_)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return str(value)


def _loader(instances: Instances, sampler: BatchSampler) -> DataLoader[Instances]:
    """Return a loader that indexes a whole batch at once (no per-instance collation)."""
    return DataLoader(instances, sampler=sampler, batch_size=None)  # type: ignore[arg-type]
