"""Rounding: its size is foretold, and a gold standard near it says so."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from fimo.further_training import Protocol, further_train
from fimo.further_training.resolution import NEAR, rounding_noise, rounding_share
from fimo.models.final_model import FinalModel
from tests.cases import CASES


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e-2), ("sgd", 1e-4), ("adam", 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_the_difference_of_float32_and_float64_runs_is_about_the_rounding_noise(
    name: str, optimizer: str, lr: float
) -> None:
    case = CASES[name]()
    protocol = Protocol(optimizer=optimizer, lr=lr, batch_size=5, epochs=8)  # type: ignore[arg-type]
    data = (case.final_model, case.train, case.test)
    left_out = range(0, len(case.train), 4)
    single = further_train(*data, protocol, [0, 1], left_out)
    double = further_train(*data, dataclasses.replace(protocol, dtype="float64"), [0, 1], left_out)
    measured = (single.raw - double.raw).double().square().mean((0, 2, 3)).sqrt()
    ratio = rounding_noise(case.final_model, case.test, protocol, single.step.tolist()) / measured
    assert ratio.log().mean().exp() == pytest.approx(1, rel=1.0)  # within a factor of two, over 8 points
    assert ratio.log().mean().exp() > 0.5


def test_small_effects_in_float32_are_warned_of_and_float64_is_not(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["conv_net"]().to(torch.float32)
    data = (case.final_model, case.train, case.test)
    protocol = Protocol(lr=1e-7, batch_size=5, epochs=1)
    left_out = [0, 3, 6, 9]
    with caplog.at_level(logging.WARNING):
        tiny = further_train(*data, protocol, [0], left_out)
    assert "further_training.dtype=float64" in caplog.text
    double = further_train(*data, dataclasses.replace(protocol, dtype="float64"), [0], left_out)
    error = (tiny.raw - double.raw).norm() / double.raw.norm()
    assert error > NEAR  # the warning is true
    assert rounding_share(double, *data[::2], dataclasses.replace(protocol, dtype="float64"))[0] < 1e-6

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        further_train(*data, dataclasses.replace(protocol, dtype="float64"), [0], left_out)
        further_train(*data, dataclasses.replace(protocol, lr=0.01), [0], left_out)
    assert "rounding" not in caplog.text


def test_losses_in_float32_are_part_of_the_noise() -> None:
    case = CASES["mlp_classification"]()
    narrow = Protocol(lr=1e-3, batch_size=5, epochs=1, dtype="float64", evaluation_dtype="float32")
    data = (case.final_model, case.train, case.test)
    raw = further_train(*data, narrow, [0], range(8)).raw
    wide = further_train(*data, dataclasses.replace(narrow, evaluation_dtype="float64"), [0], range(8)).raw
    measured = (raw - wide).double().square().mean().sqrt()
    noise = rounding_noise(case.final_model, case.test, narrow, [5])
    assert 0.3 * measured < noise[0] < 3 * measured


def test_a_measurement_that_no_small_change_moves_has_no_rounding_noise() -> None:
    case = CASES["mlp_classification"]()
    counting = FinalModel(
        case.final_model.network, case.final_model.loss, lambda f, y: (f.argmax(-1) != y).double()
    )
    noise = rounding_noise(counting, case.test, Protocol(steps=3), [3])
    assert noise[0] < 1e-12
