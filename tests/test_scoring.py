"""A run's scores: what they are named after is computed once for all methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.app.plan import Plan
from fimo.app.scoring import Scoring
from fimo.cost import Cost, measured
from fimo.further_training import Protocol
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.datainf import DataInf
from fimo.methods.ekfac import Ekfac
from fimo.methods.following import FollowingMethod
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response
from fimo.scores import Scores
from fimo.store import fingerprint
from fimo.store.files import Store
from tests.cases import CASES

CPU = torch.device("cpu")


def test_model_and_training_set_are_hashed_once_for_all_methods_of_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed: list[str] = []
    describe = fingerprint.describe

    def counted(value: Any, name: str) -> str:
        hashed.append(name)
        return describe(value, name)

    monkeypatch.setattr(fingerprint, "describe", counted)
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    plan = Plan(Protocol(epochs=1), [0], [0], [1, 2], [0, 2], True, "auto")
    settings: dict[str, dict[str, int]] = {"graddot": {"a": 1}, "response": {"b": 1}}
    scoring = Scoring.of(case.final_model, data, plan, 0, Store(tmp_path), CPU)
    methods = {"graddot": GradDot(), "response": Response()}
    for name, method in methods.items():
        cost = Cost(name)
        found = scoring.scores(name, method, settings[name], cost)
        assert torch.isfinite(found.values).all()
        assert found.method == name
        assert found.test is not None
        assert found.test.tolist() == [0, 2]
        assert cost.reused == 0
    assert hashed.count("network") == 1
    assert hashed.count("data") == 1 + len(methods)  # the training set; the test instances of each
    for name, method in methods.items():
        cost = Cost(name)
        scoring.scores(name, method, settings[name], cost)
        assert cost.reused == 1
    chosen = replace(plan, left_out=[2, 1])
    for other in (replace(scoring, seed=1), replace(scoring, plan=chosen)):
        for name, method in methods.items():
            cost = Cost(name)
            other.scores(name, method, settings[name], cost)
            assert cost.reused == 0, "with another seed of methods, or left-out instances"
    cost = Cost("graddot")
    scoring.scores("graddot", GradDot(), {"a": 2}, cost)
    assert cost.reused == 0, "with other settings"
    path = replace(scoring, plan=replace(plan, followed=[1]))
    for name, reused in (("graddot", 1), ("response", 0)):  # which alone follows it
        cost = Cost(name)
        path.scores(name, methods[name], settings[name], cost)
        assert cost.reused == reused


class Twice(FollowingMethod):
    """Asks for the full runs twice."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        runs = problem.followed.full_runs
        assert [t.seed for t in runs()] == [t.seed for t in runs()]
        return torch.zeros(len(problem.followed.steps), len(problem.test), len(problem.index))


class Once(Twice):
    """The same but for its name."""


def test_a_method_pays_for_full_runs_that_another_made_once_and_keeps_that_in_the_store(
    tmp_path: Path,
) -> None:
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    plan = Plan(Protocol(epochs=3), [0], [1, 2], [1, 2], [0, 2], True, "auto")
    scoring = Scoring.of(case.final_model, data, plan, 0, Store(tmp_path), CPU)

    def cost(name: str, method: FollowingMethod) -> Cost:
        with measured(name) as found:
            scoring.scores(name, method, {}, found)
        return found

    first = cost("first", Twice())
    kept = sum(json.loads(p.read_text())["seconds"] for p in tmp_path.glob("trajectory/*/cost.json"))
    assert 0 < kept <= first.seconds
    assert first.reused == 0, "what it made itself is not paid twice"
    second = cost("second", Once())
    assert second.reused_seconds == pytest.approx(kept)
    assert second.seconds > kept
    assert 0 < second.reused < 1
    again = cost("second", Once())
    assert again.reused == 1
    assert kept < again.seconds <= second.seconds


