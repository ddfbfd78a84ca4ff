"""Mirrored runs and unlearning against plain loops, dense closed forms and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.methods import mirrored
from fimo.methods.base import AttributionMethod
from fimo.methods.mirrored import Mirrored
from fimo.methods.unlearning import Unlearning
from fimo.models.final_model import FinalModel, apply
from fimo.models.losses import mean_squared_error
from fimo.models.quantities import joined
from fimo.testing import check_method
from tests.cases import CASES, Case
from tests.methods.test_response import following
from tests.reference import attribution as dense
from tests.reference.further_training import make_optimizer

LEFT_OUT = [0, 4, 9]


def scores(method: AttributionMethod, case: Case, protocol: Protocol, seeds: Any = (0, 1)) -> Tensor:
    given = following(case, protocol, seeds)
    return method.attribute(case.final_model, case.train, case.test, LEFT_OUT, given).values


def plain_losses(case: Case, protocol: Protocol, seed: int, j: int, weight: float) -> Tensor:
    """Return training losses ``[E, L]`` of a run with a test instance's loss besides, by a plain loop."""
    network = copy.deepcopy(case.final_model.network).eval().requires_grad_(True)
    loss, train, n = case.final_model.loss, case.train, len(case.train)
    optimizer = make_optimizer(list(network.parameters()), protocol)
    one, left_out = case.test[[j]], train[LEFT_OUT]
    generator, found, step = torch.Generator().manual_seed(seed), [], 0
    points = protocol.evaluation_steps(n, n)
    while step < points[-1]:
        order = torch.randperm(n, generator=generator)
        for index in order.split(protocol.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = protocol.learning_rate(step, points[-1])
            optimizer.zero_grad()
            batch = train[index]
            whole = loss(apply(network, batch.inputs), batch.targets).mean()
            (whole + weight / n * loss(apply(network, one.inputs), one.targets).sum()).backward()
            optimizer.step()
            step += 1
            if step in points:
                with torch.no_grad():
                    found.append(loss(apply(network, left_out.inputs), left_out.targets))
            if step == points[-1]:
                break
    return torch.stack(found)


PROTOCOLS: list[dict[str, Any]] = [
    {"lr": 0.05, "momentum": 0.5, "epochs": 3, "schedule": "linear"},
    {"optimizer": "adam", "lr": 0.01, "steps": 7, "evaluate_every": 3},
    {"optimizer": "lion", "lr": 0.01, "epochs": 1},
]


@pytest.mark.parametrize("settings", PROTOCOLS, ids=["sgd", "adam", "lion"])
@pytest.mark.parametrize("name", ["mlp_regression", "conv_net", "transformer"])
def test_mirrored_scores_are_differences_of_plain_runs(name: str, settings: dict[str, Any]) -> None:
    case, protocol = CASES[name](), Protocol(batch_size=5, dtype="float64", **settings)
    signs = {"both": (-1, 1), "up": (0, 1), "down": (-1, 0)}
    tests = range(len(case.test))

    def mean_losses(sign: int) -> Tensor:
        each = [[plain_losses(case, protocol, s, j, 0.7 * sign) for j in tests] for s in (0, 1)]
        return torch.stack([torch.stack(of_seed, 1) for of_seed in each]).mean(0)

    losses = {sign: mean_losses(sign) for sign in (-1, 0, 1)}
    for direction, (low, high) in signs.items():
        found = scores(Mirrored(direction, 0.7, seeds=None), case, protocol)  # type: ignore[arg-type]
        expected = (losses[low] - losses[high]) / (0.7 * (high - low))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_test_instances_at_a_time_change_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp_classification"]()
    protocol = Protocol(batch_size=5, epochs=2, leave_out="with_duplicates", dtype="float64")
    for direction in ("both", "up"):
        method = Mirrored(direction)  # type: ignore[arg-type]
        monkeypatch.undo()
        whole = scores(method, case, protocol)
        monkeypatch.setattr(mirrored, "LOSSES_BYTES", 1)
        torch.testing.assert_close(scores(method, case, protocol), whole)


def test_copies_that_are_left_out_together_count_together() -> None:
    case = CASES["mlp_regression"]()
    doubled = case.train[[*range(len(case.train)), 4]]
    with_copy = Case("copy", case.final_model, doubled, case.test)
    found = {
        rule: scores(Mirrored(), with_copy, Protocol(lr=0.02, batch_size=6, epochs=1, leave_out=rule))
        for rule in ("mask", "with_duplicates")
    }
    expected = found["mask"] * torch.tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(found["with_duplicates"], expected)


def test_from_a_minimum_mirrored_runs_are_the_relaxed_influence_function() -> None:
    case = linear_minimum()
    protocol = Protocol(lr=0.1, batch_size=len(case.train), epochs=30, dtype="float64")
    found = scores(Mirrored(weight=1e-3), case, protocol, (0,))
    hessian = dense.gauss_newton(case.final_model, case.train)
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train[LEFT_OUT])
    step = torch.eye(len(hessian), dtype=torch.float64) - 0.1 * hessian
    relaxed = torch.zeros_like(hessian)
    for t in range(30):
        relaxed = relaxed + 0.1 * torch.linalg.matrix_power(step, t)
        expected = test @ relaxed @ train.T / len(case.train)
        torch.testing.assert_close(found[t], expected, rtol=1e-5, atol=1e-9)


