"""What users hold instances in becomes instances, in order, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fimo.data.conversion import to_instances, train_and_test
from fimo.data.instances import Instances
from fimo.errors import InputError

X = torch.arange(12.0).view(6, 2)
Y = torch.tensor([0, 1, 0, 1, 1, 0])
FRAME_B = torch.arange(6.0)
FRAME = pd.DataFrame({"a": X[:, 0].numpy(), "b": [0, 1, 2, 3, 4, 5], "y": Y.numpy(), "name": list("uvwxyz")})


def same(found: Instances, x: torch.Tensor, y: torch.Tensor) -> bool:
    assert isinstance(found.inputs, torch.Tensor)
    alike = (found.inputs.dtype, found.targets.dtype) == (x.dtype, y.dtype)
    return alike and torch.equal(found.inputs, x) and torch.equal(found.targets, y)


@pytest.mark.parametrize(
    "source",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        (X.numpy().astype(np.float64), Y.numpy().astype(np.int32)),
        (pd.DataFrame(X.numpy()), pd.Series(Y.numpy(), index=range(10, 16))),
        (np.asfortranarray(X.numpy())[::-1][::-1], Y),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=3, drop_last=True),
        [(x, int(y)) for x, y in zip(X.tolist(), Y, strict=True)],
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_form_gives_the_same_instances_in_the_same_order(source: Any) -> None:
    assert same(to_instances(source), X, Y)


def test_a_frames_columns_are_one_vector_in_the_order_asked_for() -> None:
    wanted = torch.stack([FRAME_B, X[:, 0]], 1)
    assert same(to_instances(FRAME, ["b", "a"], "y"), wanted, Y)
    assert same(to_instances(FRAME.drop(columns="name"), target="y"), torch.stack([X[:, 0], FRAME_B], 1), Y)
    shuffled = FRAME.sample(frac=1, random_state=0)
    assert to_instances(shuffled, ["b"], "y").inputs[:, 0].tolist() == shuffled["b"].tolist()  # type: ignore[index]
    real = to_instances(FRAME, ["b"], "a")
    assert real.targets.dtype == torch.float32


def test_mappings_are_passed_by_name_and_loaders_of_mappings_too() -> None:
    rows = [{"ids": X[k].long(), "mask": torch.ones(2), "labels": int(Y[k])} for k in range(6)]
    for source in (rows, DataLoader(rows, batch_size=4), ({"ids": X.long(), "mask": torch.ones(6, 2)}, Y)):  # type: ignore[arg-type]
        found = to_instances(source)
        assert isinstance(found.inputs, dict)
        assert list(found.inputs) == ["ids", "mask"]
        assert torch.equal(found.inputs["ids"], X.long())
        assert torch.equal(found.targets, Y)


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        (DataLoader(TensorDataset(X, Y), shuffle=True), {}, "a DataLoader with a RandomSampler"),
        (DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True), {}, "drops its last instances"),
        (FRAME, {}, "say which column is the target (target=...); there are a, b, y, name"),
        (FRAME, {"target": "y"}, "column 'name' is of"),
        (FRAME, {"target": "z"}, "no column 'z'"),
        (FRAME.assign(b=[1, None, 2, 3, 4, 5]), {"inputs": ["b"], "target": "y"}, "has no value in row 1"),
        ((X, Y[:4]), {}, "inputs of shape (6, 2) for 4 targets"),
        ((np.array(["a", "b"]), np.array([0, 1])), {}, "not numbers"),
        ((X / 0, Y), {}, "element 0 has NaN or infinite inputs"),
        (object(), {}, "expected Instances, arrays (X, y), a DataFrame, a DataLoader, or a data set"),
        ((X.to(torch.complex64), Y), {}, "inputs is of complex64; expected real numbers"),
        ((X, Y.numpy() * 1j), {}, "targets is of complex128; expected real numbers"),
        ([(x.to(torch.complex64), 0) for x in X], {}, "inputs is of complex64; expected real numbers"),
        (FRAME.assign(b=1j), {"inputs": ["b"], "target": "y"}, "column 'b' is of complex128; expected real"),
        ((X.to_sparse(), Y), {}, "inputs is sparse; pass .to_dense()"),
        (({"x": X.to_sparse()}, Y), {}, "x is sparse; pass .to_dense()"),
        ([(x.to_sparse(), 0) for x in X], {}, "inputs is sparse; pass .to_dense()"),
        (
            (X, Y.tolist()),
            {},
            "expected (X, y), a tuple whose targets y are an array or a tensor, but got a tuple",
        ),
        ([X, Y], {}, "a tuple whose targets y are an array or a tensor, but got a list of Tensor and Tensor"),
        (({"x": X}, Y.tolist()), {}, "but got a tuple of dict and list"),
    ],
)
def test_what_does_not_say_which_instance_is_which_is_refused(
    source: Any, arguments: dict, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        to_instances(source, key="dataset.train", **arguments)
    assert caught.value.key == "dataset.train"
    assert said in caught.value.problem


def test_two_elements_in_a_list_are_no_pair_of_inputs_and_targets() -> None:
    first, second = {"x": X[0], "label": Y[0]}, {"x": X[1], "label": Y[1]}
    for source in ([first, second], (first, second), [(X[0], Y[0]), (X[1], Y[1])]):
        assert to_instances(source).targets.tolist() == [0, 1]


def test_instances_are_tensors_of_one_length() -> None:
    with pytest.raises(InputError, match=r"dataset: inputs and targets differ .* inputs 6, targets 4"):
        Instances(X, Y[:4])
    with pytest.raises(InputError, match=r"expected a tensor .* but got ndarray; to_instances"):
        Instances(X.numpy(), Y)  # type: ignore[arg-type]


def test_a_test_frame_s_columns_are_those_of_the_training_frame_by_name() -> None:
    frame = FRAME.drop(columns="name")
    other = frame[["b", "y", "a"]].assign(more="text")[:2]
    train, test = train_and_test(frame, other, target="y")
    assert torch.equal(test.inputs, train.inputs[:2])  # type: ignore[arg-type,index]
    x = frame[["a", "b"]]
    train, test = train_and_test((x, Y), (x[["b", "a"]][:2], Y[:2]))
    assert torch.equal(test.inputs, train.inputs[:2])  # type: ignore[arg-type,index]
    for lacking in ((frame, frame.drop(columns="a")), ((x, Y), (x[["b"]], Y))):
        with pytest.raises(InputError, match=r"^dataset\.test: .*no column 'a'"):
            train_and_test(*lacking, target="y")
    with pytest.raises(InputError, match="several columns named 'a'"):
        to_instances(pd.concat([frame, frame[["a"]]], axis=1), target="y")


def test_tables_whose_rows_are_in_another_order_are_refused() -> None:
    x, y = pd.DataFrame({"a": [1.0, 2.0, 3.0]}), pd.Series([0, 1, 0])
    with pytest.raises(InputError, match="same index in another order"):
        to_instances((x, y[::-1]), "train")
    with pytest.raises(InputError, match="same index in another order"):
        to_instances(({"a": x}, y.to_frame()[::-1]), "train")
    assert to_instances((x, y), "train").targets.tolist() == [0, 1, 0]
    assert to_instances((x, y.set_axis([7, 8, 9])), "train").targets.tolist() == [0, 1, 0]
