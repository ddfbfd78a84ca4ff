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
        validation: instances by which the final model's epoch is chosen, that are neither trained on nor
            explained; None where none is.
    """

    train: Instances
    test: Instances
    task: Task
    outputs: int
    class_names: tuple[str, ...] = ()
    unit: str = ""
    decisions: tuple[str, ...] = ()
    origins: Mapping[Split, Origin]
    validation: Instances | None = None
    _trained: np.ndarray | None = None  # positions of the training instances among those loaded

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
        """Return one of the instances that were loaded as a person reads it, in original units.

        :meth:`_instance` has its tensors; ``train`` may be shorter (:meth:`hold_out`).
        """

    def origin(self, split: Split) -> Origin:
        """Return where the instances of a part came from: their rows in the user's file, and their names."""
        return self.origins[split] if split in self.origins else Origin.counted(len(getattr(self, split)))

    def shown_targets(self, split: Split) -> list[float | int | str]:
        """Return the targets of a part as people read them, as :meth:`display` does."""
        return [self.shown(split, k).target for k in range(len(getattr(self, split)))]

    def table(self) -> pd.DataFrame | None:
        """Return the file of the training rows as it is, all rows and columns; None where there is no table.

        ``origin("train").row`` are rows of it.
        """
        return None

    def shown(self, split: Split, index: int) -> Display:
        """Return an instance of a part as a person reads it, in original units.

        :meth:`display` counts the training instances that were loaded, some of which may be held out.
        """
        return self.display(split, self._loaded_index(split, index))

    def _loaded_index(self, split: Split, index: int) -> int:
        """Return the index of an instance of a part among those that were loaded."""
        held = self._trained if split == "train" else None
        return index if held is None else int(held[index])

    def _instance(self, split: Split, index: int) -> Instances:
        """Return one of the instances that were loaded ``[1, ...]``, trained on or held out."""
        part: Instances = getattr(self, split)
        if split == "train" and self._trained is not None and self.validation is not None:
            before = int(np.searchsorted(self._trained, index))  # trained ones; the others before it are held
            if before == len(self._trained) or self._trained[before] != index:
                part, index = self.validation, index - before
            else:
                index = before
        return part[index : index + 1]

    def named(self, split: Split, index: int) -> Display:
        """Return an instance as a person reads it, under its own name, with what its source says beside."""
        shown, origin = self.shown(split, index), self.origin(split)
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

    def predicted(self, split: Split, index: int, outputs: Tensor) -> str:
        """Return an instance's network outputs as a person reads them, who knows the instance."""
        return self.prediction(outputs)

    def pieces(self, split: Split, index: int) -> tuple[str, ...] | None:
        """Return the text of each token of a sequence whose tokens are predicted; None of all else."""
        return None

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

    def hold_out(self, size: float, seed: int = 0) -> None:
        """Make some of the training instances the validation part; the others keep their order.

        Args:
            size: share of the training instances (below 1), or their number; 0: none.
            seed: of the draw.

        Raises:
            InputError: ``dataset.validation_size`` leaves a part empty.
        """
        if isinstance(size, bool) or not isinstance(size, int | float) or size < 0:
            raise InputError("dataset.validation_size", f"expected a share or a number but got {size!r}")
        if not size:
            return
        total = len(self.train)
        number = round(size * total) if size < 1 else int(size)
        if not 0 < number < total:
            raise InputError("dataset.validation_size", f"{size} of {total} instances can't be held out")
        drawn = np.random.default_rng(seed).permutation(total)
        held, rest = np.sort(drawn[:number]), np.sort(drawn[number:])
        origin = self.origin("train")[rest]
        self.validation = self.train[torch.from_numpy(held)]
        self.train, self._trained = self.train[torch.from_numpy(rest)], rest
        self.origins = {**self.origins, "train": origin}
        said = f"{number} of {total} training instances choose the final model's epoch and are not trained on"
        self.decisions = (*self.decisions, f"{said} (dataset.validation_size)")

    def train_dataloader(self) -> DataLoader[Instances]:
        # a generator of its own, seeded from the global one, which the experiment seeds
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        order = RandomSampler(range(len(self.train)), generator=generator)
        return _loader(self.train, BatchSampler(order, self.batch_size, drop_last=False))

    def val_dataloader(self) -> DataLoader[Instances]:
        return self._in_order(self.test if self.validation is None else self.validation)

    def test_dataloader(self) -> DataLoader[Instances]:
        return self._in_order(self.test)

    def _in_order(self, instances: Instances) -> DataLoader[Instances]:
        order = SequentialSampler(range(len(instances)))
        return _loader(instances, BatchSampler(order, max(self.batch_size, 256), drop_last=False))


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
