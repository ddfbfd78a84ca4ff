"""What is published for people who write methods: every method of ours passes, every broken one is caught."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fimo
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.catalogue import OTHERS
from fimo.methods.embedding import EmbeddingSimilarity
from fimo.methods.graddot import GradDot
from fimo.testing import CASES, check_method, claims

CONF = Path(__file__).parents[1] / "conf" / "method"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if OTHERS not in path.read_text())
RANDOM = ["columns", "training_order", "test_order", "twins", "dtype", "sign"]
SKIPPED = {"random": RANDOM, "embedding": ["sign"], "arnoldi": ["dtype"], "sketched": ["columns"]}
"""Claims that baselines don't make: a random score is drawn for each place anew.
Arnoldi's, which are not damped, divide by eigenvalues that float32 does not resolve. The sketch's budget is a
share of the gold standard, which costs more the more instances are left out."""


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_ours_passes(name: str) -> None:
    found = check_method(name, skip=SKIPPED.get(name, []), cases=["mlp_regression", "mlp_classification"])
    assert found.passed
    assert len(found.table) >= 7


class Sums(GradDot):
    """One number for all test instances."""

    def scores(self, problem: AttributionProblem) -> Tensor:
        return super().scores(problem).values.sum(0, keepdim=True)


class Negative(GradDot):
    def scores(self, problem: AttributionProblem) -> Tensor:
        return -super().scores(problem).values


class Remembers(GradDot):
    calls = 0

    def scores(self, problem: AttributionProblem) -> Tensor:
        self.calls += 1
        return super().scores(problem).values * self.calls


class Mixes(GradDot):
    def scores(self, problem: AttributionProblem) -> Tensor:
        values = super().scores(problem).values
        return values * torch.linspace(1, 2, len(values), dtype=values.dtype)[:, None]


class Positions(GradDot):
    def scores(self, problem: AttributionProblem) -> Tensor:
        values = super().scores(problem).values
        return values * torch.linspace(1, 2, values.shape[1], dtype=values.dtype)


class Moves(GradDot):
    def scores(self, problem: AttributionProblem) -> Tensor:
        for tensor in problem.final_model.parameters().values():
            tensor.mul_(1.0001)
        return super().scores(problem).values


class Doubles(GradDot):
    def scores(self, problem: AttributionProblem) -> Tensor:
        return super().scores(problem).values.double()


class Fails(GradDot):
    def scores(self, problem: AttributionProblem) -> Tensor:
        raise KeyError("layer")


@pytest.mark.parametrize(
    ("broken", "claim"),
    [
        (Sums, "runs"), (Negative, "sign"), (Remembers, "repeat"), (Mixes, "test_order"),
        (Positions, "columns"), (Positions, "training_order"), (Positions, "twins"), (Moves, "unchanged"),
        (Doubles, "dtype"), (Fails, "runs"),
    ],
)  # fmt: skip
def test_a_broken_method_is_caught(broken: type[GradDot], claim: str) -> None:
    before = {k: v.clone() for k, v in CASES["mlp_regression"]().final_model.parameters().items()}
    with pytest.raises(AssertionError, match=rf"(?m)^{claim} \(mlp_regression\): "):
        check_method(broken(), cases=["mlp_regression"])
    for name, tensor in CASES["mlp_regression"]().final_model.parameters().items():
        tensor.copy_(before[name])


def test_claims_can_be_skipped_and_failures_be_looked_at() -> None:
    found = check_method(Negative(), cases=["mlp_regression"], strict=False)
    assert [line.partition(" ")[0] for line in found.failures] == ["sign"]
    assert check_method(Negative(), cases=["mlp_regression"], skip=["sign"]).passed
    with pytest.raises(fimo.InputError, match=r"skip: there is no 'signs'"):
        check_method(GradDot(), skip=["signs"])
    with pytest.raises(fimo.InputError, match=r"cases: there is no 'mlp'"):
        check_method(GradDot(), cases=["mlp"])
    with pytest.raises(fimo.InputError, match="applies to none of the cases"):
        check_method(EmbeddingSimilarity(layer="none"), cases=["mlp_regression"])


def test_the_example_runs() -> None:
    assert doctest.testmod(claims).failed == 0
