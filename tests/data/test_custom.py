"""A user's own data: any map-style data set becomes instances; mistakes are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fimo.data.conversion import to_instances
from fimo.data.custom import CustomData
from fimo.data.instances import Instances
from fimo.errors import InputError


class Pairs(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((2, 2), float(index)), index % 3


ROWS = [{"x": [k, k + 1], "mask": [1, 0], "label": k % 2, "note": f"row {k}"} for k in range(6)]


def custom(train: Any, test: Any = None, **arguments: Any) -> CustomData:
    data = CustomData(train, train if test is None else test, **arguments)
    data.setup()
    return data


def test_a_map_style_data_set_becomes_instances() -> None:
    data = custom(Pairs())
    assert isinstance(data.train.inputs, torch.Tensor)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.inputs[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (data.task, data.outputs, data.inputs) == ("classification", 3, 4)
    assert data.display("train", 4).target == "1"


def test_a_tensor_data_set_with_real_targets_is_a_regression() -> None:
    x, y = torch.randn(5, 3), torch.randn(5)
    data = custom(TensorDataset(x, y))
    assert torch.equal(data.train.targets, y[:, None])
    assert (data.task, data.outputs) == ("regression", 1)
    assert custom(TensorDataset(x, torch.arange(5)), task="regression").train.targets.dtype == torch.float32


def test_columns_are_passed_by_name_or_alone() -> None:
    data = custom(ROWS, inputs=["x", "mask"], text="note", class_names=["even", "odd"])
    assert isinstance(data.train.inputs, dict)
    assert list(data.train.inputs) == ["x", "mask"]
    assert data.train.inputs["x"].dtype == torch.int64
    shown = data.display("train", 1)
    assert (shown.text, shown.target) == ("row 1", "odd")
    alone = custom(ROWS, inputs="x")
    assert isinstance(alone.train.inputs, torch.Tensor)
    assert alone.train.inputs.shape == (6, 2)
    assert dict(alone.display("train", 2).row or {}) == {"x[0]": 2.0, "x[1]": 3.0}


def test_the_datasets_library_is_read_by_columns() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = custom(datasets.Dataset.from_list(ROWS), text="note")
    assert isinstance(data.train.inputs, dict)
    assert data.train.inputs["mask"].tolist() == [[1, 0]] * 6
    assert data.train.targets.tolist() == [0, 1] * 3


def test_a_frame_of_pandas_is_read_by_rows() -> None:
    frame = pd.DataFrame({"x": [0.5, 1.5, 2.5], "label": [0, 1, 0], "note": ["a", "b", "c"]})
    data = custom(frame, inputs="x", text="note")
    assert data.train.inputs.tolist() == [0.5, 1.5, 2.5]
    assert data.display("train", 2).text == "c"


def test_instances_are_taken_as_they_are() -> None:
    instances = Instances(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    assert custom(instances).train is instances


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        ([], {}, "the data set is empty"),
        (iter([1]), {}, "a data set with a length"),
        ([1, 2], {}, "expected elements (inputs, target) or mappings but got int"),
        (ROWS, {"target": "class"}, "no column 'class'; there are x, mask, label, note"),
        (ROWS, {}, "note of an element is str, not numbers"),
        ([([1.0], 0), ([1.0, 2.0], 1)], {}, "inputs differ in shape between elements ((1,) and (2,))"),
        ([([1.0], 0), ([float("nan")], 1)], {}, "element 1 has NaN or infinite inputs"),
    ],
)
def test_what_is_no_data_set_is_named(source: Any, arguments: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        to_instances(source, key="dataset.train", **arguments)
    assert caught.value.key == "dataset.train"
    assert said in caught.value.problem


def test_labels_outside_the_classes_are_named() -> None:
    test = [([1.0], 0), ([2.0], 5)]
    with pytest.raises(InputError, match=r"dataset.test: element 1 has the label 5; there are 2 classes"):
        custom([([1.0], 0), ([2.0], 1)], test)
    with pytest.raises(InputError, match=r"dataset.train: element 0 has the label -1"):
        custom([([1.0], -1), ([2.0], 1)], test)
    with pytest.raises(InputError, match="one class only"):
        custom([([1.0], 0), ([2.0], 0)])
    with pytest.raises(InputError, match=r"dataset\.task: expected one of"):
        CustomData([], [], task="ranking")