def test_a_method_pays_for_gradients_that_another_took_and_costs_what_it_does_alone(tmp_path: Path) -> None:
    case = CASES["conv_net"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    every = list(range(len(case.train)))
    plan = Plan(Protocol(epochs=1), [0], [0], every, [0, 2], True, "auto")
    methods: dict[str, AttributionMethod] = {"graddot": GradDot(), "datainf": DataInf(), "ekfac": Ekfac()}

    def costs(names: list[str], shared: bool) -> tuple[dict[str, Cost], dict[str, Scores]]:
        place = Store(tmp_path / f"{names[0]}-{shared}")
        scoring = Scoring.of(case.final_model, data, plan, 0, place, CPU)
        found: dict[str, Cost] = {}
        scores: dict[str, Scores] = {}
        with scoring.sharing(names if shared else names[:1]):
            for name in names:
                with measured(name) as found[name]:
                    scores[name] = scoring.scores(name, methods[name], {}, found[name])
        return found, scores

    alone, expected = costs(list(methods), False)
    assert all(cost.reused_seconds == 0 for cost in alone.values())
    for names in (list(methods), list(reversed(methods))):
        found, scores = costs(names, True)
        for k, name in enumerate(names):
            assert torch.equal(scores[name].values, expected[name].values)
            assert found[name].gradient_evaluations == alone[name].gradient_evaluations
            assert found[name].seconds > found[name].reused_seconds
            assert (found[name].reused_seconds > 0) == (k > 0), "the first finds nothing"
        kept = json.loads(next(iter((tmp_path / f"{names[0]}-True").glob("scores/*/cost.json"))).read_text())
        assert kept["gradient_evaluations"] == alone[kept["stage"]].gradient_evaluations


class Unsure(FollowingMethod):
    """Scores i + 1 with a standard error of 2 (i + 1) for instance i, drawn apart for each instance."""

    def scores(self, problem: AttributionProblem) -> Scores:
        size = (1.0 + problem.index).expand(len(problem.followed.steps), len(problem.test), -1)
        return self.result(problem, size, sem=2 * size, sem_adjusted=2 * size)


def test_a_group_scores_the_sum_of_its_members_with_the_root_of_the_sum_of_their_squared_errors(
    tmp_path: Path,
) -> None:
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    plan = Plan(Protocol(epochs=1), [0], [0], [[3, 1], 7, [0, 1, 2]], [0, 2], True, "auto")
    for reused in (0, 1):  # computed, then from the store
        cost = Cost("unsure")
        found = Scoring.of(case.final_model, data, plan, 0, Store(tmp_path), CPU).scores(
            "unsure", Unsure(), {}, cost
        )
        assert cost.reused == reused
        torch.testing.assert_close(found.values, torch.tensor([[[4.0 + 2, 8, 1 + 2 + 3]] * 2]))
        sem = [2 * (4.0**2 + 2**2) ** 0.5, 2 * 8, 2 * (1 + 2**2 + 3**2) ** 0.5]
        torch.testing.assert_close(found.sem, torch.tensor([[sem] * 2]))


class Steps(FollowingMethod):
    """Scores by optimizer steps and the learning rate, which it reads from what it follows."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        step = problem.followed.protocol.lr * torch.tensor(problem.followed.steps).float()
        return step[:, None, None].expand(-1, len(problem.test), len(problem.index))


@pytest.mark.parametrize(
    "changed", [{"lr": 0.5}, {"epochs": 3}, {"evaluate_every": 1}], ids=["rule", "horizon", "points"]
)
def test_scores_of_another_followed_protocol_or_of_other_evaluation_points_are_not_read_back(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    n = len(case.train)
    size = 8
    first = {"lr": 0.25, "epochs": 2, "batch_size": size}
    for settings in (first, {**first, **changed}):
        protocol = Protocol(leave_out="mask", **settings)  # type: ignore[arg-type]
        plan = Plan(protocol, [0], [1], [1, 2], [0, 2], True, "auto")
        cost = Cost("steps")
        scoring = Scoring.of(case.final_model, data, plan, 0, Store(tmp_path), CPU)
        found = scoring.scores("steps", Steps(), {}, cost)
        assert cost.reused == 0
        last = settings["epochs"] * -(-n // size)
        every = settings.get("evaluate_every", -(-n // size))
        expected = settings["lr"] * torch.arange(every, last + 1, every)
        torch.testing.assert_close(found.values[:, 0, 0], expected)
