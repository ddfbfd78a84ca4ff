"""The unrolled derivative against differences of real runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.linear_response.recursion import outputs_at
from fimo.methods.unrolled import Unrolled
from fimo.models.final_model import FinalModel
from fimo.models.losses import mean_squared_error
from tests.cases import CASES, LINEAR_CASES, Case, trained
from tests.methods.test_response import following
from tests.reference.further_training import plain_run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05},
    "momentum": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "lr": 0.003, "eps": 1e-4},
    "adamw": {"optimizer": "adamw", "lr": 0.003, "eps": 1e-4, "weight_decay": 0.1},
}


def protocol_of(optimizer: str) -> Protocol:
    return Protocol(batch_size=5, epochs=2, leave_out="mask", dtype="float64", **OPTIMIZERS[optimizer])


def output_differences(case: Case, protocol: Protocol, left_out: list[int], h: float) -> Tensor:
    """[J, D, L] at the end: central differences in the weights of left-out instances, by plain loops."""

    def outputs(i: int, weight: float) -> Tensor:
        network = plain_run(case.final_model, case.train, case.test, protocol, 0, [i], weight)[2]
        return outputs_at(case.final_model, dict(network.named_parameters()), case.test)

    return torch.stack([(outputs(i, 1 - h) - outputs(i, 1 + h)) / (2 * h) for i in left_out], -1)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LINEAR_CASES)
def test_the_loss_is_evaluated_at_outputs_changed_by_their_derivative(
    name: str, optimizer: str, mode: Any
) -> None:
    case, protocol, left_out = CASES[name](), protocol_of(optimizer), [0, 7, 22]
    ft = following(case, protocol, [0])
    run = (case.final_model, case.train, case.test, torch.tensor(left_out), ft)
    found = Unrolled(mode=mode).attribute(*run).values
    change = output_differences(case, protocol, left_out, 1e-5)
    (trajectory,) = ft.full_runs()
    outputs = outputs_at(case.final_model, trajectory.parameters[-1], case.test)
    loss, y = case.final_model.loss, case.test.targets
    expected = torch.stack([loss(outputs + change[..., k], y) - loss(outputs, y) for k in range(3)], -1)
    torch.testing.assert_close(found[-1], expected, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_weight_norm_is_differentiated_by_its_formula(mode: Any, dropout: float) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        second = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 2))
        network = nn.Sequential(nn.Dropout(dropout), first, nn.Tanh(), nn.Dropout(dropout), second)
        x = torch.randn(16, 4)
        case = trained("weight_norm", network, mean_squared_error, x, x[:, :2].sin(), 12, steps=5)
    finally:
        torch.set_default_dtype(before)
    protocol = protocol_of("momentum")
    change = output_differences(case, protocol, [0, 7], 1e-5)
    found = (
        Unrolled(mode=mode)
        .attribute(
            case.final_model, case.train, case.test, torch.tensor([0, 7]), following(case, protocol, [0])
        )
        .values
    )
    network = plain_run(case.final_model, case.train, case.test, protocol, 0)[2]
    outputs = outputs_at(case.final_model, dict(network.named_parameters()), case.test)
    loss, y = case.final_model.loss, case.test.targets
    expected = torch.stack([loss(outputs + change[..., k], y) - loss(outputs, y) for k in range(2)], -1)
    torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-9)


class NoForwardDerivative(nn.Module):
    """Weight normalisation by torch's fused operation, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch._weight_norm(self.v, self.g, 0).T


def test_an_operation_without_a_forward_derivative_is_refused_before_work_starts() -> None:
    model = FinalModel(NoForwardDerivative(), mean_squared_error)
    reason = Unrolled().inapplicable(model, Instances(torch.randn(3, 4), torch.randn(3, 2)))
    assert reason is not None
    assert "weight_norm" in reason


def test_outputs_too_many_to_hold_are_refused_before_work_starts() -> None:
    wide = FinalModel(nn.Linear(2, 2**14 + 1), mean_squared_error)
    train = Instances(torch.zeros(1, 2), torch.zeros(1, 2**14 + 1))
    reason = Unrolled().inapplicable(wide, train)
    assert reason is not None
    assert "16384" in reason
    assert "16385" in reason


@pytest.mark.parametrize("propagate", ["outputs", "loss"])
@pytest.mark.parametrize("name", CASES)
def test_tangents_and_adjoints_agree(name: str, propagate: Any) -> None:
    case, protocol = CASES[name](), protocol_of("sgd")
    left_out = torch.tensor([1, 5, 12])
    run = (case.final_model, case.train, case.test, left_out, following(case, protocol))
    found = [Unrolled(mode=m, propagate=propagate).attribute(*run).values for m in ("forward", "reverse")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-10)


def test_fewer_seeds_are_the_first_ones() -> None:
    case, protocol = CASES["mlp_regression"](), protocol_of("sgd")
    arguments = (case.final_model, case.train, case.test, torch.tensor([1, 5]))
    method = Unrolled(seeds=2)
    found = method.attribute(*arguments, following(case, protocol, [3, 4, 5]))
    each = [Unrolled().attribute(*arguments, following(case, protocol, [s])).values for s in (3, 4)]
    torch.testing.assert_close(found.values, torch.stack(each).mean(0))
    assert "fewer than 4 instances" in found.withheld


@pytest.mark.parametrize("wrong", [{"mode": "x"}, {"propagate": "x"}, {"seeds": 0}, {"chunk": 0}])
def test_a_wrong_argument_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Unrolled(**wrong)


def test_the_direction_with_fewer_derivatives_is_taken_unless_told_otherwise() -> None:
    case, protocol = CASES["mlp_regression"](), protocol_of("sgd")
    test = case.test[:1]  # of one output
    ft = following(case, protocol, [3])
    points = len(ft.steps)
    costs = {}
    for left_out in (1, points, points + 1):
        for mode in ("auto", "forward", "reverse"):
            method = Unrolled(mode=mode)  # type: ignore[arg-type]
            found = method.attribute(case.final_model, case.train, test, torch.arange(left_out), ft)
            costs[left_out, mode] = found.gradient_evaluations
        assert costs[left_out, "auto"] == min(costs[left_out, m] for m in ("forward", "reverse"))
    assert costs[1, "auto"] < costs[points, "auto"] == costs[points + 1, "auto"]
