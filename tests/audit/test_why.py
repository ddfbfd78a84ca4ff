"""Why a prediction is what it is, against networks that a plain loop trains without the rows."""

from __future__ import annotations

import json

import pytest
import torch
from tests.cases import CASES, Case, mlp
from tests.reference.further_training import plain_run
from torch import nn

from fimo.audit.answers import answer_as_json
from fimo.audit.explained import Shown, explained, typical_error
from fimo.audit.removal import Removal
from fimo.audit.why import foremost, why
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel
from fimo.models.quantities import measuring
from fimo.validation.admission import admit

PROTOCOL = Protocol(lr=0.1, batch_size=5, epochs=4, dtype="float64", leave_out="mask")
SEEDS = [0, 1, 5]


def network(case: Case, seed: int, unit: tuple[int, ...] = ()) -> nn.Module:
    return plain_run(case.final_model, case.train, case.test, PROTOCOL, seed, unit)[2].eval()


def test_the_rows_whose_removal_moves_a_number_furthest_come_first_and_others_do_not_count() -> None:
    score = torch.tensor([0.3, -2.0, 0.0, -0.5, 1.0, 0.1, 0.2, 0.4, 0.6])
    assert foremost(score, "lowers", (1, 2, 5)) == [(1,), (1, 3)]
    assert foremost(score, "raises", (3, 1, 4, 5)) == [(4,), (4, 8, 7), (4, 8, 7, 0)]


def test_a_regressions_changes_are_those_of_a_plain_loop_in_the_targets_units() -> None:
    case = CASES["mlp_regression"]()
    shown = Shown(units=lambda v: v.exp() * 10, unit="EUR")  # as of a logarithm that was learned
    numbers = explained(case.final_model, case.test, [3, 1], shown)
    out = case.final_model.outputs(case.test)[:, 0]
    assert [n.value for n in numbers] == pytest.approx((out[[3, 1]].exp() * 10).tolist())
    assert numbers[1].target == pytest.approx(float(case.test.targets[1, 0].exp() * 10))
    scores = torch.randn(2, len(case.train), generator=torch.Generator().manual_seed(0))
    removal = Removal(case.train, PROTOCOL, SEEDS)
    answers = why(case.final_model, case.test, numbers, scores, removal, shown, counts=(1, 3))
    for answer, score, position in zip(answers, scores, (3, 1), strict=True):
        order = score.argsort().tolist()
        groups = [(1, order[:1]), (3, order[:3]), (1, order[:-2:-1]), (3, order[:-4:-1])]
        assert [(s.side, list(s.rows)) for s in answer.steps] == [
            ("lowers" if k < 2 else "raises", rows) for k, (_, rows) in enumerate(groups)
        ]
        x, y = case.test.inputs[position : position + 1], case.test.targets[position]
        for step, (_, rows) in zip(answer.steps, groups, strict=True):
            changes, losses = [], []
            for seed in SEEDS:
                full, without = (
                    network(case, seed, unit)(x)[0, 0].detach() for unit in ((), tuple(sorted(rows)))
                )
                changes.append(float(10 * without.exp() - 10 * full.exp()))
                losses.append(float((without - y).square() - (full - y).square()))
            change = torch.tensor(changes, dtype=torch.float64)
            assert step.change == pytest.approx(float(change.mean()), rel=1e-5)
            assert step.change_sem == pytest.approx(float(change.std() / 3**0.5), rel=1e-4)
            assert step.loss == pytest.approx(sum(losses) / 3, rel=1e-4, abs=1e-9)
    errors = 10 * out.exp() - 10 * case.test.targets[:, 0].exp()
    error = typical_error(case.final_model, case.test, shown)
    assert error == pytest.approx(float(errors.square().mean().sqrt()))
    said = answer_as_json(answers[0], shown, Origin.counted(23), Origin.counted(5), error)
    json.dumps(said, allow_nan=False)
    assert said["test_row"] == 3
    assert said["unit"] == "EUR"
    assert said["turned_by"] is None
    assert f"{answers[0].steps[-1].change:+.3g}" in said["text"]


