"""The calibrated response: where it must equal the response, and that it uses real runs elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.evaluation import agreement
from fimo.further_training import full_runs, further_train
from fimo.further_training.gold_standard import evaluation_points
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.linearity import Checked
from fimo.linear_response.real_runs import run_without
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.best import Best
from fimo.methods.calibrated import CalibratedResponse, Pilot
from fimo.methods.following import Tally
from fimo.methods.response import Response
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from tests.cases import CASES
from tests.methods.test_response import following, linear_regression, real_changes


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
def test_on_a_linear_model_real_runs_confirm_the_response(rule: Any) -> None:
    case = linear_regression()
    protocol = Protocol(
        lr=0.05, batch_size=11, epochs=2, leave_out=rule, dtype="float64", evaluate_every=1, momentum=0.5
    )
    run = (case.final_model, case.train, case.test, torch.arange(0, 22, 2), following(case, protocol))
    method = CalibratedResponse(budget=1, kernels="own")
    scores = method.attribute(*run).values
    torch.testing.assert_close(scores, Response(kernels="own").attribute(*run).values, rtol=1e-6, atol=1e-9)
    found = method.calibrated(AttributionProblem(*run), Tally())
    assert found is not None
    torch.testing.assert_close(found.correction.correlation, torch.ones(len(scores)).double())
    torch.testing.assert_close(found.correction.scale, torch.ones(len(scores)).double())
    assert found.trusted == len(scores)


def beyond_linear(budget: float) -> tuple[CalibratedResponse, Any, Tensor]:
    """A method, what it is given, and the real changes, which a linear response misses in part."""
    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.1, batch_size=11, epochs=60, leave_out="mask", dtype="float64")
    left_out, seeds = list(range(0, 22, 2)), list(range(4))
    run = (case.final_model, case.train, case.test, torch.tensor(left_out), following(case, protocol, seeds))
    return CalibratedResponse(budget=budget), run, real_changes(case, protocol, left_out, seeds)


def test_real_runs_help_where_the_response_is_off() -> None:
    method, run, truth = beyond_linear(budget=0.7)
    plain = agreement(Response().attribute(*run).values, truth, "pearson").mean(1)
    scores = method.attribute(*run)
    found = agreement(scores.values, truth, "pearson").mean(1)
    assert 1 - found[30:].mean() < 0.8 * (1 - plain[30:].mean())
    assert scores.sem_adjusted is not None
    known = scores.sem_adjusted.isfinite()
    assert (scores.sem_adjusted[known] > 0).all()
    assert known.double().mean() > 0.5


def test_a_response_that_real_runs_contradict_is_not_followed_further() -> None:
    method, run, _ = beyond_linear(budget=0.7)
    method.trust = 1.0
    found = method.calibrated(AttributionProblem(*run), Tally())
    assert found is not None
    assert found.trusted < len(found.values)
    assert found.values.isfinite().all()
    assert f"followed to step {run[-1].steps[found.trusted - 1]} of" in method.attribute(*run).notes[0]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_noise_of_when_instances_occur_is_not_held_against_the_response(optimizer: Any) -> None:
    """With Adam real runs leave out where an instance occurs, and the response takes it from all batches."""
    case, left_out = CASES["mlp_regression"](), torch.arange(20)
    protocol = Protocol(
        optimizer=optimizer, batch_size=11, epochs=3, leave_out="mask", dtype="float64", evaluate_every=2
    )
    problem = AttributionProblem(case.final_model, case.train, case.test, left_out, following(case, protocol))
    generator, points = torch.Generator().manual_seed(0), len(problem.followed.steps)
    response = torch.randn(points, 5, 20, dtype=torch.float64, generator=generator)
    checked = Checked(left_out, torch.ones(20), torch.zeros(20, dtype=torch.int64))
    noise = torch.randn(40, points, 5, dtype=torch.float64, generator=generator)
    real = response.permute(2, 0, 1).repeat(2, 1, 1) + 2.2 * noise  # a correlation of .4 with each run
    pilot = Pilot(checked, checked.runs, torch.ones(20), [response, response], real)
    assert CalibratedResponse()._trusted(problem, pilot) == (points if optimizer == "adam" else 1)
    unrelated = Pilot(checked, checked.runs, torch.ones(20), [response, response], noise)
    assert CalibratedResponse()._trusted(problem, unrelated) == 1


def test_the_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        made.append(len(arguments[-1]))
        return run_without(*arguments)

    monkeypatch.setattr("fimo.methods.following.run_without", counted)
    method, run, _ = beyond_linear(budget=0.7)
    found = method.calibrated(AttributionProblem(*run), Tally())
    assert found is not None
    assert made[:2] == [16, 2]  # and a full run of each of the two seeds that a third of it pays for
    assert sum(made) == int(0.7 * 4 * 12 - 2 - 2 * method.following_cost(AttributionProblem(*run)))
    assert sum(made) > 12


def test_without_a_budget_it_is_the_response() -> None:
    case = CASES["mlp_classification"]()
    protocol = Protocol(lr=0.02, batch_size=5, epochs=2, dtype="float64")
    run = (case.final_model, case.train, case.test, torch.arange(6), following(case, protocol))
    method = CalibratedResponse(budget=0)
    torch.testing.assert_close(method.attribute(*run).values, Response().attribute(*run).values)
    assert method.calibrated(AttributionProblem(*run), Tally()) is None


def test_a_wrong_share_is_refused() -> None:
    with pytest.raises(InputError, match="budget"):
        CalibratedResponse(budget=-1)
    with pytest.raises(InputError, match="trust"):
        CalibratedResponse(trust=1.5)


def test_a_response_that_is_followed_for_less_leaves_more_of_the_budget_for_real_runs() -> None:
    case, left_out, seeds = CASES["mlp_regression"](), torch.arange(0, 22, 2), list(range(4))
    protocol = Protocol(lr=0.1, batch_size=11, epochs=60, leave_out="mask", dtype="float64")
    ft = following(case, protocol, seeds)
    problem = AttributionProblem(case.final_model, case.train, case.test, left_out, ft)
    checked = Checked(torch.arange(4), torch.ones(4), torch.zeros(4, dtype=torch.int64))
    made = [(k, s) for s in (0, 1) for k in range(4)]
    pilot = Pilot(checked, made, torch.linspace(1, 2, 11), [], torch.zeros(8, 60, 1))
    method = CalibratedResponse()
    cost, counts = method.following_cost(problem), []
    units = 4 * cost + 20
    for trusted in (60, 15):  # of the other two of four seeds, followed throughout or for a quarter
        found = method._worthwhile(problem, pilot, units, trusted)
        assert len(found) == int(units - 4 - cost * (2 + 2 * trusted / 60) - 2 - 8)
        assert len(set(found)) == len(found)
        assert not set(found) & set(made)
        counts.append(len(found))
    assert 0 < counts[0] < counts[1]


def linear_head(rule: str, optimizer: str = "sgd") -> tuple[Any, Any, Protocol]:
    """What a method is given of 200 rows and 24 parameters, whose runs are cheap, and the gold standard."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(260, 5, dtype=torch.float64, generator=generator)
    y = (x[:, :4] + 0.5 * torch.randn(260, 4, dtype=torch.float64, generator=generator)).argmax(1)
    torch.manual_seed(0)
    model = FinalModel(nn.Linear(5, 4).double(), cross_entropy, accept_poor=True)
    train, test = Instances(x[:200], y[:200]), Instances(x[200:], y[200:])
    protocol = Protocol(
        optimizer=optimizer,
        lr=0.05,
        batch_size=20,
        epochs=3,
        leave_out=rule,
        dtype="float64",  # type: ignore[arg-type]
    )
    left_out = list(range(0, 200, 5))
    given = FurtherTraining(
        protocol, tuple(evaluation_points(protocol, 200)[0]), (50, 51, 52, 53),
        lambda: full_runs(model, train, protocol, [50, 51, 52, 53]),
    )  # fmt: skip
    return (model, train, test, torch.tensor(left_out), given), left_out, protocol


