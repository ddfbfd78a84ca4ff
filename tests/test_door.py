"""What users hand over is converted where its meaning is plain, and refused in one line where it is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training import Protocol, full_runs, further_train
from fimo.further_training.sensitivity import Sensitivity
from fimo.methods.graddot import GradDot
from fimo.models.final_model import FinalModel
from fimo.models.losses import mean_squared_error

PROTOCOL = Protocol(lr=0.05, batch_size=8, epochs=1)


def network(inputs: int = 3, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def regression(n: int = 20) -> Instances:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return Instances(x, x[:, :1].sin())


MODEL, DATA = FinalModel(network(), mean_squared_error), regression()


def trained(**changes: Any) -> Sensitivity:
    given = {"seeds": [0, 1], "left_out": [0, 5, 10, 15], **changes}
    return further_train(MODEL, DATA[:16], DATA[16:], PROTOCOL, **given)


@pytest.mark.parametrize("seeds", [2, np.int64(2), np.array([0, 1]), torch.tensor([0, 1]), range(2), (0, 1)])
def test_seeds_are_a_number_or_any_list_of_them(seeds: Any) -> None:
    torch.testing.assert_close(trained(seeds=seeds, left_out=[0, 5]).raw, trained(left_out=[0, 5]).raw)
    assert [run.seed for run in full_runs(MODEL, DATA, PROTOCOL, seeds)] == [0, 1]


@pytest.mark.parametrize(
    "left_out", [4, np.array([0, 4, 8, 12]), torch.tensor([0, 4, 8, 12]), range(0, 16, 4)]
)
def test_left_out_instances_are_a_number_or_any_list_of_them(left_out: Any) -> None:
    assert trained(left_out=left_out).left_out.tolist() == [0, 4, 8, 12]
    found = GradDot().attribute(MODEL, DATA[:16], DATA[16:], left_out)
    expected = GradDot().attribute(MODEL, DATA[:16], DATA[16:])[:, [0, 4, 8, 12]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ([16], "expected indices in [0, 16) but got 16"),
        (torch.tensor([-1]), "expected indices in [0, 16) but got -1"),
        (17, "expected a number from 1 to 16, or a list of indices, but got 17"),
        ([0.5], "expected whole numbers but got 0.5"),
        (np.ones(16, bool), "expected whole numbers but got True"),
        ([], "expected at least one index but got none"),
        (1.5, "a list"),
    ],
)
def test_indices_that_are_not_there_are_refused(left_out: Any, said: str) -> None:
    for call in (
        lambda: trained(left_out=left_out),
        lambda: GradDot().attribute(MODEL, DATA[:16], DATA[16:], left_out),
    ):
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [(0, "at least 1 seed"), ([0, 0], "twice"), ([-1], r"in [0, 2^31)"), ("ab", "whole"), (None, "of seeds")],
)
def test_seeds_that_mean_nothing_are_refused(seeds: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        trained(seeds=seeds)


def test_a_sensitivity_is_saved_and_read_under_a_text_path(tmp_path: Path) -> None:
    found = trained()
    found.save(str(tmp_path / "found.safetensors"))
    torch.testing.assert_close(Sensitivity.load(str(tmp_path / "found.safetensors")).raw, found.raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1),
        ("lr", "0.1"),
        ("batch_size", 2.5),
        ("momentum", None),
        ("batch_size", True),
        ("epochs", 1.5),
    ],
)
def test_a_bad_value_of_a_protocol_is_named_before_what_is_missing(key: str, value: Any) -> None:
    with pytest.raises(
        InputError, match=rf"^further_training.{key}: expected .* but got {re.escape(repr(value))}"
    ):
        Protocol(**{key: value})


def test_a_protocol_takes_numpys_numbers() -> None:
    protocol = Protocol(lr=np.float32(0.5), batch_size=np.int64(4), epochs=np.int32(2))
    assert protocol == Protocol(lr=0.5, batch_size=4, epochs=2)
    assert type(protocol.lr) is float
    assert type(protocol.epochs) is int
