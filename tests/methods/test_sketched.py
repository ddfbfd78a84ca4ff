"""Impulses against dense gradients, the choice of test instances, and what a budget buys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.further_training import full_runs
from fimo.linear_response.impulses import Impulses, impulses
from fimo.linear_response.recursion import with_parameters
from fimo.methods import sketched
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.best import Best
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.mirrored import Mirrored
from fimo.methods.response import Response
from fimo.methods.sketched import Plan, Sketched, corrected, pivots
from fimo.models.final_model import FinalModel
from tests.cases import CASES
from tests.methods.test_response import following
from tests.reference.attribution import instance_gradients

LEFT_OUT = torch.tensor([0, 4, 9])
ADAM = Protocol(optimizer="adam", lr=0.01, batch_size=5, steps=6, evaluate_every=2, dtype="float64")
SGD = Protocol(lr=0.05, momentum=0.5, batch_size=5, steps=6, evaluate_every=2, dtype="float64")


@pytest.mark.parametrize("protocol", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("memory_mb", [1024, 1e-6])
def test_impulses_are_sums_of_dense_gradients_products(protocol: Protocol, memory_mb: float) -> None:
    case = CASES["conv_net"]()
    given, n = following(case, protocol), len(case.train)
    run = next(iter(full_runs(case.final_model, case.train, protocol, [0])))
    found = impulses(case.final_model, case.train, case.test, case.train[LEFT_OUT], given, run, 4, memory_mb)
    models = [with_parameters(case.final_model, p) for p in run.parameters]
    left = [instance_gradients(m, case.train[LEFT_OUT]) for m in models]
    explained = [instance_gradients(m, case.test) for m in models]
    for e in range(3):
        total = torch.zeros(len(case.test), 3, dtype=torch.float64)
        for k in range(e + 1):
            push = (left[k] + left[k + 1]) / 2 * 2 * protocol.lr / n
            if protocol.optimizer == "adam":
                assert run.second_moment is not None
                moment = torch.cat([v.flatten() for v in run.second_moment[k + 1].values()])
                push = push / (moment.sqrt() + protocol.eps)
            else:
                push = push / (1 - protocol.momentum)
            total += explained[e + 1] @ push.T
        torch.testing.assert_close(found.values[e], total)
        torch.testing.assert_close(found.likeness[e], explained[e + 1] @ explained[e + 1].T)


def test_between_points_impulses_grow_with_time() -> None:
    case, protocol = CASES["mlp_regression"](), Protocol(lr=0.01, batch_size=5, steps=8, evaluate_every=1)
    run = next(iter(full_runs(case.final_model, case.train, protocol, [0])))
    found = impulses(
        case.final_model, case.train, case.test, case.train[LEFT_OUT], following(case, protocol), run, 1, 99
    ).values
    for e in range(8):
        torch.testing.assert_close(found[e], found[7] * (e + 1) / 8)


def test_chosen_vectors_span_the_others() -> None:
    basis = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([basis, 2 * basis[:1], basis[1:2] - 0.1 * basis[2:]])
    chosen = pivots(vectors @ vectors.T, 3)
    assert torch.linalg.matrix_rank(vectors[chosen]) == 3
    assert len(pivots(vectors @ vectors.T, 5).unique()) == 5  # also where nothing is left


def test_what_runs_show_reaches_test_instances_without_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all are combinations of the chosen ones', and the truth is linear in gradients."""
    monkeypatch.setattr(sketched, "RIDGE", 1e-12)
    g = torch.Generator().manual_seed(0)
    basis, mix = (torch.randn(n, 3, dtype=torch.float64, generator=g) for n in (3, 7))
    vectors = torch.stack([mix @ basis, mix @ basis.T])  # [E, J, P]
    first, truth = (torch.randn(2, 3, 4, dtype=torch.float64, generator=g) for _ in range(2))
    likeness = vectors @ vectors.transpose(1, 2)
    chosen = pivots(likeness.mean(0), 3)
    real = vectors @ truth
    found = corrected(Impulses(vectors @ first, likeness, 0), chosen, real[:, chosen])
    torch.testing.assert_close(found, real, rtol=1e-5, atol=1e-5)


def scores(method: Sketched | Mirrored, protocol: Protocol, seeds: tuple[int, ...]) -> Tensor:
    case = CASES["conv_net"]()
    given = following(case, protocol, seeds)
    return method.attribute(case.final_model, case.train, case.test, LEFT_OUT, given).values


