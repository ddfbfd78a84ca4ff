import math

import pytest
import torch
from torch import nn

import fimo
from fimo.audit.held_out_runs import fresh, held_out_outputs, why_not_fresh
from fimo.audit.suspects import suspects
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.evaluation.label_errors import average_precision, flip_labels
from fimo.models.mlp import mlp

FURTHER = fimo.Protocol(lr=0.05, batch_size=16, epochs=8)


def blobs(n=300, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = 3 * torch.randn(classes, 5, generator=generator)
    return Instances(centres[labels] + torch.randn(n, 5, generator=generator), labels)


def network(classes=3):
    torch.manual_seed(0)
    return fimo.FinalModel(mlp(5, classes, (16,)), "cross_entropy", accept_poor=True)


def with_errors(data, share=0.1, classes=3):
    targets, flipped = flip_labels(data.targets, share, classes, torch.Generator().manual_seed(1))
    return Instances(data.inputs, targets), flipped


def test_planted_label_errors_are_found_with_the_right_label():
    data = blobs()
    train, flipped = with_errors(data)
    found = suspects(network(), train, repeats=2)
    assert average_precision(found.score, flipped) > 0.95
    listed = found.within(0.1)
    assert len(listed) >= flipped.sum() / 2
    assert flipped[listed].double().mean() >= 0.9
    assert (found.suggested[listed] == data.targets[listed]).double().mean() >= 0.9
    assert found.share == pytest.approx(0.1, rel=0.4)
    assert (found.score[listed].diff() <= 0).all()


def test_planted_target_errors_are_found_with_about_the_right_value():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    right = x[:, :1] - 2 * x[:, 1:2] + 0.1 * torch.randn(400, 1, generator=generator)
    wrong = torch.arange(400) % 20 == 0
    values = torch.where(wrong[:, None], right + 5 * (-1) ** torch.arange(400)[:, None], right)
    model = fimo.FinalModel(mlp(5, 1, (16,)), "mse", accept_poor=True)
    found = suspects(model, Instances(x, values), repeats=2)
    assert average_precision(found.score, wrong) > 0.95
    listed = found.within(0.1)
    assert wrong[listed].double().mean() >= 0.9
    assert len(listed) >= 10
    assert (found.suggested - right)[listed].abs().mean() < 1.0  # against an error of 5


def test_outputs_do_not_depend_on_a_row_s_own_label():
    train = blobs(60)
    changed = Instances(train.inputs, train.targets.clone())
    changed.targets[7] = (changed.targets[7] + 1) % 3
    settings = {"folds": 3, "repeats": 1}
    one, other = (held_out_outputs(network(), part, **settings) for part in (train, changed))
    # the epoch is chosen by all rows, and so may differ; here it doesn't
    assert torch.equal(one[:, 7], other[:, 7])
    assert not torch.equal(one, other)


def test_what_is_asked_twice_is_answered_alike():
    train, _ = with_errors(blobs(80))
    first, second = (suspects(network(), train, repeats=1, seed=3) for _ in range(2))
    assert torch.equal(first.score, second.score)
    assert torch.equal(first.q, second.q)


def test_the_caller_s_random_numbers_stay():
    model, train = network(), blobs(60)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    suspects(model, train, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_fresh_parameters_are_those_of_a_new_network():
    model = network()
    again = fresh(model, 11)
    torch.manual_seed(11)
    expected = mlp(5, 3, (16,))
    for module in expected.modules():  # in their order, which a new network's is too
        if isinstance(module, nn.Linear):
            assert module.weight.std() > 0
    assert {n: p.shape for n, p in again.items()} == {n: p.shape for n, p in expected.named_parameters()}
    for name, p in expected.named_parameters():
        assert torch.equal(again[name], p)
    assert not torch.equal(again["1.weight"], model.parameters()["1.weight"])


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("kind", ["parameter", "batch normalisation"])
def test_a_checkpoint_that_can_t_be_initialised_anew_goes_on_without_the_fold(kind):
    torch.manual_seed(0)
    normalised = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    model = fimo.FinalModel(
        OwnParameter() if kind == "parameter" else normalised, "cross_entropy", accept_poor=True
    )
    assert why_not_fresh(model) is not None
    train, flipped = with_errors(blobs())
    found = suspects(model, train, FURTHER, repeats=2)
    assert found.forest == 0.5
    assert average_precision(found.score, flipped) > 0.9
    with pytest.raises(InputError, match="further_training"):
        suspects(model, train)


def test_a_frozen_part_is_evaluated_once_and_its_outputs_are_the_forest_s_features():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    model = fimo.FinalModel(body, "cross_entropy", trainable=["3.*"], accept_poor=True)
    train, flipped = with_errors(blobs())
    found = suspects(model, train, repeats=1)
    assert average_precision(found.score, flipped) > 0.8


def test_labels_that_occur_once_are_not_judged():
    data = blobs(120)
    targets = data.targets.clone()
    targets[17] = 3  # a class of one row: nobody else can know it
    targets[18] = -100  # no label at all
    loss = nn.CrossEntropyLoss(reduction="none")  # the user's own, which may ignore a label
    model = fimo.FinalModel(network(4).network, loss, accept_poor=True)
    found = suspects(model, Instances(data.inputs, targets), repeats=1)
    assert (found.q[17:19] == 1.0).all()
    assert (found.probability[17:19] == 0.0).all()
    assert (found.score[17:19] == found.score.min()).all()
    assert found.score.isfinite().all()
    assert not set(found.within(0.5).tolist()) & {17, 18}


def test_two_classes_of_one_logit_are_judged_too():
    data = blobs(300, 2)
    targets, flipped = flip_labels(data.targets, 0.1, 2, torch.Generator().manual_seed(1))
    model = fimo.FinalModel(mlp(5, 1, (16,)), "binary_cross_entropy", accept_poor=True)
    found = suspects(model, Instances(data.inputs, targets.float()[:, None]), repeats=1)
    assert average_precision(found.score, flipped) > 0.9
    assert not found.suggested.is_floating_point()


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(InputError, match="at least 40 training rows but got 30"):
        suspects(network(), blobs(30))
    with pytest.raises(InputError, match="folds"):
        suspects(network(), blobs(60), folds=1)
    with pytest.raises(InputError, match="repeats"):
        suspects(network(), blobs(60), repeats=0)
    alone = Instances(blobs(60).inputs, torch.zeros(60, dtype=torch.int64))
    with pytest.raises(InputError, match="two classes"):
        suspects(network(), alone)
    with pytest.raises(InputError, match="between 0 and 1"):
        suspects(network(), blobs(60), repeats=1).within(math.inf)


def test_an_audit_lists_suspects_with_what_their_labels_should_be_and_leaves_them_out():
    data = blobs(200)
    train, flipped = with_errors(data)
    found = fimo.audit(network(), train, blobs(40, seed=0), FURTHER, top=4, seeds=2, controls=8)
    rows = found.rows
    listed = rows["suggested"] != ""
    assert listed.sum() == found.summary["suspects"]["count"] >= 5
    assert (rows.loc[listed, "suspect_q"] <= 0.1).all()
    assert found.summary["suspects"]["fdr"] == rows.loc[listed, "suspect_q"].max()
    assert flipped.numpy()[listed].mean() >= 0.8
    right = data.targets.numpy()[listed].astype(str)
    assert (rows.loc[listed, "suggested"].to_numpy() == right).mean() >= 0.8
    assert "random forest" in found.summary["suspects"]["order"]
    assert found.summary["removed"] >= listed.sum()
