"""SOURCE against dense matrix exponentials, segment by segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.linear_response.path_points import mean_of
from fimo.linear_response.recursion import with_parameters
from fimo.methods.source import Source
from tests.cases import CASES, LINEAR_CASES
from tests.methods.test_response import following
from tests.reference import attribution as dense


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", LINEAR_CASES)
def test_scores_are_the_published_product_of_exponentials(name: str, optimizer: Any) -> None:
    case = CASES[name]()
    protocol = Protocol(optimizer=optimizer, lr=0.02, batch_size=6, epochs=4, dtype="float64")
    ft = following(case, protocol)
    left_out = torch.tensor([0, 4, 9])
    found = Source(segments=2).attribute(case.final_model, case.train, case.test, left_out, ft).values
    runs = list(ft.full_runs())

    def model_at(points: list[int]) -> Any:
        return with_parameters(case.final_model, mean_of([r.parameters[k] for r in runs for k in points]))

    def scale_at(points: list[int]) -> Tensor:
        if optimizer == "sgd":
            return torch.ones(case.final_model.size, dtype=torch.float64)
        moments = mean_of(
            [mean_of([r.second_moment[k] for k in points if k]) for r in runs if r.second_moment]
        )
        return 1 / (torch.cat([m.flatten() for m in moments.values()]).sqrt() + protocol.eps)

    # at the last evaluation point: 16 steps of 0.02, cut after evaluation point 2 of 4
    vector = dense.instance_gradients(model_at([4]), case.test)
    expected = torch.zeros(len(case.test), 3, dtype=torch.float64)
    for points in ([2, 3, 4], [0, 1, 2]):
        p, tau = scale_at(points), 8 * 0.02
        matrix = p[:, None] * dense.gauss_newton(model_at(points), case.train)
        size = len(matrix)
        block = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        block[:size, :size], block[:size, size:] = -matrix * tau, torch.eye(size).double() * tau
        exponential = torch.linalg.matrix_exp(block)
        force = dense.instance_gradients(model_at(points), case.train[left_out])
        expected += vector @ exponential[:size, size:] @ (p * force).T / len(case.train)
        vector = vector @ exponential[:size, :size]
    tolerance: dict[str, float] = (
        {"rtol": 1e-5, "atol": 1e-9} if optimizer == "sgd" else {"rtol": 1e-4, "atol": 1e-6}
    )
    torch.testing.assert_close(found[-1], expected, **tolerance)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9])
def test_with_fewer_points_the_first_and_last_are_right_and_others_take_the_nearest_s_scores(
    most: int,
) -> None:
    case = CASES["mlp_regression"]()
    ft = following(case, Protocol(lr=0.02, batch_size=12, epochs=9, dtype="float64"))
    arguments = (case.final_model, case.train, case.test, torch.tensor([0, 4, 9]), ft)
    found, each = (
        Source(points=most).attribute(*arguments).values,
        Source(points=9).attribute(*arguments).values,
    )
    # epochs 1 ... 9 by which of them is computed, and is nearest in the logarithm
    nearest = {
        1: [9] * 9,
        2: [1, 1, 9, 9, 9, 9, 9, 9, 9],  # between 1 and 9 lies 3, which is as near to both
        3: [1, 3, 3, 3, 3, 9, 9, 9, 9],
        5: [1, 2, 3, 5, 5, 5, 9, 9, 9],
        9: list(range(1, 10)),
    }[most]
    for e, near in enumerate(nearest):
        if (most, e) != (2, 2):
            torch.testing.assert_close(found[e], each[near - 1])


def test_removing_a_duplicate_of_a_test_instance_gives_a_positive_score() -> None:
    case = CASES["mlp_regression"]()
    test: Instances = case.train[:4]
    ft = following(case, Protocol(lr=0.02, batch_size=6, epochs=3, dtype="float64"))
    found = Source().attribute(case.final_model, case.train, test, torch.arange(4), ft).values
    assert (found.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("wrong", [{"segments": 0}, {"points": 0}, {"memory_mb": 0}])
def test_a_wrong_argument_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Source(**wrong)


def test_the_cost_counts_the_full_runs_and_each_instance_s_gradients_at_each_place_once() -> None:
    case = CASES["mlp_regression"]()  # one output
    size, epochs = 6, 4
    ft = following(case, Protocol(lr=0.02, batch_size=size, epochs=epochs, dtype="float64"))
    method, left_out = Source(segments=2, points=1), torch.tensor([0, 4, 9])
    found = method.attribute(case.final_model, case.train, case.test, left_out, ft)
    n = len(case.train)
    runs = 2 * epochs * n  # two seeds
    assert found.gradient_evaluations == runs + len(case.test) + 2 * (n + len(left_out))
