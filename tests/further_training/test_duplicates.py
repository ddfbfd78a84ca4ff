"""Leaving an instance out with all its exact duplicates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fimo.app.plan import Plan
from fimo.app.scoring import summed
from fimo.data.duplicates import duplicate_groups
from fimo.data.instances import Instances
from fimo.engine.leave_out import RULES, make_rule
from fimo.engine.settings import LEAVE_OUT_RULES
from fimo.further_training import Protocol, further_train, tangent_outputs
from fimo.further_training.adjoint import adjoint
from fimo.linear_response.leave_out_weights import steps
from fimo.methods.exact import ExactInfluence
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response
from fimo.methods.source import Source
from tests.cases import CASES, Case
from tests.methods.test_response import following, linear_regression, real_changes, scores
from tests.reference.further_training import plain_run, plain_sensitivity

COPIES = {9: 2, 11: 2, 12: 6}
"""Instances that are made copies of others: 2 occurs three times, 6 twice."""


def with_copies(case: Case) -> Case:
    index = torch.tensor([COPIES.get(i, i) for i in range(len(case.train))])
    return Case(case.name, case.final_model, case.train[index], case.test)


def test_every_name_has_its_rule() -> None:
    assert set(RULES) == set(LEAVE_OUT_RULES)


def test_duplicates_agree_in_every_tensor() -> None:
    inputs = torch.tensor([[0.0, 1.0], [0.0, 1.0], [-0.0, 1.0], [0.0, 1.5], [0.0, 1.0]])
    targets = torch.tensor([0, 0, 0, 0, 1])
    group = duplicate_groups(Instances(inputs, targets))
    assert (group[:, None] == group).tolist() == [
        [i == k or {i, k} <= {0, 1, 2} for k in range(5)] for i in range(5)
    ]
    tokens = {
        "input_ids": torch.tensor([[1, 2], [1, 2]]),
        "mask": torch.tensor([[True, True], [True, False]]),
    }
    assert len(duplicate_groups(Instances(tokens, torch.zeros(2, dtype=torch.int64))).unique()) == 2


@pytest.mark.parametrize("name", ["mlp_regression", "conv_net"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_gold_standard_equals_a_plain_loop(name: str, optimizer: str) -> None:
    case, units = with_copies(CASES[name]()), [[0], [2], [11], [6, 9]]
    protocol = Protocol(
        optimizer=optimizer, lr=0.02, batch_size=5, epochs=2, leave_out="with_duplicates", dtype="float64"
    )
    data = (case.final_model, case.train, case.test, protocol, [3, 0], units)
    found, expected = further_train(*data, chunk=3), plain_sensitivity(*data)["raw"]
    atol = 1e-7 * expected.abs().max().item()  # raw changes are handed out in float32
    torch.testing.assert_close(found.raw.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(found.raw[..., 1], found.raw[..., 2], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}], ids=["plain", "momentum"])
@pytest.mark.parametrize("size", [4, 14])
def test_on_a_linear_model_the_response_is_the_real_change(options: dict[str, Any], size: int) -> None:
    case = linear_regression(14)
    index = torch.tensor([{5: 0, 9: 0, 13: 3}.get(i, i) for i in range(14)])
    case = Case("copies", case.final_model, case.train[index], case.test)
    protocol = Protocol(
        lr=0.05, batch_size=size, epochs=3, dtype="float64", leave_out="with_duplicates", **options
    )
    left_out = [0, 3, 7]
    found = scores(case, protocol, left_out, kernels="own", segments=3)
    expected = real_changes(case, protocol, left_out, (0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
    alone = real_changes(case, Protocol(**{**vars_of(protocol), "leave_out": "mask"}), left_out, (0, 1))
    assert (alone - expected)[..., :2].abs().max() > 0.1 * expected.abs().max()


def vars_of(protocol: Protocol) -> dict[str, Any]:
    return {name: getattr(protocol, name) for name in protocol.__dataclass_fields__}


def test_the_responses_weights_are_those_of_the_engines_batches() -> None:
    case = with_copies(CASES["mlp_regression"]())
    protocol = Protocol(batch_size=5, epochs=2, leave_out="with_duplicates")
    rule = make_rule(protocol, case.train)
    for step in steps([1], torch.tensor([2, 0]), rule, protocol, torch.float64):
        dropped = torch.tensor([[i in (2, 9, 11) for i in step.index[0]], [i == 0 for i in step.index[0]]])
        expected = torch.where(dropped, 0.0, step.full)
        torch.testing.assert_close(step.without[0].T, expected, rtol=0, atol=0)


def test_derivatives_are_in_the_duplicates_common_weight() -> None:
    case = with_copies(CASES["mlp_regression"]())
    protocol = Protocol(
        lr=0.02, momentum=0.9, batch_size=5, epochs=2, leave_out="with_duplicates", dtype="float64"
    )
    data = (case.final_model, case.train, case.test, protocol, 1)
    forward = tangent_outputs(*data, range(len(case.train))).loss_derivative
    up, down = (plain_run(*data, [11], weight=1 + h)[0] for h in (1e-4, -1e-4))
    expected = (up - down) / 2e-4
    torch.testing.assert_close(forward[..., 2], expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    torch.testing.assert_close(
        adjoint(*data, chunk=7), forward, rtol=0, atol=1e-10 * forward.abs().max().item()
    )


def test_scores_of_methods_that_do_not_follow_the_runs_are_added_over_duplicates() -> None:
    case = with_copies(CASES["mlp_regression"]())
    data: Any = SimpleNamespace(train=case.train)
    plan = Plan(
        Protocol(epochs=1, leave_out="with_duplicates"), [0], [0], [2, [9, 11, 6], 0], [0], True, "auto"
    )
    assert summed(plan, GradDot(), data.train) == [(2, 9, 11), (2, 6, 9, 11, 12), (0,)]
    # those that follow them know of duplicates: each group once
    assert summed(plan, ExactInfluence(damping="auto"), data.train)[1] == (2, 6, 9, 11, 12)
    assert summed(plan, ExactInfluence(damping="time_matched"), data.train)[1] == (6, 9)
    assert summed(plan, Response(), data.train) == [(2,), (6, 9), (0,)]


@pytest.mark.parametrize(
    "method",
    [
        *(Response(along, propagate="loss", checks=0) for along in ("final", "end")),
        Source(),
        ExactInfluence(damping="time_matched"),
    ],
    ids=["final", "end", "source", "exact"],
)
def test_forces_in_mean_batches_are_those_of_all_copies(method: Any) -> None:
    case = with_copies(CASES["mlp_regression"]())
    found = {}
    for rule in ("mask", "with_duplicates"):
        protocol = Protocol(lr=0.02, batch_size=5, epochs=2, leave_out=rule, dtype="float64")  # type: ignore[arg-type]
        followed = following(case, protocol)
        found[rule] = method.attribute(case.final_model, case.train, case.test, [0, 2, 6], followed).values
    copies = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(found["with_duplicates"], found["mask"] * copies)
