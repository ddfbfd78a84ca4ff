"""Real leave-one-out runs against plain loops, and which of them come first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fimo.engine.protocol import Protocol
from fimo.linear_response.real_runs import run_without, worthwhile
from tests.cases import CASES
from tests.reference.further_training import plain_run


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("name", ["mlp_regression", "conv_net"])
def test_losses_are_those_of_a_plain_loop_in_the_order_asked_for(name: str, rule: Any) -> None:
    case = CASES[name]()
    protocol = Protocol(lr=0.05, batch_size=4, epochs=2, leave_out=rule, dtype="float64")
    runs = [(1, 4), (5, 0), (1, 0), (3, 4), (2, 0)]
    found = run_without(case.final_model, case.train, case.test, protocol, runs, at_once=2)
    for losses, (instance, seed) in zip(found, runs, strict=True):
        expected = plain_run(case.final_model, case.train, case.test, protocol, seed, [instance])[0]
        torch.testing.assert_close(losses, expected)


def test_runs_come_in_the_order_of_what_they_add() -> None:
    size = torch.tensor([1.0, 16.0, 4.0])
    order = worthwhile(size, 3, own=1.0)
    assert sorted(order) == [(i, s) for i in range(3) for s in range(3)]
    # by hand: a first run halves what isn't known, a second leaves a third, a third a quarter
    assert order[:4] == [(1, 0), (1, 1), (2, 0), (1, 2)]
    for i in range(3):
        assert [s for k, s in order if k == i] == [0, 1, 2]
