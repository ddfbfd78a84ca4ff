"""Left-out instances are taken evenly from all batches: the same mean over seeds, less of their noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fimo.engine.leave_out import evenly
from fimo.engine.protocol import Protocol
from fimo.further_training import further_train
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.response import Response, ignored_parts
from fimo.models.final_model import FinalModel
from tests.methods.test_response import following, linear_regression, real_changes, scores

SGD = Protocol(lr=0.05, batch_size=4, epochs=3, dtype="float64", leave_out="mask")


@pytest.mark.parametrize("rule", ["mask", "shift", "every_batch"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}])
def test_on_a_linear_model_the_even_response_is_the_real_change_without_a_share_of_every_batch(
    options: dict[str, Any], rule: str
) -> None:
    case, protocol = linear_regression(14), replace(SGD, **options)
    found = scores(case, replace(protocol, leave_out=rule), [0, 5, 12], kernels="own", removal="even")
    even = replace(protocol, leave_out="reweighted" if rule == "shift" else "every_batch")
    expected = real_changes(case, even, [0, 5, 12], [0, 1])
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


def test_where_an_epoch_has_many_batches_instances_are_taken_from_some_in_turn() -> None:
    case = linear_regression(14)
    protocol = replace(SGD, batch_size=1, evaluate_every=21)
    found = scores(case, protocol, list(range(14)), kernels="own", removal="even")
    each = [in_turn(case.final_model, case.train.inputs, case.train.targets, seed) for seed in (0, 1)]
    x, y = case.test.inputs, case.test.targets
    changes = []
    for runs in each:  # [E, 15, parameters], the full run last
        losses = torch.stack([torch.stack([square(run, x, y) for run in point]) for point in runs])
        changes.append((losses[:, :-1] - losses[:, -1:]).transpose(1, 2))
    expected = torch.stack(changes).mean(0)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


def square(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """[J], mean squared errors of a linear network with the bias in the last column."""
    outputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1) @ weights.T
    return (outputs - targets).square().mean(1)


def in_turn(model: FinalModel, inputs: Tensor, targets: Tensor, seed: int) -> list[list[Tensor]]:
    """Parameters after 21 and 42 steps without each of 14 instances, and with all, by a plain loop.

    Of batches of 1 and ceil(14 / 8) = 2 groups of instances, batch t of seed k lacks the (t + k)-th, with
    weight 2 / N.
    """
    parameters = model.parameters()
    start = torch.cat([parameters["0.weight"], parameters["0.bias"][:, None]], 1).detach()
    x = torch.cat([inputs, torch.ones(14, 1, dtype=inputs.dtype)], 1)
    found = []
    for left_out in [*range(14), None]:
        generator = torch.Generator().manual_seed(seed)
        weights, t, points = start.clone(), 0, []
        for _ in range(3):
            for batch in torch.randperm(14, generator=generator).split(1):
                multiplier = torch.zeros(14, dtype=x.dtype)
                multiplier[batch] = 1 / len(batch)
                if left_out is not None and left_out % 2 == (t + seed) % 2:
                    multiplier[left_out] -= 2 / 14
                residual = x @ weights.T - targets
                weights = weights - 0.05 * (residual * multiplier[:, None]).T @ x * 2 / residual.shape[1]
                t += 1
                if t % 21 == 0:
                    points.append(weights)
        found.append(points)
    return [list(point) for point in zip(*found, strict=True)]


@pytest.mark.parametrize("rule", ["mask", "shift"])
def test_the_mean_effect_over_seeds_stays_and_its_noise_falls(rule: str) -> None:
    case, left_out, count = linear_regression(14), [0, 5, 12], 1000
    protocol = replace(SGD, lr=0.002, leave_out=rule, evaluate_every="end")  # type: ignore[arg-type]
    given, even = (
        further_train(case.final_model, case.train, case.test, p, count, left_out).raw[:, 0]
        for p in (protocol, evenly(protocol, 14))
    )
    error = (given.var(0) / count + even.var(0) / count).sqrt()
    assert ((given.mean(0) - even.mean(0)).abs() < 4 * error).all()
    assert error.median() < 0.05 * even.mean(0).abs().median()  # so that this says something
    assert even.std(0).median() < 0.5 * given.std(0).median()


def test_protocols_that_have_no_even_counterpart_stay_as_they_are() -> None:
    assert evenly(SGD, 14).leave_out == "every_batch"
    assert evenly(replace(SGD, leave_out="shift"), 14).leave_out == "reweighted"
    for options in ({"leave_out": "with_duplicates"}, {"leave_out": "every_batch"}, {"clip_norm": 1.0}):
        protocol = replace(SGD, **options)  # type: ignore[arg-type]
        assert evenly(protocol, 14) is protocol
    shorter = replace(SGD, leave_out="shift")  # of 13 instances one is left for the last batch of 4
    assert evenly(shorter, 13) is shorter
    assert evenly(replace(shorter, leave_out="mask"), 13).leave_out == "every_batch"


def test_real_runs_of_adam_leave_an_instance_out_where_it_occurs() -> None:
    case = linear_regression(14)
    adam = replace(SGD, optimizer="adam", lr=1e-3)
    rules = {}
    for rule in ("shift", "mask", "every_batch", "with_duplicates"):
        for name, given in (("sgd", SGD), ("adam", adam)):
            ft = following(case, replace(given, leave_out=rule))
            problem = AttributionProblem(case.final_model, case.train, case.test, further_training=ft)
            rules[name, rule] = Response().of_real_runs(problem).followed.protocol.leave_out
    assert rules["sgd", "shift"] == "reweighted"
    assert (
        rules["sgd", "mask"] == rules["sgd", "every_batch"] == rules["adam", "every_batch"] == "every_batch"
    )
    assert rules["adam", "shift"] == rules["adam", "mask"] == "mask"
    assert rules["sgd", "with_duplicates"] == rules["adam", "with_duplicates"] == "with_duplicates"


class DropsOut(nn.Sequential):
    """Drops out without a module that says so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("by_module", [True, False])
def test_dropout_keeps_the_protocols_rule_since_another_instance_would_draw_other_masks(
    by_module: bool,
) -> None:
    case = linear_regression(14)
    layers = tuple(case.final_model.network)
    network = nn.Sequential(nn.Dropout(0.5), *layers) if by_module else DropsOut(*layers)
    problem = AttributionProblem(
        FinalModel(network, case.final_model.loss),
        case.train,
        case.test,
        further_training=following(case, SGD),
    )
    assert Response().removing(problem) is problem
    assert ignored_parts(problem, SGD) == ["dropout during further training"]
    plain = replace(problem, final_model=case.final_model)
    assert Response().removing(plain).followed.protocol.leave_out == "every_batch"
    assert Response(removal="own").removing(plain) is plain
    assert ignored_parts(plain, SGD) == []
