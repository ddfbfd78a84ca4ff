"""How long further training will take is said before it begins, from a short measurement."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch

from fimo.data.instances import Instances
from fimo.engine import driver
from fimo.engine.context import Setting
from fimo.engine.pace import Pace, as_time, expected_seconds, measure_pace, saved_steps
from fimo.further_training import Protocol, further_train
from fimo.models.final_model import FinalModel
from fimo.models.losses import mean_squared_error
from fimo.store.files import Store
from tests.cases import CASES, mlp


def problem(width: int = 64) -> tuple[FinalModel, Instances, Instances]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(220, 10, generator=generator)
    train, test = Instances(inputs[:200], inputs[:200, :1]), Instances(inputs[200:], inputs[200:, :1])
    return FinalModel(mlp(10, (width, width), 1, torch.nn.ReLU), mean_squared_error), train, test


def test_a_measured_pace_foretells_the_time_of_the_runs() -> None:
    model, train, test = problem()
    protocol = Protocol(lr=0.01, epochs=6)
    setting = Setting.build(model, train, test, protocol)
    pace = measure_pace(setting, 16, 0.4)
    began = time.monotonic()
    further_train(model, train, test, protocol, range(4), range(32), chunk=16)
    took = time.monotonic() - began
    expected = expected_seconds(setting, pace, seeds=4, units=32, points=6, size=16)
    assert 0.1 * took < expected < 5 * took  # the machine's other work allows no narrower bounds


def test_steps_that_runs_share_with_their_full_run_are_not_counted() -> None:
    model, train, test = problem()
    setting = Setting.build(model, train, test, Protocol(lr=0.01, epochs=6, batch_size=10))
    assert saved_steps(setting, runs=50, chunks=1) == 0
    assert saved_steps(setting, runs=50, chunks=5) == pytest.approx(50 * 20 * 0.4)
    every = Setting.build(model, train, test, Protocol(lr=0.01, epochs=6, leave_out="every_batch"))
    assert saved_steps(every, 50, 5) == 0
    assert Pace(2.0, 3.0).seconds(10, 1) == 23


def test_the_time_is_said_before_long_jobs_and_not_before_short_ones(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = CASES["mlp_regression"]()
    data, protocol, store = (case.final_model, case.train, case.test), Protocol(epochs=2), Store(tmp_path)
    with caplog.at_level(logging.INFO):
        further_train(*data, protocol, [0, 1], [0, 1, 2], store=store)
    assert "about" not in caplog.text
    monkeypatch.setattr(driver, "LEAST_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        further_train(*data, protocol, [0, 1, 2], [0, 1, 2], store=store)
    assert "further training: 12 runs of 2 steps, 67% of them in the store, " in caplog.text


def test_measuring_the_pace_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp_regression"]()
    data, protocol = (case.final_model, case.train, case.test), Protocol(epochs=2)
    before = further_train(*data, protocol, [0], [0, 1, 2]).raw
    monkeypatch.setattr(driver, "LEAST_SECONDS", 0.0)
    assert torch.equal(further_train(*data, protocol, [0], [0, 1, 2]).raw, before)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.3, "less than a second"), (40, "40 s"), (150, "2.5 min"), (5400, "90 min"), (3 * 86400, "3 days")],
)
def test_lengths_of_time_are_said_as_people_do(seconds: float, text: str) -> None:
    assert as_time(seconds) == text
