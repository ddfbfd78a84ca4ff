"""Rounding: its size is foretold, and a gold standard near it says so."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fimo.data.instances import Instances
from fimo.engine.context import Setting
from fimo.further_training import Protocol, further_train
from fimo.further_training.resolution import (
    NEAR,
    measured_noise,
    repeats,
    rounding_noise,
    rounding_share,
)
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from fimo.store.files import Store
from tests.cases import CASES, mlp


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


def amplifying() -> tuple[FinalModel, Instances, Instances]:
    """A network that Adam at a large learning rate moves about, with 24 training and 6 test instances."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y = torch.randn(30, 4), torch.randint(3, (30,))
        model = FinalModel(mlp(4, (16, 16, 16), 3, nn.ReLU), cross_entropy, accept_poor=True)
    whole = Instances(x, y)
    return model, whole[:24], whole[24:]


def test_what_training_amplifies_is_measured_on_runs_repeated_in_float64(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    data = amplifying()
    protocol = Protocol(optimizer="adam", lr=0.1, batch_size=5, steps=200, evaluate_every=100)
    store, seeds = Store(tmp_path), 20
    single = further_train(*data, protocol, seeds, 24, store=store)
    double = further_train(*data, protocol.in_float64(), seeds, 24)
    noise = (single.raw - double.raw).double().square().mean((0, 2, 3)).sqrt()
    truth = noise / seeds**0.5 / single.sensitivity.double().square().mean((1, 2)).sqrt()
    assert (rounding_share(single, data[0], data[2], protocol) < 1e-6).all()  # what is foretold
    assert truth.max() > NEAR
    said = [r.getMessage() for r in caplog.records if "rounding makes up" in r.getMessage()]
    assert len(said) == 1
    assert "measured on some runs" in said[0]
    share = float(re.search(r"about (\d+)%", said[0])[1]) / 100  # type: ignore[index]
    assert 0.3 * truth.max() < share < 3 * truth.max()
    caplog.clear()
    again = further_train(*data, protocol, seeds, 24, store=store)
    assert torch.equal(again.raw, single.raw)
    assert said[0] in caplog.text  # though nothing is run again


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more, a chunk has fewer runs, and no more than a chunk of them is repeated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_on_all_runs_the_measured_noise_is_the_noise() -> None:
    data = amplifying()
    for rule in ("shift", "mask"):
        protocol = Protocol(optimizer="adam", lr=0.1, batch_size=23, epochs=40, leave_out=rule)  # type: ignore[arg-type]
        units = [(i,) for i in range(24)]
        single = further_train(*data, protocol, [0], units)
        double = further_train(*data, protocol.in_float64(), [0], units)
        wide = Setting.build(*data, protocol.in_float64())
        found = measured_noise(single, wide, units, 24)
        expected = (single.raw - double.raw).double().square().mean((0, 2, 3)).sqrt()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
def test_noise_is_measured_on_groups_of_any_sizes(rule: str) -> None:
    data = amplifying()
    protocol = Protocol(optimizer="adam", lr=0.1, batch_size=5, epochs=6, leave_out=rule)  # type: ignore[arg-type]
    units = [(0,), (3, 4, 5), (7,), (8, 9), (1, 2, 11)]
    single = further_train(*data, protocol, [0], units)
    double = further_train(*data, protocol.in_float64(), [0], units)
    found = measured_noise(single, Setting.build(*data, protocol.in_float64()), units, len(units))
    expected = (single.raw - double.raw).double().square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("runs", "repeated"), [(6, 0), (199, 0), (200, 1), (510, 4), (5100, 16)])
def test_repeated_runs_are_a_fiftieth_of_the_steps_at_most(runs: int, repeated: int) -> None:
    assert repeats(runs) == repeated
    assert not repeated or 2 * (repeated + 1) <= 0.02 * runs


def test_with_few_runs_what_is_foretold_is_said_to_be_a_lower_bound(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["conv_net"]().to(torch.float32)
    further_train(
        case.final_model, case.train, case.test, Protocol(lr=1e-7, batch_size=5, epochs=1), [0], [0, 3]
    )
    assert "at least: foretold, without what training amplifies" in caplog.text


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