def linear_minimum() -> Case:
    """A linear regression at the minimum of its mean training loss."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(26, d, dtype=torch.float64, generator=generator) for d in (3, 1))
    network = nn.Linear(3, 1).double()
    solution = torch.linalg.lstsq(torch.cat([x[:20], torch.ones(20, 1)], 1), y[:20]).solution
    with torch.no_grad():
        network.weight.copy_(solution[:3].T)
        network.bias.copy_(solution[3])
    model = FinalModel(nn.Sequential(network), mean_squared_error, accept_poor=True)
    return Case("minimum", model, Instances(x[:20], y[:20]), Instances(x[20:], y[20:]))


@pytest.mark.parametrize("direction", ["both", "up", "down"])
@pytest.mark.parametrize("name", CASES)
def test_a_small_step_of_unlearning_is_grad_dot(name: str, direction: Any) -> None:
    case = CASES[name]()
    method = Unlearning(lr=1e-6, direction=direction)
    found = method.attribute(case.final_model, case.train, case.test, LEFT_OUT)
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train[LEFT_OUT])
    torch.testing.assert_close(found.values, test @ train.T, rtol=1e-3, atol=1e-5)
    assert found.gradient_evaluations == len(case.test) * (2 if direction == "both" else 1)


def test_what_is_unlearned_is_what_is_explained_and_what_is_read_the_training_loss() -> None:
    case = CASES["mlp_classification"]()

    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.gather(1, targets[:, None])[:, 0]

    model = FinalModel(case.final_model.network, case.final_model.loss, margin)
    found = Unlearning(steps=3, lr=0.02).attribute(model, case.train, case.test, LEFT_OUT).values
    expected = torch.zeros_like(found)
    for j in range(len(case.test)):
        for sign in (1, -1):
            network = copy.deepcopy(model.network).requires_grad_(True)
            optimizer = torch.optim.SGD(network.parameters(), 0.02)
            for _ in range(3):
                optimizer.zero_grad()
                (-sign * margin(network(case.test.inputs[[j]]), case.test.targets[[j]]).sum()).backward()
                optimizer.step()
            left_out = case.train[LEFT_OUT]
            with torch.no_grad():
                losses = model.loss(network(left_out.inputs), left_out.targets)  # type: ignore[arg-type]
            expected[j] += sign * losses / (2 * 3 * 0.02)
    torch.testing.assert_close(found, expected)


def test_the_claims_of_every_method_hold() -> None:
    check_method(Unlearning())
    check_method(Mirrored())


def test_what_means_nothing_is_refused() -> None:
    for key, wrong in (("direction", "sideways"), ("weight", 0), ("seeds", 0)):
        with pytest.raises(InputError, match=key):
            Mirrored(**{key: wrong})
    for key, wrong in (("direction", "sideways"), ("lr", 0), ("steps", 0)):
        with pytest.raises(InputError, match=key):
            Unlearning(**{key: wrong})
    case = CASES["mlp_regression"]()
    other = FinalModel(case.final_model.network, case.final_model.loss, lambda f, y: f[:, 0])
    assert "another measurement" in str(Mirrored().inapplicable(other, case.train))
    with pytest.raises(InputError, match="100 steps of 5 diverge"):
        Unlearning(100, 5).attribute(case.final_model, case.train, case.test)


def test_sequences_of_several_lengths_are_refused() -> None:
    parts = [Instances(torch.zeros(2, n), torch.zeros(2)) for n in (3, 4)]
    with pytest.raises(InputError, match=r"differ in shape, \(3,\) and \(4,\): pad them"):
        joined(parts)
