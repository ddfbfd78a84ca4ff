"""A run's scores: what they are named after is computed once for all methods."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fimo import fingerprint
from fimo.cost import Cost, measured
from fimo.data.instances import Instances
from fimo.further_training import Protocol
from fimo.methods.following import FollowingMethod
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response
from fimo.plan import Plan
from fimo.scoring import described, score
from fimo.store import Store
from tests.cases import CASES


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
    config = OmegaConf.create({"seed": 0, "methods": {"graddot": {"a": 1}, "response": {"b": 1}}})
    problem = described(case.final_model, data)
    methods = {"graddot": GradDot(), "response": Response()}
    for name, method in methods.items():
        cost = Cost(name)
        found = score(name, method, case.final_model, data, plan, config, Store(tmp_path), cost, problem)
        assert torch.isfinite(found["scores"]).all()
        assert cost.reused == 0
    assert hashed.count("network") == 1
    assert hashed.count("data") == 1 + len(methods)  # the training set; the test instances of each
    for name, method in methods.items():
        cost = Cost(name)
        score(name, method, case.final_model, data, plan, config, Store(tmp_path), cost, problem)
        assert cost.reused == 1


class Twice(FollowingMethod):
    """Asks for the full runs twice."""

    def scores(self, test: Instances, left_out: Instances) -> Tensor:
        assert [t.seed for t in self.ft.full_runs()] == [t.seed for t in self.ft.full_runs()]
        return torch.zeros(len(self.ft.steps), len(test), len(left_out))


class Once(Twice):
    """The same but for its name."""


def test_a_method_pays_for_full_runs_that_another_made_once_and_keeps_that_in_the_store(
    tmp_path: Path,
) -> None:
    case = CASES["mlp_regression"]()
    data: Any = SimpleNamespace(train=case.train, test=case.test)
    plan = Plan(Protocol(epochs=3), [0], [1, 2], [1, 2], [0, 2], True, "auto")
    config = OmegaConf.create({"seed": 0, "methods": {"first": {}, "second": {}}})
    problem = described(case.final_model, data)

    def cost(name: str, method: FollowingMethod) -> Cost:
        with measured(name) as found:
            score(name, method, case.final_model, data, plan, config, Store(tmp_path), found, problem)
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
