from __future__ import annotations

import pytest
import torch

from fimo.errors import InputError
from fimo.evaluation import METRICS, agreement, noise_ceiling
from fimo.evaluation.ceiling import ceiling_undefined, half_splits
from tests.evaluation.synthetic import synthetic


@pytest.mark.parametrize("metric", METRICS)
def test_the_ceiling_is_the_agreement_of_the_noiseless_truth(metric: str) -> None:
    """The truth is known here, so that its agreement with the mean over k seeds can be computed."""
    sensitivity, signal = synthetic(seeds=8, tests=40, left_out=60, noise=2.0)
    truth = signal - signal.mean(-1, keepdim=True)
    ceiling = noise_ceiling(sensitivity.raw, metric)
    assert ceiling.shape == (4, 8)
    for k in (1, 2, 4, 8):
        subsets = sensitivity.raw.unfold(0, k, k).mean(-1)  # disjoint means over k seeds
        actual = torch.stack(
            [agreement(truth, m - m.mean(-1, keepdim=True), metric).mean(-1) for m in subsets]
        )
        # two per cent: ceiling and agreement are both averages over 40 test instances
        torch.testing.assert_close(ceiling[:, k - 1], actual.mean(0), atol=0.02, rtol=0)
    assert (ceiling.diff(dim=-1) > 0).all(), "more seeds, less noise"


def test_the_ceiling_is_the_variance_ratio_for_pearson() -> None:
    sensitivity, signal = synthetic(seeds=10, tests=60, left_out=100, noise=1.5, points=1)
    variance = (signal / 1e-4).var(-1).mean()
    exact = torch.sqrt(variance / (variance + 1.5**2 / 10))
    assert noise_ceiling(sensitivity.raw, "pearson")[0, -1].item() == pytest.approx(exact.item(), abs=0.01)


def test_without_noise_the_ceiling_is_one_and_without_signal_it_is_low() -> None:
    clean, _ = synthetic(noise=0.0)
    torch.testing.assert_close(noise_ceiling(clean.raw, "cosine"), torch.ones(4, 6))
    noise = torch.randn(10, 3, 40, 60, generator=torch.Generator().manual_seed(1))
    assert noise_ceiling(noise, "pearson")[:, -1].max() < 0.3


def test_one_seed_has_no_ceiling_and_says_why() -> None:
    sensitivity, _ = synthetic(seeds=1)
    assert noise_ceiling(sensitivity.raw, "cosine").isnan().all()
    assert "one seed" in (ceiling_undefined(1) or "")
    assert ceiling_undefined(2) is None


def test_seed_counts_choose_the_columns_and_are_checked() -> None:
    sensitivity, _ = synthetic()
    full = noise_ceiling(sensitivity.raw, "cosine")
    torch.testing.assert_close(noise_ceiling(sensitivity.raw, "cosine", seed_counts=[2, 6]), full[:, [1, 5]])
    with pytest.raises(InputError, match=r"evaluation\.seed_counts: expected 1 to 6"):
        noise_ceiling(sensitivity.raw, "cosine", seed_counts=[7])


@pytest.mark.parametrize(("seeds", "distinct"), [(2, 1), (3, 3), (4, 3), (5, 15), (6, 10)])
def test_few_seeds_are_split_in_every_way_once(seeds: int, distinct: int) -> None:
    splits = half_splits(seeds, most=50)
    assert len({frozenset(map(frozenset, s)) for s in splits}) == len(splits) == distinct
    assert all(len(a) == len(b) == seeds // 2 and not set(a) & set(b) for a, b in splits)


def test_many_seeds_are_split_at_random() -> None:
    splits = half_splits(20, most=7)
    assert len(splits) == 7
    assert all(len({*a, *b}) == 20 for a, b in splits)