def test_a_budget_for_all_test_instances_buys_mirrored_runs_and_then_seeds() -> None:
    case = CASES["conv_net"]()
    problem = AttributionProblem(
        case.final_model, case.train, case.test, LEFT_OUT, following(case, SGD, (0, 1, 2))
    )
    count = len(case.test)
    each = sketched.MIRRORED_RUN * (count + 1) / (3 * 4)  # of a seed, as a share of the gold standard
    assert Sketched(min(1.0, 0.99 * each)).plan(problem).tests < count
    if 1.01 * each <= 1:
        assert Sketched(1.01 * each).plan(problem) == Plan(count, 1)
    assert Sketched(0.0).plan(problem).tests == 0
    many = AttributionProblem(case.final_model, case.train, case.test, None, following(case, SGD, (0, 1, 2)))
    plan = Sketched(1.0).plan(many)
    assert plan.tests == count
    assert plan.seeds == min(3, int(3 * (len(case.train) + 1) / sketched.MIRRORED_RUN / (count + 1)))


def test_with_runs_for_all_scores_are_mirrored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sketched, "plan", lambda self, problem: Plan(len(problem.test), 2))
    found = scores(Sketched(), SGD, (0, 1, 2))
    torch.testing.assert_close(found, scores(Mirrored("up", seeds=2), SGD, (0, 1, 2)))


def test_with_runs_for_some_those_have_mirrored_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sketched, "plan", lambda self, problem: Plan(2, 1))
    case = CASES["conv_net"]()
    given = following(case, SGD, (0, 1))
    found = Sketched().attribute(case.final_model, case.train, case.test, LEFT_OUT, given)
    mirrored = scores(Mirrored("up"), SGD, (0, 1))
    same = (found.values - mirrored).abs().flatten(2).amax((0, 2)) < 1e-9 * mirrored.abs().max()
    assert int(same.sum()) == 2
    assert "2 of" in found.notes[0]
    assert found.gradient_evaluations > 0


def test_another_measurement_has_impulses_alone() -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(case.final_model.network, case.final_model.loss, lambda f, y: f[:, 0].square())
    given = following(case, SGD)
    found = Sketched(1.0).attribute(model, case.train, case.test, LEFT_OUT, given)
    run = next(iter(full_runs(model, case.train, SGD, [0])))
    first = impulses(model, case.train, case.test, case.train[LEFT_OUT], given, run, 4, 1024)
    torch.testing.assert_close(found.values.double(), first.values)


def test_best_takes_it_where_the_response_costs_more_than_its_limit() -> None:
    case = CASES["conv_net"]()
    problem = AttributionProblem(case.final_model, case.train, case.test, LEFT_OUT, following(case, SGD))
    method, reason = Best(limit=0.01).choose(problem)
    assert isinstance(method, Sketched)
    assert method.budget == 0.01
    assert "of the gold standard (limit: 0.01)" in reason
    share = Response().expected_share(problem)
    assert isinstance(Best(limit=1.0).choose(problem)[0], Response if share <= 1 else Sketched)
    assert share > Response(checks=0).expected_share(problem)


def test_best_follows_few_seeds_where_all_would_cost_more_than_its_limit() -> None:
    case = CASES["conv_net"]()
    given = following(case, SGD, range(24))
    every = torch.arange(len(case.train))
    problem = AttributionProblem(case.final_model, case.train, case.test, every, given)
    corrected = CalibratedResponse(budget=0.05, checks=2)
    few, share = corrected.expected_share(problem), Response(checks=2).expected_share(problem)
    assert 0.01 < few < 0.6 * share
    own = CalibratedResponse(budget=0.01, checks=2, removal="own")
    assert own.expected_share(problem) == pytest.approx(
        Response(checks=2, removal="own").expected_share(problem)
    )
    assert CalibratedResponse(budget=0.99).expected_share(problem) >= 0.99

    def chosen(limit: float) -> Response | Sketched:
        return Best(limit=min(limit, 1), budget=0.05, checks=2).choose(problem)[0]

    assert isinstance(chosen(1.01 * few), CalibratedResponse)
    assert isinstance(chosen(0.99 * few), Sketched)
    if share < 1:
        assert type(chosen(1.01 * share)) is Response
    # where the budget buys no real runs, all seeds are followed after all
    assert CalibratedResponse(budget=0.01, checks=2).expected_share(problem) == pytest.approx(share)
    assert isinstance(Best(limit=0.9 * share, budget=0.01, checks=2).choose(problem)[0], Sketched)


def test_wrong_arguments_are_refused_by_name() -> None:
    for key, wrong in (("budget", 1.5), ("segments", 0), ("memory_mb", 0)):
        with pytest.raises(InputError, match=key):
            Sketched(**{key: wrong})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit"):
        Best(limit=0)
