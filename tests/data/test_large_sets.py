"""Sets that are read in blocks are what they are at once; large ones are in files that vanish with them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split

from fimo.data import conversion
from fimo.data.conversion import to_instances
from fimo.data.instances import Instances
from fimo.data.tabular import Table, TabularModule
from fimo.errors import InputError

datasets = pytest.importorskip("datasets")

N = 23


@pytest.fixture(params=["memory", "file"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of five rows, in memory or in files."""
    monkeypatch.setattr(conversion, "BLOCK", 5)
    if request.param == "file":
        monkeypatch.setattr("fimo.data.mapped.MAPPED_BYTES", 0)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def arrays() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((N, 3)).astype(np.float32), generator.integers(4, size=N)


def assert_same(found: Instances, x: np.ndarray, y: np.ndarray) -> None:
    assert isinstance(found.inputs, torch.Tensor)
    assert torch.equal(found.inputs, torch.tensor(x).to(found.inputs.dtype))
    assert found.targets.dtype == torch.int64
    assert torch.equal(found.targets, torch.tensor(y))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_table_of_datasets_is_read_in_blocks(form: str | None) -> None:
    x, y = arrays()
    table = datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist(), "name": ["a"] * N})
    found = to_instances(table.with_format(form), inputs="x", text="name")
    assert_same(found, x, y)
    named = to_instances(table.with_format(form), inputs=["x"])
    assert isinstance(named.inputs, dict)
    assert list(named.inputs) == ["x"]


@pytest.mark.usefixtures("blocks")
def test_elements_are_read_in_blocks() -> None:
    x, y = arrays()
    assert_same(to_instances([(torch.tensor(a), int(b)) for a, b in zip(x, y, strict=True)]), x, y)
    mixed = to_instances([([1.0], k if k < 12 else k + 0.5) for k in range(N)])
    assert mixed.targets[[0, 11, 12]].tolist() == [0.0, 11.0, 12.5]


@pytest.mark.usefixtures("blocks")
def test_arrays_that_are_mapped_from_files_are_read_in_blocks(tmp_path: Path) -> None:
    x, y = arrays()
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name, array in (("x", x), ("y", y)):
        np.save(folder / f"{name}.npy", array)
    mapped = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy"]
    found = to_instances((mapped[0], mapped[1]))
    assert_same(found, x, y)
    assert isinstance(found.inputs, torch.Tensor)
    found.inputs[0] = 7  # as a network may; the file is another
    assert np.array_equal(np.load(folder / "x.npy"), x)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0]] * 20 + [[1.0]] * 3, "x differ in shape"),
        (["a"] * N, "x of an element is str, not numbers"),
        ([[1.0]] * 21 + [[float("nan")]] * 2, "element 21 has NaN or infinite"),
    ],
)
def test_what_is_no_instance_is_refused_in_any_block(rows: Sequence[Any], message: str) -> None:
    table = datasets.Dataset.from_dict({"x": rows, "label": [0] * N})
    with pytest.raises(InputError, match=message):
        to_instances(table, inputs="x")
    with pytest.raises(InputError, match=message):
        to_instances(list(table), inputs="x")


def test_files_of_large_sets_vanish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conversion, "BLOCK", 5)
    monkeypatch.setattr("fimo.data.mapped.MAPPED_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x, y = arrays()
    found = to_instances([(torch.tensor(a), int(b)) for a, b in zip(x, y, strict=True)])
    assert list(tmp_path.iterdir()) == []
    assert_same(found, x, y)


class OfFrame(TabularModule):
    """A table that is in memory."""

    def __init__(self, frame: pd.DataFrame, indicators: tuple[str, ...] = ()) -> None:
        super().__init__("frame", "classification", 32, 0.1, 0)
        self.frame, self.indicators = frame, indicators

    def read(self) -> Table:
        return Table(self.frame.drop(columns="label"), self.frame["label"], indicators=self.indicators)


def frame_of(rows: int, columns: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    x = 3 + 2 * generator.standard_normal((rows, columns)).astype(np.float32)
    frame = pd.DataFrame(x, columns=[f"x{k}" for k in range(columns)])
    return frame.assign(label=generator.integers(3, size=rows))


def test_a_table_is_standardised_in_parts_as_it_is_at_once() -> None:
    frame = frame_of(300, 39).assign(sure=np.arange(300) % 2)
    data = OfFrame(frame, ("sure",))
    data.setup()
    x = frame.drop(columns="label").to_numpy(np.float64)
    train, test = train_test_split(np.arange(300), test_size=0.1, random_state=0)
    z = (x - x[train].mean(0)) / x[train].std(0)
    z[:, -1] = x[:, -1]
    for part, rows in ((data.train, train), (data.test, test)):
        torch.testing.assert_close(part.inputs, torch.tensor(z[rows], dtype=torch.float32), rtol=1e-6, atol=0)


def test_a_table_of_numbers_takes_a_few_times_its_memory_to_read_and_nothing_to_show() -> None:
    frame = frame_of(8000, 128)
    size = frame.memory_usage().sum()
    small = OfFrame(frame_of(100, 128))
    small.setup()  # what is loaded when first used
    data = OfFrame(frame)
    tracemalloc.start()
    try:
        data.setup()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 3 * size  # 14 where all of it is in float64 at once, and in Python's own numbers
    assert held < 1.3 * size  # the inputs
    row = data.origins["train"].row[5]
    assert data.display("train", 5).row["x7"] == float(frame["x7"].iloc[row])
