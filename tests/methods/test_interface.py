"""What a method is given and returns: one problem, one value, and nothing is left on the method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.catalogue import all_methods, own_methods
from fimo.methods.ekfac import Ekfac
from fimo.methods.graddot import GradDot
from fimo.scores import Access, Scores
from tests.cases import CASES
from tests.methods.test_response import following

CONF = Path(__file__).parents[2] / "conf" / "method"
CASE = CASES["mlp_regression"]()
PROTOCOL = Protocol(lr=0.02, batch_size=11, epochs=2, dtype="float64")
LEFT_OUT = [0, 4, 9, 11]


def plain(value: Any) -> Any:
    """Return an object's attributes as values that can be compared."""
    return {k: plain(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("name", own_methods(all_methods(CONF.glob("*.yaml"))))
def test_a_method_is_left_as_it_was_and_gives_the_same_again(name: str) -> None:
    method: AttributionMethod = instantiate(OmegaConf.load(CONF / f"{name}.yaml")[name])
    before = copy.deepcopy(plain(method))
    given = following(CASE, PROTOCOL)
    run = (CASE.final_model, CASE.train, CASE.test, LEFT_OUT, given)
    first, again = method.attribute(*run), method.attribute(*run)
    assert plain(method) == before
    assert torch.equal(first.values, again.values)
    assert first.gradient_evaluations == again.gradient_evaluations
    assert first.left_out.tolist() == LEFT_OUT
    assert first.access == method.access
    assert first.predicts_loss_change == method.predicts_loss_change
    assert first.followed == (given.seeds if method.follows_seeds else ())
    if method.follows_further_training:
        assert first.values.ndim == 3
        assert first.step is not None
        assert first.step.tolist() == list(given.steps)
        assert first.epoch is not None
        assert first.epoch.tolist() == [1, 2]
    else:
        assert first.values.ndim == 2


def test_a_method_may_return_values_alone() -> None:
    class Own(AttributionMethod):
        access = Access.CHECKPOINTS
        predicts_loss_change = True

        def scores(self, problem: AttributionProblem) -> Tensor:
            return problem.test.targets @ problem.removed.targets.T

    found = Own().attribute(CASE.final_model, CASE.train, CASE.test, LEFT_OUT)
    assert isinstance(found, Scores)
    assert torch.equal(found.values, CASE.test.targets @ CASE.train.targets[LEFT_OUT].T)
    assert (found.method, found.access, found.predicts_loss_change) == ("Own", "CPA", True)


@pytest.mark.parametrize(
    "as_given",
    [
        lambda values: values.numpy(),
        lambda values: values.tolist(),
        lambda values: values.clone().requires_grad_() * 1,
        lambda values: values.round().long(),
        lambda values: values > 0,
    ],
)
def test_scores_may_be_an_array_lists_whole_numbers_or_have_a_graph(as_given: Any) -> None:
    class Own(AttributionMethod):
        def scores(self, problem: AttributionProblem) -> Any:
            return as_given(problem.test.inputs @ problem.removed.inputs.T)

    found = Own().attribute(CASE.final_model, CASE.train, CASE.test, LEFT_OUT).values
    expected = CASE.test.inputs @ CASE.train.inputs[LEFT_OUT].T
    assert found.is_floating_point()
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), torch.as_tensor(as_given(expected)).detach().double())


@pytest.mark.parametrize(
    "given", [None, "text", [[1.0], [2.0, 3.0]], torch.ones(2, 2, dtype=torch.complex64)]
)
def test_what_is_no_numbers_is_refused_as_scores(given: Any) -> None:
    class Own(AttributionMethod):
        def scores(self, problem: AttributionProblem) -> Any:
            return given

    with pytest.raises(InputError, match=r"^Own: expected (a tensor of|real) scores but got "):
        Own().attribute(CASE.final_model, CASE.train, CASE.test, LEFT_OUT)


def test_scores_of_another_shape_are_refused() -> None:
    class Transposed(AttributionMethod):
        def scores(self, problem: AttributionProblem) -> Tensor:
            return problem.removed.targets @ problem.test.targets.T

    with pytest.raises(InputError, match=r"^Transposed: expected scores of shape \[5, 4\]"):
        Transposed().attribute(CASE.final_model, CASE.train, CASE.test, LEFT_OUT)


def test_a_method_written_for_earlier_versions_is_refused_where_it_is_defined() -> None:
    with pytest.raises(InputError, match=r"^Old: scores\(self, test, left_out\) is given one problem"):

        class Old(AttributionMethod):
            def scores(self, test: Any, left_out: Any) -> Tensor:  # type: ignore[override]
                return test.targets @ left_out.targets.T

    with pytest.raises(InputError, match=r"^Renamed: estimates_loss_change is called predicts_loss_change"):

        class Renamed(GradDot):
            estimates_loss_change = True


def test_a_fitted_curvature_serves_other_test_instances() -> None:
    method = Ekfac(damping=0.1)
    curvature = method.fit(CASE.final_model, CASE.train)
    for part in (slice(0, 2), slice(2, 5)):
        problem = AttributionProblem(CASE.final_model, CASE.train, CASE.test[part])
        expected = method.attribute(CASE.final_model, CASE.train, CASE.test[part])
        torch.testing.assert_close(method.scores_by(curvature, problem).values, expected.values)
