"""The choice of a method, and that it is what is run."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods import response
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.best import Best
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.response import Response
from tests.cases import CASES
from tests.methods.test_response import following

CASE = CASES["mlp_regression"]()
RUN = (CASE.final_model, CASE.train, CASE.test, torch.tensor([0, 2, 5, 7, 9]))


def problem(ft: FurtherTraining) -> AttributionProblem:
    return AttributionProblem(*RUN, ft)


def test_little_sgd_takes_the_response_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    ft = following(CASE, Protocol(lr=0.02, batch_size=6, epochs=2, dtype="float64"))
    method = Best()
    with caplog.at_level(logging.INFO):
        found = method.attribute(*RUN, ft)
    assert torch.equal(found.values, Response().attribute(*RUN, ft).values)
    assert "2 epochs of SGD" in caplog.text
    assert found.method == "Best"
    assert "Response, since 2 epochs of SGD" in found.notes[0]
    assert found.sem is not None
    assert found.gradient_evaluations > 0


@pytest.mark.parametrize(
    ("options", "followed"), [({}, 8), ({"clip_norm": 1e9}, 10), ({"leave_out": "with_duplicates"}, 10)]
)
def test_of_many_seeds_that_are_alike_eight_are_followed(options: dict[str, Any], followed: int) -> None:
    ft = following(CASE, Protocol(lr=0.02, batch_size=6, epochs=1, dtype="float64", **options), range(10))
    found = Best(checks=0).attribute(*RUN, ft)
    expected = Response(checks=0).attribute(*RUN, ft.first(followed))
    assert torch.equal(found.values, expected.values)
    assert found.gradient_evaluations == expected.gradient_evaluations


def test_with_many_seeds_the_budget_also_buys_real_runs() -> None:
    index = torch.arange(10)
    little = Protocol(lr=0.02, batch_size=6, epochs=1, dtype="float64")
    ft = following(CASE, little, range(40))
    few, many = (
        Best(budget=budget).choose(AttributionProblem(*RUN[:3], index, ft)) for budget in (0.05, 0.5)
    )
    assert type(few[0]) is Response
    assert isinstance(many[0], CalibratedResponse)
    assert "real run" in many[1]
    found = Best(budget=0.5).attribute(*RUN[:3], index, ft)
    runs = int(re.search(r"corrected by (\d+) real runs", " ".join(found.notes))[1])  # type: ignore[index]
    assert runs >= len(index)
    # fewer instances than there is anything to correct by
    fewest = AttributionProblem(*RUN, following(CASE, little, range(100)))
    assert type(Best(budget=1).choose(fewest)[0]) is Response


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(lr=0.02, batch_size=6, epochs=9, dtype="float64"),
        Protocol(optimizer="adam", lr=1e-3, batch_size=6, epochs=1, dtype="float64"),
    ],
)
def test_much_sgd_and_adam_are_corrected_by_real_runs(protocol: Protocol) -> None:
    method, reason = Best().choose(problem(following(CASE, protocol)))
    assert isinstance(method, CalibratedResponse)
    assert reason


def test_where_the_kernel_is_too_large_ekfac_s_eigenbasis_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response, "MAX_OUTPUTS", 0)
    ft = following(CASE, Protocol(lr=0.02, batch_size=6, epochs=2, dtype="float64"))
    method = Best()
    found = method.attribute(*RUN, ft)
    chosen, _ = method.choose(problem(ft))
    assert chosen.form == "ekfac"
    assert any("EK-FAC's eigenbasis" in note for note in found.notes)
    assert found.values.shape == (2, len(CASE.test), 5)


def test_a_wrong_argument_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="short"):
        Best(short=-1)
    with pytest.raises(InputError, match="budget"):
        Best(budget=2)


def test_the_choice_is_by_epochs_and_the_chosen_method_has_the_arguments_bars_and_cost() -> None:
    def chosen(**arguments: float) -> tuple[object, str]:
        ft = following(CASE, Protocol(lr=0.02, batch_size=6, epochs=2, dtype="float64"))
        return Best(**arguments).choose(problem(ft))  # type: ignore[arg-type]

    linear, why = chosen(short=2, memory_mb=7, checks=3)  # up to so many
    assert isinstance(linear, Response)
    assert not isinstance(linear, CalibratedResponse)
    assert why.startswith("2 epochs of SGD")
    assert (linear.memory_mb, linear.checks) == (7, 3)
    corrected, why = chosen(short=1.9, budget=0.3, memory_mb=7, checks=3)
    assert isinstance(corrected, CalibratedResponse)
    assert why.startswith("after 2 epochs")
    assert (corrected.budget, corrected.memory_mb, corrected.checks) == (0.3, 7, 3)
    assert isinstance(chosen(short=0)[0], CalibratedResponse)
    adam = following(CASE, Protocol(optimizer="adam", lr=1e-3, batch_size=6, epochs=1, dtype="float64"))
    assert Best().choose(problem(adam))[1].startswith("adam's")


def test_the_cost_and_the_error_bars_are_the_chosen_method_s() -> None:
    ft = following(CASE, Protocol(lr=0.02, batch_size=6, epochs=2, dtype="float64"))
    found = Best().attribute(*RUN, ft)
    method, reason = Best().choose(problem(ft))
    chosen = method.attribute(*RUN, ft)
    assert found.sem is not None
    assert chosen.sem is not None
    torch.testing.assert_close(found.sem, chosen.sem, rtol=0, atol=0, equal_nan=True)
    assert found.withheld == chosen.withheld
    assert found.gradient_evaluations == chosen.gradient_evaluations
    assert found.notes == (f"Response, since {reason}", *chosen.notes)
    assert reason.startswith("2 epochs")