@pytest.mark.parametrize("rule", ["mask", "every_batch", "shift"])
def test_where_runs_are_cheaper_than_the_response_the_scores_are_runs_changes(rule: str) -> None:
    run, left_out, protocol = linear_head(rule)
    even = {"mask": "every_batch", "shift": "reweighted"}.get(rule, rule)
    method = CalibratedResponse(budget=0.5)
    assert method.dearer_than_runs(AttributionProblem(*run))
    scores = method.attribute(*run)
    assert scores.notes == ("real runs of 2 seeds, which cost less than following their response",)
    truth = further_train(*run[:3], replace(protocol, leave_out=even), seeds=[50, 51], left_out=left_out)
    torch.testing.assert_close(scores.values, truth.raw.double().mean(0), rtol=0, atol=1e-7)
    checked = 0 if rule == even else 32 + 2  # by the protocol's own rule, and their full runs
    assert scores.gradient_evaluations == (2 * (40 + 1) + checked) * protocol.run_gradients(200)
    assert scores.sem_adjusted is not None
    known = scores.sem_adjusted.isfinite()
    assert known.double().mean() > 0.5
    assert (scores.sem_adjusted[known] > 0).all()
    if rule != even:
        unchecked = CalibratedResponse(budget=0.5, checks=0).attribute(*run)
        assert unchecked.sem is None
        assert "not measured (checks: 0)" in unchecked.withheld
    chosen = Best().attribute(*run)
    assert "following a seed costs more than running it without each instance" in chosen.notes[0]
    assert not CalibratedResponse(budget=0).dearer_than_runs(AttributionProblem(*run))
    assert not CalibratedResponse(removal="own").dearer_than_runs(AttributionProblem(*run))
    few = (*run[:3], torch.tensor([1, 2]), run[4])
    assert not method.dearer_than_runs(AttributionProblem(*few))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_few_seeds_runs_agree_with_many_of_the_protocol_s_rule(optimizer: str) -> None:
    run, left_out, protocol = linear_head("mask", optimizer)
    scores = Best().attribute(*run)
    truth = further_train(*run[:3], protocol, seeds=30, left_out=left_out)
    adjusted = scores.values - scores.values.mean(-1, keepdim=True)
    found = agreement(adjusted, truth.sensitivity.double(), "cosine").mean(1)
    assert (found > (0.99 if optimizer == "sgd" else 0.85)).all()
    raw = truth.raw.double() - truth.raw.double().mean(-1, keepdim=True)
    assert scores.sem_adjusted is not None
    error = (scores.sem_adjusted.square() + raw.var(0) / len(raw)).sqrt()
    within = ((adjusted - raw.mean(0)).abs() <= 2 * error)[scores.sem_adjusted.isfinite()]
    assert within.double().mean() > 0.85


@pytest.mark.parametrize(
    ("rule", "size", "known"), [("shift", 7, False), ("shift", 8, True), ("mask", 7, True)]
)
def test_raw_bars_are_withheld_where_epochs_without_an_instance_are_shorter(
    rule: Any, size: int, known: bool
) -> None:
    case = CASES["mlp_regression"]()
    train = case.train[list(range(22))]  # three batches of seven, and a last one of a single instance
    protocol = Protocol(lr=0.05, batch_size=size, epochs=3, leave_out=rule, dtype="float64")
    given = following(replace(case, train=train), protocol, list(range(8)))
    found = CalibratedResponse().attribute(case.final_model, train, case.test, torch.arange(22), given)
    assert (found.sem is not None) == known
    assert found.sem_adjusted is not None
    assert ("epochs without an instance have a step less" in found.withheld) != known