def blobs() -> Case:
    """A class of six rows far from the others, and a test instance beside them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    x[:6], y[:6] = torch.tensor([0.0, 4.0]) + 0.1 * x[:6], 2
    test = Instances(torch.tensor([[0.0, 3.5], [1.5, 0.0]], dtype=torch.float64), torch.tensor([2, 1]))
    torch.manual_seed(1)
    model = nn.Linear(2, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Case("blobs", FinalModel(model, "cross_entropy", accept_poor=True), Instances(x, y), test)


def test_a_class_that_hangs_on_a_few_rows_is_turned_by_leaving_them_out_together() -> None:
    case, names = blobs(), ("left", "right", "top")
    shown = Shown(names)
    numbers = explained(case.final_model, case.test, [0, 1], shown)
    assert [n.label for n in numbers] == [2, 1]
    # rows of its class, by hand: what a gradient would say
    scores = torch.zeros(2, 40)
    scores[0, :6] = -torch.arange(6, 0, -1)
    scores[1, 10:13] = -1.0
    protocol = Protocol(lr=0.5, batch_size=10, epochs=40, leave_out="mask", dtype="float64")
    removal = Removal(case.train, protocol, SEEDS)
    answers = why(case.final_model, case.test, numbers, scores, removal, shown, counts=(1, 3, 6))
    turned = answers[0].turned_by
    assert turned is not None
    assert turned.turned == 1.0
    assert turned.label != 2
    assert answers[1].turned_by is None
    assert [len(s.rows) for s in answers[1].steps] == [1, 3]
    for step in answers[0].steps:
        labels, chances = [], []
        for seed in SEEDS:
            trained = plain_run(case.final_model, case.train, case.test, protocol, seed, sorted(step.rows))[2]
            odds = trained(case.test.inputs)[0].detach().exp()
            labels.append(int(odds.argmax()))
            chances.append(float(odds[2] / odds.sum()))
        assert step.turned == pytest.approx(sum(k != 2 for k in labels) / 3)
        assert step.without == pytest.approx(sum(chances) / 3, rel=1e-3)
    ids = tuple(f"r{k}" for k in range(40))
    origin = Origin(torch.arange(40).numpy(), ids)
    said = answer_as_json(answers[0], shown, origin, Origin.counted(2), float("nan"))
    json.dumps(said, allow_nan=False)
    assert said["prediction"] == "top"
    assert said["turned_by"] == len(turned.rows)
    assert said["prediction_without"] in ("left", "right")
    assert "r0" in said["text"]
    other = answer_as_json(answers[1], shown, origin, Origin.counted(2), float("nan"))
    assert other["turned_by"] is None
    assert "stays right" in other["text"]


def test_two_classes_of_one_output_are_told_by_a_half() -> None:
    torch.manual_seed(2)
    x = torch.randn(30, 2)
    y = (x[:, 0] > 0).float()[:, None]
    net = mlp(2, (6,), 1, nn.Tanh)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
        optimizer.step()
    model = FinalModel(net, "binary_cross_entropy", accept_poor=True)
    train, test = admit(model, Instances(x, y), Instances(torch.tensor([[-0.8, 0.0], [0.7, 0.3]]), y[:2]))
    numbers = explained(model, test, [0, 1], Shown())
    assert [n.label for n in numbers] == [0, 1]
    assert all(n.value > 0.5 for n in numbers)
    # of the first, a row of class 0 holds the probability of 1 down: without it that rises
    rows = [int(y[:, 0].argmin()), int(y[:, 0].argmax())]
    scores = torch.zeros(2, 30)
    scores[0, rows[0]], scores[1, rows[1]] = 1.0, -1.0
    protocol = Protocol(lr=0.3, epochs=5, dtype="float64")
    answers = why(model, test, numbers, scores, Removal(train, protocol, [0]), Shown(), (1,))
    for k, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        (step,) = answer.steps
        assert step.rows == (row,)
        assert step.turned == 0.0
        chances = []
        for unit in ((), (row,)):
            after = plain_run(model, train, test, protocol, 0, unit)[2]
            p = 1 / (1 + (-after(test.inputs.double())[k, 0].detach()).exp())
            chances.append(float(p if k else 1 - p))
        assert step.change == pytest.approx(chances[1] - chances[0], rel=1e-4)
        assert step.change < 0


def test_measuring_a_prediction_gives_what_is_explained() -> None:
    case = CASES["mlp_classification"]()
    numbers = explained(case.final_model, case.test, [0, 2], Shown())
    model, test = measuring(case.final_model, [(case.test[[0, 2]], [n.which for n in numbers])])
    values = model.measurement(model.outputs(test), test.targets)
    assert values.tolist() == pytest.approx([n.value for n in numbers])
