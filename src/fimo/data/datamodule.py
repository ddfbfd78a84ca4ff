"""A data set as a LightningDataModule: training and test instances in memory, shown to people by index."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from fimo.data.display import Display
from fimo.data.instances import Instances

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
    """

    train: Instances
    test: Instances
    task: Task
    outputs: int
    class_names: tuple[str, ...] = ()

    def __init__(self, name: str, batch_size: int) -> None:
        super().__init__()
        self.name, self.batch_size = name, batch_size
        self._loaded = False

    @abstractmethod
    def load(self) -> None:
        """Read the data and fill the attributes."""

    @abstractmethod
    def display(self, split: Split, index: int) -> Display:
        """Return an instance as a person reads it, in original units."""

    @property
    def inputs(self) -> int:
        """Width of an instance's flattened input (what an MLP is built for)."""
        assert isinstance(self.train.inputs, torch.Tensor)
        return self.train.inputs[0].numel()

    def setup(self, stage: str | None = None) -> None:
        if not self._loaded:
            self.load()
            self._loaded = True

    def train_dataloader(self) -> DataLoader:
        # a generator of its own, seeded from the global one, which the experiment seeds
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        return _loader(
            self.train, BatchSampler(RandomSampler(self.train, generator=generator), self.batch_size, False)
        )  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return _loader(
            self.test, BatchSampler(SequentialSampler(self.test), max(self.batch_size, 256), False)
        )  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def _loader(instances: Instances, sampler: BatchSampler) -> DataLoader:
    """Return a loader that indexes a whole batch at once (no per-instance collation)."""
    return DataLoader(instances, sampler=sampler, batch_size=None)  # type: ignore[arg-type]
