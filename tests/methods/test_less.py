"""LESS against a plain loop over instances, and its moments against all batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.curvature.adam_steps import moments_of
from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.less import Less
from fimo.models.final_model import FinalModel
from fimo.scores import Access
from tests.cases import CASES, Case
from tests.reference import attribution as dense

BETA1, BETA2, EPS = 0.8, 0.95, 1e-6


def all_batches(gradients: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Mean gradient [P] and mean squared batch gradient [P], over every batch of this size."""
    means = torch.stack(
        [gradients[list(b)].mean(0) for b in itertools.combinations(range(len(gradients)), batch)]
    )
    return means.mean(0), means.square().mean(0)


def plain(case: Case, batch: int) -> Tensor:
    """[J, N], one cosine after another."""
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train)
    first, second = all_batches(train, batch)
    found = torch.zeros(len(test), len(train), dtype=torch.float64)
    for i, g in enumerate(train):
        step = (BETA1 * first + (1 - BETA1) * g) / ((BETA2 * second + (1 - BETA2) * g * g).sqrt() + EPS)
        for j, t in enumerate(test):
            found[j, i] = F.cosine_similarity(t, step, dim=0, eps=0)
    return found


def less(**arguments: Any) -> Less:
    return Less(**{"beta1": BETA1, "beta2": BETA2, "eps": EPS, "batch_size": 2, **arguments})


@pytest.mark.parametrize("name", CASES)
def test_without_a_projection_it_is_the_plain_loop(name: str) -> None:
    case = CASES[name]()
    run = (case.final_model, case.train, case.test)
    expected = plain(case, 2)
    torch.testing.assert_close(less().attribute(*run).values, expected)
    small = case.final_model.size * 8 * 3 / 2**20  # three gradients at once
    torch.testing.assert_close(less(memory_mb=small).attribute(*run).values, expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 11, 13])
def test_the_second_moment_is_that_of_all_batches(batch: int) -> None:
    case = CASES["conv_net"]()
    gradients = dense.instance_gradients(case.final_model, case.train)
    moments = moments_of(InstanceGradients(case.final_model).losses(case.train), batch)
    first, second = all_batches(gradients, batch)
    torch.testing.assert_close(moments.first, first)
    torch.testing.assert_close(moments.second, second)
    if batch == len(gradients):
        more = moments_of(InstanceGradients(case.final_model).losses(case.train), 99)
        torch.testing.assert_close(more.second, second)


def test_a_projection_keeps_the_cosines_up_to_its_noise() -> None:
    case = CASES["mlp_classification"]()
    run = (case.final_model, case.train, case.test)
    exact = less().attribute(*run).values
    errors = [(less(dimension=k).attribute(*run).values - exact).square().mean().sqrt() for k in (50, 5000)]
    assert errors[0] < 3 / 50**0.5
    assert errors[1] < 3 / 5000**0.5
    again = less(dimension=50, memory_mb=0.002).attribute(*run).values
    torch.testing.assert_close(again, less(dimension=50).attribute(*run).values)


def test_it_is_adam_s_next_step_that_is_compared() -> None:
    """torch.optim.Adam, with these moments in its state, moves along the very direction."""
    case = CASES["mlp_regression"]()
    train = dense.instance_gradients(case.final_model, case.train)
    first, second = all_batches(train, 2)
    start = dense.flat_parameters(case.final_model)
    steps = []
    for g in train:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([parameter], 1e-3, (BETA1, BETA2), EPS)
        late = torch.tensor(1e6)  # steps after which nothing is left of the bias
        optimizer.state[parameter] = {"step": late, "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
        parameter.grad = g.clone()
        optimizer.step()
        steps.append(start - parameter.detach())
    test = dense.instance_gradients(case.final_model, case.test)
    expected = F.normalize(test) @ F.normalize(torch.stack(steps)).T
    found = less().attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(found, expected)


def test_checkpoints_are_summed_with_their_learning_rates() -> None:
    case = CASES["mlp_regression"]()
    run = (case.final_model, case.train, case.test)
    state = case.final_model.state()
    moved = {name: t + 0.1 for name, t in state.items()}
    other = Case("other", FinalModel(_loaded(case, moved), case.final_model.loss), case.train, case.test)
    method = less(checkpoints=[moved, state], lr=[0.5, 2.0])
    expected = 0.5 * plain(other, 2) + 2.0 * plain(case, 2)
    torch.testing.assert_close(method.attribute(*run).values, expected)
    assert method.access == Access.CHECKPOINTS
    assert less().access == Access.FINAL_MODEL


def _loaded(case: Case, state: dict[str, Tensor]) -> torch.nn.Module:
    network = case.final_model.to().network
    network.load_state_dict(state)
    return network


def test_an_instance_without_a_gradient_still_has_adam_s_momentum_and_a_test_one_has_no_cosine() -> None:
    case = CASES["mlp_regression"]()
    targets = case.test.targets.clone()
    targets[2] = case.final_model.outputs(case.test)[2]
    scores = less().attribute(case.final_model, case.train, Instances(case.test.inputs, targets)).values
    assert (scores[2] == 0).all()
    assert (scores[:2].abs() > 0).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("dimension", 0), ("batch_size", 0), ("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("lr", [1.0, 2.0])],
)
def test_a_bad_setting_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{key}: expected"):
        Less(**{key: value})
