from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.counterfactual import CHANCE, removal_curves
from fimo.evaluation.label_errors import (
    average_precision,
    chance_precision,
    detection,
    flip_labels,
    suspicion,
)
from fimo.evaluation.lds import datamodeling_score, group_scores, random_subsets
from fimo.further_training import Protocol, further_train
from fimo.further_training.sensitivity import Sensitivity
from tests.cases import CASES

N, J = 24, 4


def effects() -> Tensor:
    return torch.randn(J, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def linear_datamodel(effect: Tensor, seeds: int = 3, noise: float = 0.0, draw: int = 1):
    """Return an engine whose losses are exactly linear in which instances are left out."""

    def leave_out(groups: list[list[int]]) -> Sensitivity:
        generator = torch.Generator().manual_seed(draw)
        change = group_scores(effect, groups, N)[None, None].expand(seeds, 2, J, len(groups))
        raw = change + noise * torch.randn(change.shape, generator=generator)
        first = torch.tensor([group[0] for group in groups])
        steps = torch.tensor([5, 10])
        return Sensitivity(
            raw.float(), steps, torch.tensor([1, 2]), first, torch.arange(J), torch.arange(seeds)
        )

    return leave_out


def test_an_exact_linear_datamodel_scores_plus_one_and_its_opposite_minus_one() -> None:
    scores = {"exact": ("TAA", effects()), "opposite": ("TAA", -effects())}
    table = datamodeling_score(scores, linear_datamodel(effects()), N, subsets=20)
    values = table.set_index("method")["mean"]
    assert values["exact"].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert values["opposite"].tolist() == pytest.approx([-1, -1], abs=1e-6)
    assert set(table["metric"]) == {"lds"}


def test_noise_lowers_the_score_to_its_ceiling() -> None:
    """Both are estimates: their means over 5 draws of the noise and 2 evaluation points are compared."""
    tables = [
        datamodeling_score(
            {"exact": ("TAA", effects())},
            linear_datamodel(effects(), seeds=8, noise=6.0, draw=draw),
            N,
            subsets=1000,
        )
        for draw in range(5)
    ]
    table = pd.concat(tables)
    assert table["mean"].mean() == pytest.approx(table["ceiling"].mean(), abs=0.02)
    assert (table["mean"] < 0.8).all()


def test_subsets_have_the_size_asked_for_and_differ() -> None:
    subsets = random_subsets(20, 10, 0.3, torch.Generator().manual_seed(0))
    assert all(len(set(s)) == 6 for s in subsets)
    assert len(set(map(tuple, subsets))) == 10
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match=r"evaluation\.datamodeling\.share"):
            random_subsets(20, 10, share, torch.Generator())


def test_removing_what_a_method_holds_most_helpful_raises_the_loss_more_than_chance() -> None:
    scores = {"exact": ("TAA", effects()), "opposite": ("TAA", -effects())}
    table = removal_curves(scores, linear_datamodel(effects(), noise=0.1), N, counts=(1, 4))
    last = table[table.step == 10].set_index(["method", "removed"])["mean"]
    best = effects().mean(0).sort(descending=True).values
    assert last["exact", 4] == pytest.approx(best[:4].sum().item(), abs=0.2)
    assert last["opposite", 4] < last[CHANCE, 4] < last["exact", 4]
    assert (table["sem"] > 0).all()
    with pytest.raises(InputError, match=r"evaluation\.removal\.counts"):
        removal_curves(scores, linear_datamodel(effects()), N, counts=(N,))


def test_both_go_through_the_engine() -> None:
    case = CASES["mlp_regression"]()
    n = len(case.train)
    protocol = Protocol(lr=0.05, batch_size=8, epochs=2, leave_out="mask", dtype="float64")
    further = {"trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}}

    def leave_out(groups: list[list[int]]) -> Sensitivity:
        return further_train(case.final_model, case.train, case.test, protocol, [0, 1], groups, **further)

    single = leave_out([[i] for i in range(n)])
    scores = {"measured": ("TAA", single.raw.mean(0)[-1])}
    lds = datamodeling_score(scores, leave_out, n, subsets=12, share=0.2)
    assert lds["mean"].iloc[-1] > 0.8, "a few small effects nearly add up"
    removal = removal_curves(scores, leave_out, n, counts=(1, 3))
    last = removal[removal.step == removal.step.max()].set_index(["method", "removed"])["mean"]
    assert last["measured", 1] == pytest.approx(single.raw.mean(0)[-1].mean(0).max().item(), rel=1e-4)
    assert last["measured", 3] > last["measured", 1] > 0


def test_flipped_labels_are_other_classes_and_are_named() -> None:
    targets = torch.randint(0, 4, (100,), generator=torch.Generator().manual_seed(0))
    changed, flipped = flip_labels(targets, 0.2, 4, torch.Generator().manual_seed(1))
    assert flipped.sum() == 20
    assert ((changed != targets) == flipped).all()
    assert set(changed.tolist()) <= {0, 1, 2, 3}
    with pytest.raises(InputError, match="only be flipped in classification"):
        flip_labels(targets.float(), 0.2, 4, torch.Generator())
    with pytest.raises(InputError, match=r"evaluation\.mislabelled\.share"):
        flip_labels(targets, 0.0, 4, torch.Generator())


def test_average_precision_is_scikit_learn_s_whatever_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    values, flipped = torch.randn(60, generator=generator), torch.rand(60, generator=generator) < 0.2
    expected = average_precision_score(flipped.numpy(), values.numpy())
    for scale in (1e-12, 1.0, 1e9):
        assert average_precision(scale * values, flipped).item() == pytest.approx(expected, rel=1e-5)
    assert average_precision(torch.full((60,), torch.nan), flipped).isnan()


@pytest.mark.parametrize(("flipped", "instances"), [(1, 1), (1, 4), (2, 5), (3, 3), (3, 7)])
def test_chance_is_the_mean_average_precision_of_all_orders(flipped: int, instances: int) -> None:
    values = torch.arange(instances, 0, -1).double()
    found = []
    for places in itertools.combinations(range(instances), flipped):
        labels = torch.zeros(instances, dtype=torch.bool)
        labels[list(places)] = True
        found.append(average_precision(values, labels))
    assert chance_precision(flipped, instances) == pytest.approx(torch.stack(found).mean().item(), rel=1e-6)
    assert math.isnan(chance_precision(0, instances))


def test_harmful_instances_are_found_and_chance_is_that_of_random_orders() -> None:
    repeats = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        flipped = torch.zeros(100, dtype=torch.bool)
        flipped[torch.randperm(100, generator=generator)[:10]] = True
        scores = torch.randn(3, 100, generator=generator) - 5 * flipped
        random = torch.rand(100, generator=generator)
        repeats.append(({"finds": suspicion(scores), "guesses": random}, flipped))
    table = detection(repeats).set_index("method")
    assert table.loc["finds", "mean"] > 0.95
    chance = table.loc["guesses", "chance"]
    assert chance == pytest.approx(0.138, abs=0.001)
    assert table.loc["guesses", "mean"] == pytest.approx(chance, abs=3 * table.loc["guesses", "sem"])
    assert table.loc["guesses", "mean"] - 0.1 > 3 * table.loc["guesses", "sem"], "more than the share"
    assert math.isnan(detection(repeats[:1])["sem"].iloc[0])
