"""What a run's scores are named after is computed once, and again where anything changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fimo.scoring as scoring
from fimo.further_training.identity import describe_problem
from tests.cases import CASES


class Data:
    """The instances of a data module."""

    def __init__(self) -> None:
        case = CASES["mlp_regression"]()
        self.train, self.test = case.train[:], case.test.to(dtype=torch.float64)[torch.arange(5)]


def test_model_and_data_are_hashed_once_for_all_methods_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return describe_problem(*arguments)

    monkeypatch.setattr(scoring, "describe_problem", counted)
    data: Any = Data()
    model = CASES["mlp_regression"]().final_model.to(dtype=torch.float64)
    plan: Any = SimpleNamespace(test=[0, 2])
    first = scoring._described(model, data, plan)
    assert scoring._described(model, data, plan) is first
    assert len(calls) == 1
    assert first == describe_problem(model, data.train, data.test[[0, 2]])

    assert scoring._described(model, data, SimpleNamespace(test=[0, 1]))["test"] != first["test"]  # type: ignore[arg-type]
    scoring._described(model, data, plan)
    data.test.targets[0] += 1  # in place
    assert scoring._described(model, data, plan)["test"] != first["test"]
    with torch.no_grad():
        next(iter(model.network.parameters())).add_(1)
    assert scoring._described(model, data, plan)["state"] != first["state"]
    twin = model.to(dtype=torch.float64)
    before = len(calls)
    scoring._described(twin, data, plan)
    assert len(calls) == before + 1  # another object is described anew
