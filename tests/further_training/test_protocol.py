"""What a protocol refuses, by its key, and what two protocols share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fimo.errors import InputError
from fimo.further_training import Protocol

BAD: dict[str, list[Any]] = {
    "optimizer": ["adagrad", None],
    "leave_out": ["drop"],
    "schedule": ["step"],
    "dtype": ["int8"],
    "evaluation_dtype": ["int8"],
    "autocast": ["float16"],
    "batch_size": [0, -1, 2.5, True, None],
    "epochs": [0, 1.5, "2"],
    "lr": [0, -0.1, float("inf"), float("nan"), "fast", None],
    "momentum": [-0.1, 1.0],
    "nesterov": [True],  # without momentum
    "weight_decay": [-0.1],
    "betas": [(0.9,), (0.9, 1.0), (-0.1, 0.9)],
    "eps": [-1e-9],
    "clip_norm": [0, -1.0],
    "evaluate_every": [0, "step", 1.5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_its_key_and_shown(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^further_training\.{key}: expected .") as error:
        Protocol(**{"epochs": 2, key: value})
    shown = "momentum > 0" if key == "nesterov" else str(list(value) if key == "betas" else value)
    assert shown in str(error.value)


@pytest.mark.parametrize("both", [{}, {"epochs": 2, "steps": 3}])
def test_exactly_one_of_epochs_and_steps_is_given(both: dict[str, int]) -> None:
    with pytest.raises(
        InputError, match=r"further_training\.epochs: expected exactly one of epochs and steps"
    ):
        Protocol(**both)


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 1), ("epochs", 1), ("lr", 1e-12), ("momentum", 0), ("momentum", 0.999),
     ("weight_decay", 0), ("betas", [0, 0.999]), ("eps", 0), ("clip_norm", 1e-9), ("clip_norm", None),
     ("evaluate_every", 1), ("autocast", "bfloat16"), ("epochs", np.int64(3)), ("lr", np.float32(0.5))],
)  # fmt: skip
def test_the_bounds_themselves_are_allowed_and_numbers_of_numpy_are_numbers(key: str, value: Any) -> None:
    made = getattr(Protocol(**{"epochs": 2, key: value}), key)
    assert made == (tuple(value) if key == "betas" else value)
    assert type(made).__module__ == "builtins"


def test_a_longer_horizon_is_the_same_protocol_unless_the_learning_rate_depends_on_it() -> None:
    short, long = Protocol(epochs=2), Protocol(epochs=5)
    assert short.key() == long.key() == Protocol(steps=7).key()
    for schedule in ("linear", "cosine"):
        short, long = Protocol(epochs=2, schedule=schedule), Protocol(epochs=5, schedule=schedule)
        assert short.key() != long.key()


def test_a_learning_rate_falls_to_zero_at_the_end_as_scheduled() -> None:
    rates = {s: Protocol(epochs=1, lr=0.5, schedule=s) for s in ("constant", "linear", "cosine")}
    assert [rates["constant"].learning_rate(t, 4) for t in range(4)] == [0.5] * 4
    assert [rates["linear"].learning_rate(t, 4) for t in range(4)] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    cosine = [0.25 * (1 + np.cos(np.pi * t / 4)) for t in range(4)]
    assert [rates["cosine"].learning_rate(t, 4) for t in range(4)] == pytest.approx(cosine)


def test_steps_and_epochs_count_the_same() -> None:
    by_epochs, by_steps = Protocol(epochs=3, batch_size=5), Protocol(steps=14, batch_size=5)
    assert by_epochs.batches_per_epoch(23) == 5
    assert by_epochs.batches_per_epoch(25) == 5
    assert by_epochs.total_steps(23) == 15
    assert by_steps.total_steps(23) == 14
    assert dataclasses.replace(by_epochs, batch_size=100).total_steps(23) == 3
