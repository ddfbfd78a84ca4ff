"""Shapley values of nearest neighbours, against the mean over all coalitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.knn_shapley import KnnShapley
from fimo.models.final_model import FinalModel
from fimo.models.losses import binary_cross_entropy, cross_entropy, language_modelling, mean_squared_error
from fimo.models.quantities import measuring
from tests.cases import CASES

N = 7


def brute_force(order: list[int], utility: Callable[[list[int]], float]) -> Tensor:
    """[N], by the definition: over all coalitions S without i, |S|! (N - 1 - |S|)! / N! (U(S + i) - U(S)).

    Args:
        order: all instances, from the nearest to the farthest.
        utility: of a coalition, given in that order.
    """
    n = len(order)
    found = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        others = [k for k in order if k != i]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for chosen in itertools.combinations(others, size):
                joined = [k for k in order if k == i or k in chosen]
                found[i] += weight * (utility(joined) - utility(list(chosen)))
    return found


def network(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def inputs(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nearest(model: nn.Sequential, test: Tensor, train: Tensor) -> list[list[int]]:
    with torch.no_grad():
        ours, theirs = model[:2](test), model[:2](train)
    return [sorted(range(len(train)), key=lambda i: float((h - theirs[i]).norm())) for h in ours]


@pytest.mark.parametrize("neighbours", [1, 2, 3, 9])
def test_of_classes_it_is_the_mean_over_all_coalitions(neighbours: int) -> None:
    model, x, z = network(3), inputs(N, 1), inputs(3, 2)
    y, wanted = torch.tensor([0, 1, 1, 2, 0, 1, 2]), torch.tensor([1, 0, 2])
    found = KnnShapley(neighbours).attribute(
        FinalModel(model, cross_entropy, accept_poor=True), Instances(x, y), Instances(z, wanted)
    )
    for j, order in enumerate(nearest(model, z, x)):

        def right(members: list[int], j: int = j) -> float:
            return sum(float(y[i] == wanted[j]) for i in members[:neighbours]) / neighbours

        expected = brute_force(order, right)
        torch.testing.assert_close(found.values[j], expected)
        # what the whole training set achieves is shared out
        assert found.values[j].sum().item() == pytest.approx(right(order))


@pytest.mark.parametrize("neighbours", [1, 2, 3, 9])
@pytest.mark.parametrize("outputs", [1, 2])
def test_of_values_it_is_the_mean_over_all_coalitions(neighbours: int, outputs: int) -> None:
    model, x, z = network(outputs), inputs(N, 3), inputs(3, 4)
    y, wanted = inputs(N, 5)[:, :outputs] + 4, inputs(3, 6)[:, :outputs] + 4
    found = KnnShapley(neighbours).attribute(
        FinalModel(model, mean_squared_error, accept_poor=True), Instances(x, y), Instances(z, wanted)
    )
    mean = y.mean(0)
    for j, order in enumerate(nearest(model, z, x)):

        def closeness(members: list[int], j: int = j) -> float:
            # a neighbour that is lacking counts as the training targets' mean
            close = [y[i] for i in members[:neighbours]]
            close += [mean] * (neighbours - len(close))
            return -float((torch.stack(close).mean(0) - wanted[j]).square().sum())

        expected = brute_force(order, closeness)
        torch.testing.assert_close(found.values[j], expected)
        assert found.values[j].sum().item() == pytest.approx(closeness(order) - closeness([]))


def test_several_labels_count_as_far_as_they_agree() -> None:
    model, x, z = network(2), inputs(N, 7), inputs(2, 8)
    y = (inputs(N, 9)[:, :2] > 0).double()
    wanted = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = KnnShapley(2).attribute(
        FinalModel(model, binary_cross_entropy, accept_poor=True), Instances(x, y), Instances(z, wanted)
    )
    for j, order in enumerate(nearest(model, z, x)):

        def right(members: list[int], j: int = j) -> float:
            return sum(float((y[i] == wanted[j]).double().mean()) for i in members[:2]) / 2

        torch.testing.assert_close(found.values[j], brute_force(order, right))


def test_many_test_instances_are_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlp_regression", "mlp_classification"):
        case = CASES[name]()
        whole = KnnShapley().attribute(case.final_model, case.train, case.test).values
        with monkeypatch.context() as patched:
            patched.setattr("fimo.methods.knn_shapley.MEMORY", 2 * len(case.train))
            blocks = KnnShapley().attribute(case.final_model, case.train, case.test).values
        torch.testing.assert_close(blocks, whole, rtol=0, atol=0)


def test_instances_at_one_place_with_other_labels_have_scores_without_an_order() -> None:
    model, z, wanted = network(3), inputs(2, 2), torch.tensor([1, 0])
    x = inputs(4, 1)[[0, 1, 1, 2, 2, 2, 3]]
    y = torch.tensor([0, 1, 0, 2, 0, 1, 2])
    final_model = FinalModel(model, cross_entropy, accept_poor=True)
    found = KnnShapley(2).attribute(final_model, Instances(x, y), Instances(z, wanted)).values
    order = torch.tensor([6, 2, 4, 5, 1, 3, 0])
    other = KnnShapley(2).attribute(final_model, Instances(x[order], y[order]), Instances(z, wanted)).values
    torch.testing.assert_close(other, found[:, order])


def test_where_there_is_no_single_target_or_representation_it_does_not_apply() -> None:
    case = CASES["mlp_classification"]()
    method = KnnShapley()
    assert method.inapplicable(case.final_model, case.train) is None
    model = FinalModel(nn.Linear(4, 3).double(), cross_entropy, accept_poor=True)
    assert "hidden" in (method.inapplicable(model, case.train) or "")
    measured, _ = measuring(case.final_model, [(case.test, 0)])
    assert "no other quantity" in (method.inapplicable(measured, case.train) or "")
    tokens = FinalModel(
        nn.Sequential(nn.Embedding(5, 3), nn.ReLU(), nn.Linear(3, 5)), language_modelling, accept_poor=True
    )
    ids = torch.randint(5, (4, 6))
    assert "many targets" in (method.inapplicable(tokens, Instances(ids, ids)) or "")
    with pytest.raises(InputError, match="neighbours: expected at least 1 but got 0"):
        KnnShapley(0)
