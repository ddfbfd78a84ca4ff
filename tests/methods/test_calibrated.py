"""The calibrated response: where it must equal the response, and that it uses real runs elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fimo.errors import InputError
from fimo.evaluation import agreement
from fimo.further_training.protocol import Protocol
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.response import Response
from tests.cases import CASES
from tests.methods.test_response import following, linear_regression, real_changes


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch"])
def test_on_a_linear_model_group_runs_confirm_the_response(rule: Any) -> None:
    case = linear_regression()
    protocol = Protocol(
        lr=0.05, batch_size=4, epochs=2, leave_out=rule, dtype="float64", evaluate_every=1, momentum=0.5
    )
    run = (case.final_model, case.train, case.test, torch.arange(0, 22, 2), following(case, protocol))
    method = CalibratedResponse(budget=0.5, kernels="own")
    found = method.attribute(*run)
    torch.testing.assert_close(found, Response(kernels="own").attribute(*run), rtol=1e-6, atol=1e-10)
    assert method.validation is not None
    assert all(c == pytest.approx(1) and a == pytest.approx(1) for c, a in method.validation)


def test_real_runs_help_where_the_response_is_far_off() -> None:
    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.3, batch_size=5, epochs=12, leave_out="mask", dtype="float64", evaluate_every=60)
    left_out = list(range(0, 22, 2))
    seeds = list(range(4))
    ft = following(case, protocol, seeds)
    run = (case.final_model, case.train, case.test, torch.tensor(left_out), ft)
    truth = real_changes(case, protocol, left_out, seeds)
    plain = agreement(Response().attribute(*run), truth, "pearson")[-1].mean()
    method = CalibratedResponse(budget=0.5)
    found = agreement(method.attribute(*run), truth, "pearson")[-1].mean()
    assert found > plain
    assert method.score_sem is not None
    assert (method.score_sem > 0).all()


def test_without_a_budget_it_is_the_response() -> None:
    case = CASES["mlp_classification"]()
    protocol = Protocol(lr=0.02, batch_size=5, epochs=2, dtype="float64")
    run = (case.final_model, case.train, case.test, torch.arange(6), following(case, protocol))
    method = CalibratedResponse(budget=0)
    torch.testing.assert_close(method.attribute(*run), Response().attribute(*run))
    assert method.validation is None


def test_a_wrong_budget_is_refused() -> None:
    with pytest.raises(InputError, match="budget"):
        CalibratedResponse(budget=-1)
