"""A run's scores: what they are named after is computed once for all methods."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fimo import fingerprint
from fimo.cost import Cost
from fimo.further_training import Protocol
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
