"""Blocks of weighted means over seeds, against one mean, one pair of vectors at a time."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor

from fimo.evaluation import METRICS, agreement, assess
from fimo.evaluation import resampling as module
from fimo.evaluation.bootstrap import bootstrap_agreement
from fimo.evaluation.ceiling import half_agreements, half_splits
from fimo.evaluation.metrics import ranks
from fimo.evaluation.resampling import agreements, mean_agreements, seed_means, subset_weights
from fimo.further_training.sensitivity import adjust
from tests.evaluation.synthetic import synthetic

SUBSETS = {2: [[0, 1], [2, 5]], 3: [[0, 2, 4]], 6: [list(range(6))]}


def methods() -> tuple[Tensor, dict[str, Tensor]]:
    """Return raw changes ``[S, E, J, L]``, and a method that is fixed and one that follows."""
    sensitivity, signal = synthetic()
    return sensitivity.raw, {"fixed": signal[0], "follows": signal.float()}


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_agreements_over_subsets_are_means_of_each_subset_s_own(metric: str, subtract_mean: bool) -> None:
    raw, scores = methods()
    found = mean_agreements(scores, raw, SUBSETS, metric, subtract_mean)
    for key, subsets in SUBSETS.items():
        for name, values in scores.items():
            alone = [agreement(values, adjust(raw[s].mean(0), subtract_mean), metric) for s in subsets]
            torch.testing.assert_close(found[key][name], torch.stack(alone).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_agreement_of_halves_is_the_mean_over_splits_of_each_split_s_own(metric: str) -> None:
    raw, _ = methods()
    alone = [
        agreement(adjust(raw[a].mean(0)), adjust(raw[b].mean(0)), metric) for a, b in half_splits(6, most=50)
    ]
    expected = torch.stack(alone).double().mean(0)
    torch.testing.assert_close(half_agreements(raw, metric), expected, atol=1e-5, rtol=0)


def test_bootstrap_intervals_are_those_of_resamples_drawn_one_at_a_time() -> None:
    raw, scores = methods()
    generator = torch.Generator().manual_seed(7)
    sample = []
    for _ in range(30):
        seeds = torch.randint(6, (6,), generator=generator)
        tests = torch.randint(5, (5,), generator=generator)
        sample.append(agreement(scores["fixed"], adjust(raw[seeds].mean(0)), "pearson")[:, tests].mean(-1))
    drawn = torch.stack(sample).double()
    estimate = agreement(scores["fixed"], adjust(raw.mean(0)), "pearson").mean(-1).double()
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975]).double(), dim=0) + estimate - drawn.mean(0)
    low, high = bootstrap_agreement(
        scores, raw, "pearson", resamples=30, generator=torch.Generator().manual_seed(7)
    )["fixed"]
    torch.testing.assert_close(torch.stack([low, high]), ends.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 300, 500])
def test_no_result_depends_on_the_size_of_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sensitivity, signal = synthetic(seeds=9)
    scores = {"fixed": ("FiMO", signal[0]), "follows": ("TAA", signal)}
    whole = assess(scores, sensitivity, resamples=8)
    monkeypatch.setattr(module, "BLOCK", block)
    blocks = list(seed_means(sensitivity.raw, torch.ones(4, 9) / 9, "cosine", True))
    assert len(blocks) > 4, "more than one block an evaluation point"
    again = assess(scores, sensitivity, resamples=8)
    for name in ("table", "bootstrap", "slopes"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(whole, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_seed_that_diverged_spoils_only_the_means_it_is_part_of(metric: str) -> None:
    raw, scores = methods()
    expected = mean_agreements(scores, raw, {1: [[0], [1], [2]]}, metric)[1]["fixed"]
    raw = raw.clone()
    raw[3, 1, 2, 4] = torch.nan
    raw[4, 2] = torch.inf
    found = mean_agreements(scores, raw, {1: [[0], [1], [2]], 6: [range(6)]}, metric)
    torch.testing.assert_close(found[1]["fixed"], expected, atol=1e-6, rtol=0)
    undefined = found[6]["fixed"].isnan()
    assert undefined.sum() == 6
    assert undefined[1, 2]
    assert undefined[2].all()


def test_every_method_meets_every_mean_in_one_product() -> None:
    raw, scores = methods()
    weights = subset_weights([s for group in SUBSETS.values() for s in group], 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    for e, block, values in agreements(scores, raw, weights, "spearman", True):
        for m, s in enumerate(scores.values()):
            for k, weight in enumerate(weights):
                mean = adjust(torch.einsum("s,sejl->ejl", weight, raw))
                expected = agreement(s, mean, "spearman")[e, block]
                torch.testing.assert_close(values[m, k], expected, atol=1e-5, rtol=0)


def test_ranks_of_both_precisions_agree_on_hard_cases() -> None:
    """Negative numbers, both zeros, subnormal numbers, the largest there are, neighbours in the last bit."""
    hard = [-0.0, 0.0, 1e-42, -1e-42, 3e38, -3e38, 1.0, 1.0000001, -1.0, -1.0000001, 0.0, 1.0]
    values = torch.tensor([hard, hard[::-1]])
    torch.testing.assert_close(ranks(values).double(), ranks(values.double()))
    assert ranks(values)[0, 0] == ranks(values)[0, 1], "minus zero is zero"
