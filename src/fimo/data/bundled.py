"""The data sets that scikit-learn ships: real data that needs no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from fimo.data.datamodule import Task
from fimo.data.tabular import Table, TabularModule
from fimo.errors import InputError


class BundledData(TabularModule):
    """``diabetes`` (regression), ``breast_cancer`` or ``digits`` (classification)."""

    def __init__(self, name: str, batch_size: int = 32, test_size: float = 0.1, split_seed: int = 0) -> None:
        readers: dict[str, tuple[Callable[[], Any], Task]] = {
            "diabetes": (lambda: load_diabetes(as_frame=True, scaled=False), "regression"),
            "breast_cancer": (lambda: load_breast_cancer(as_frame=True), "classification"),
            "digits": (lambda: load_digits(as_frame=True), "classification"),
        }
        if name not in readers:
            raise InputError("dataset.name", f"expected one of {', '.join(readers)} but got {name!r}")
        self._reader, task = readers[name]
        super().__init__(name, task, batch_size, test_size, split_seed)

    def read(self) -> Table:
        bunch = self._reader()
        target = bunch.target
        if self.task == "classification":
            target = target.map(dict(enumerate(map(str, bunch.target_names))))
        return Table(bunch.data, target, "progression" if self.name == "diabetes" else "")
