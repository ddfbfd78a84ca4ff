from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import fimo.evaluation.metrics as metrics
from fimo.errors import InputError
from fimo.evaluation import METRICS, agreement, noise_ceiling, noise_ceilings
from fimo.evaluation.ceiling import (
    ceiling_undefined,
    expected_cosine,
    half_splits,
    not_enough_seeds,
    ratio_of_halves,
    seeds_for,
    variance_ratio,
)
from fimo.evaluation.deconvolution import noncentral_f_log_density, signal_strengths
from fimo.evaluation.metrics import Metric, metric_of
from fimo.further_training.sensitivity import adjust
from tests.evaluation.synthetic import synthetic


@pytest.mark.parametrize("metric", METRICS)
def test_the_ceiling_is_the_agreement_of_the_noiseless_truth(metric: str) -> None:
    """The truth is known here, so that its agreement with the mean over k seeds can be computed."""
    sensitivity, signal = synthetic(seeds=8, tests=120, left_out=60, noise=2.0)
    truth = signal - signal.mean(-1, keepdim=True)
    ceiling = noise_ceiling(sensitivity.raw, metric)
    assert ceiling.shape == (4, 8)
    for k in (1, 2, 4, 8):
        subsets = sensitivity.raw.unfold(0, k, k).mean(-1)  # disjoint means over k seeds
        actual = torch.stack(
            [agreement(truth, m - m.mean(-1, keepdim=True), metric).mean(-1) for m in subsets]
        )
        # two per cent: ceiling and agreement are both averages over 120 test instances
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


def draw(kind: str, seeds: int, tests: int = 1000, left_out: int = 30) -> tuple[Tensor, Tensor]:
    """Return a truth ``[1, J, L]`` and raw changes ``[2 S, 1, J, L]`` of it; noise in units of the signal."""
    generator = torch.Generator().manual_seed(10 + seeds)
    truth = torch.randn(1, tests, left_out, generator=generator)
    sizes = {
        "noise 1": torch.ones(1, 1),
        "noise 3": torch.full((1, 1), 3.0),
        # .3 to 10, another for each test instance
        "mixed": torch.exp(3.5 * torch.rand(tests, 1, generator=generator) - 1.2),
    }
    return truth, truth + sizes[kind] * torch.randn(2 * seeds, 1, tests, left_out, generator=generator)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 10, 20])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["noise 1", "noise 3", "mixed"])
def test_the_ceilings_are_what_the_truth_and_another_gold_standard_really_show(
    kind: str, metric: str, seeds: int
) -> None:
    """Of odd and even numbers of seeds, and where test instances are alike or differ in their noise."""
    truth, raw = draw(kind, seeds)
    mean, other = (adjust(part.mean(0)) for part in raw.split(seeds))
    real = agreement(adjust(truth), mean, metric).mean().item()
    again = agreement(other, mean, metric).mean().item()
    found = noise_ceilings(raw[:seeds], metric, seed_counts=[seeds])
    assert found.upper.item() == pytest.approx(real, abs=0.02 if real > 0.5 else 0.05)
    assert found.lower.item() == pytest.approx(again, abs=0.03)
    assert again - 0.01 <= real, "or the draw is a strange one"
    assert found.lower.item() <= real <= found.upper.item() + (0.02 if real > 0.5 else 0.05)


@pytest.mark.parametrize("metric", METRICS)
def test_the_lower_ceiling_is_below_the_upper_one_and_both_grow_with_the_seeds(metric: str) -> None:
    _, raw = draw("mixed", 6, tests=40)
    found = noise_ceilings(raw[:6], metric)
    assert (found.lower < found.upper).all()
    assert (found.lower.diff() > 0).all()
    assert (found.upper.diff() > 0).all()


def test_a_diverged_test_instance_has_no_ceiling_and_spoils_no_other_s() -> None:
    _, raw = draw("noise 1", 4, tests=60)
    clean = noise_ceiling(raw[:, :, 1:])
    spoiled = raw.clone()
    spoiled[2, 0, 0, 3] = torch.nan
    torch.testing.assert_close(noise_ceiling(spoiled), clean)
    assert noise_ceiling(torch.full_like(raw, torch.nan)).isnan().all()


def test_halves_of_an_odd_number_of_seeds_have_one_seed_less() -> None:
    """Signal and one seed's noise of equal variance: F = 1 + S, and means over h correlate by h / (h + 1)."""
    for seeds in (2, 3, 4, 5, 7, 10):
        half = seeds // 2
        found = ratio_of_halves(torch.tensor(half / (half + 1), dtype=torch.float64), seeds)
        assert found.item() == pytest.approx(1 + seeds)


def test_the_variance_ratio_is_that_of_an_analysis_of_variance() -> None:
    changes = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = changes - changes.mean(-1, keepdim=True)
    ratio, _ = variance_ratio(changes, 11)
    for j in range(3):
        between = sum(5 * changes[:, j, i].mean() ** 2 for i in range(12))
        within = sum(changes[:, j, i].var() for i in range(12))
        assert ratio[j].item() == pytest.approx(float(between / within))


def test_a_seed_with_larger_effects_lowers_no_ceiling() -> None:
    """It turns no cosine; the variance between seeds took it for noise, and the ceiling was .85 for .99."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(
        20, 1, 1, generator=generator
    ).exp()  # of all effects of a seed, up to ten times another
    truth, noise = torch.randn(100, 30, generator=generator), torch.randn(20, 100, 30, generator=generator)
    for seeds, tolerance in ((6, 0.03), (10, 0.01), (20, 0.005)):
        raw = (size * truth + 0.3 * noise)[:seeds, None]
        real = agreement(adjust(truth), adjust(raw.mean(0)), "cosine").mean().item()
        assert noise_ceilings(raw, "cosine", seed_counts=[seeds]).upper.item() == pytest.approx(
            real, abs=tolerance
        )


def test_few_noisy_left_out_instances_count_for_more_than_many_quiet_ones() -> None:
    noise = torch.randn(40, 50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert variance_ratio(noise, 29)[1].item() == pytest.approx(29, abs=1)
    sizes = torch.cat([torch.ones(10), torch.full((20,), 0.01)])
    assert variance_ratio(noise * sizes, 29)[1].item() == pytest.approx(10, abs=1)


@pytest.mark.parametrize("strength", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("freedom", [4, 29])
def test_the_expected_cosine_is_the_mean_of_many(strength: float, freedom: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(200_000, freedom, generator=generator, dtype=torch.float64)
    noisy[:, 0] += math.sqrt(strength)
    actual = (noisy[:, 0] / noisy.norm(dim=-1)).mean().item()
    found = expected_cosine(torch.tensor(strength, dtype=torch.float64), freedom).item()
    assert found == pytest.approx(actual, abs=0.012 if freedom < 10 else 0.002)


@pytest.mark.parametrize("metric", ["spearman", "kendall"])
@pytest.mark.parametrize("correlation", [0.1, 0.5, 0.9])
def test_the_law_of_a_metric_is_the_mean_of_many(correlation: float, metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 20_000, 12, generator=generator, dtype=torch.float64)
    v = correlation * u + math.sqrt(1 - correlation**2) * v
    actual = agreement(u, v[None], metric).mean().item()
    known = torch.tensor(correlation, dtype=torch.float64)
    found = metric_of(metric).expected(known, 12)
    assert found.item() == pytest.approx(actual, abs=0.005)
    torch.testing.assert_close(metric_of(metric).correlation_of(found, 12), known, atol=1e-6, rtol=0)


class Quadrants(Metric):
    """Blomqvist's beta: the share of entries on the same side of both medians; no law is written."""

    name = "quadrants"

    def prepared(self, vectors: Tensor) -> Tensor:
        return (vectors - vectors.median(-1, keepdim=True).values).float()

    def paired(self, u: Tensor, v: Tensor) -> Tensor:
        return (u.sign() * v.sign()).mean(-1)


def test_a_metric_without_a_law_gets_it_by_simulation() -> None:
    kinds = {kind: (type(f"Without{kind}", (Metric,), {}), kind) for kind in ("spearman", "kendall")}
    at = torch.tensor([-0.7, 0.0, 0.3, 0.9], dtype=torch.float64)
    for made, name in kinds.values():
        known = metric_of(name)
        made.prepared, made.paired = (
            (lambda self, v, k=known: k.prepared(v)),
            (lambda self, u, v, k=known: k.paired(u, v)),
        )
        torch.testing.assert_close(made().expected(at, 20), known.expected(at, 20), atol=0.01, rtol=0)
        assert made().efficiency(20) == pytest.approx(known.efficiency(20), rel=0.1)


def test_any_function_of_two_vectors_has_ceilings_and_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.KINDS, "quadrants", Quadrants)
    truth, raw = draw("noise 1", 6)
    found = noise_ceilings(raw[:6], "quadrants", seed_counts=[6])  # type: ignore[arg-type]
    real = agreement(adjust(truth), adjust(raw[:6].mean(0)), "quadrants").mean().item()  # type: ignore[arg-type]
    assert found.upper.item() == pytest.approx(real, abs=0.03)
    assert found.lower.item() < found.upper.item()


@pytest.mark.parametrize("noncentrality", [0.0, 8.0, 90.0])
def test_the_density_is_near_the_noncentral_f_distribution_s(noncentrality: float) -> None:
    x = torch.linspace(0.1, 8, 200, dtype=torch.float64)
    exact = stats.ncf.pdf(x.numpy(), 29, 87, noncentrality) if noncentrality else stats.f.pdf(x, 29, 87)
    n, m, strength = (torch.tensor(v, dtype=torch.float64) for v in (29, 87, noncentrality))
    found = noncentral_f_log_density(x, n, m, strength).exp()
    torch.testing.assert_close(found, torch.as_tensor(exact), atol=0.02 * float(exact.max()), rtol=0)


def test_noise_is_not_taken_for_differences_between_instances() -> None:
    """30 alike instances whose estimates scatter, and 30 of two kinds: the posterior tells them apart."""
    generator = torch.Generator().manual_seed(0)

    def spread(strengths: Tensor) -> float:
        signal = torch.zeros(60, 29, dtype=torch.float64)
        signal[:, 0] = strengths.sqrt()
        seeds = signal + math.sqrt(4) * torch.randn(4, 60, 29, generator=generator, dtype=torch.float64)
        nodes, probability = signal_strengths(variance_ratio(seeds, 29)[0], 29, 4)
        assert probability.sum(1).tolist() == pytest.approx([1] * 60)
        return (probability @ nodes.log()).std().item()

    assert spread(torch.full((60,), 15.0)) < 0.2
    assert spread(torch.tensor([2.0, 60.0]).repeat(30)) > 1


@pytest.mark.parametrize(("ceiling", "seeds"), [(0.3, 4), (0.5, 3), (0.85, 10), (0.95, 20)])
def test_so_many_seeds_would_reach_the_ceiling_that_is_wanted(ceiling: float, seeds: int) -> None:
    found = seeds_for(ceiling, seeds, target=0.9)
    assert found is not None

    def reached(k: int) -> float:  # Spearman and Brown
        return math.sqrt(k * ceiling**2 / (seeds + (k - seeds) * ceiling**2))

    assert reached(found - 1) < 0.9 <= reached(found)


def test_no_number_of_seeds_is_promised_where_there_is_no_signal() -> None:
    assert seeds_for(math.nan, 4) is None
    assert seeds_for(0.0, 4) is None
    assert seeds_for(1.0, 4) == 1
    with pytest.raises(InputError, match="target"):
        seeds_for(0.5, 4, target=1)


def test_a_low_ceiling_is_called_not_enough_seeds() -> None:
    assert not_enough_seeds(0.5, 4) is None
    assert not_enough_seeds(math.nan, 1) is None
    said = not_enough_seeds(0.45, 4, "pearson") or ""
    assert said.startswith("not enough seeds: with 4 the noise ceiling (pearson)")
    assert "about 68 would reach 0.9" in said
    assert "no sign of any signal" in (not_enough_seeds(0.0, 4) or "")


def test_a_cosine_that_keeps_the_mean_over_left_out_instances_has_that_mean_s_ceiling() -> None:
    """What all left-out instances share makes noisy cosines high; subtracted, only their noise is left."""
    generator = torch.Generator().manual_seed(0)
    raw = 5.0 + torch.randn(6, 1, 50, 30, generator=generator)
    others = (5.0 + torch.randn(6, 1, 50, 30, generator=generator)).mean(0)
    real = torch.nn.functional.cosine_similarity(raw.mean(0), others, dim=-1).mean()  # of means of 6 seeds
    kept, subtracted = (noise_ceilings(raw, "cosine", mean) for mean in (False, True))
    assert real > 0.98
    assert abs(kept.lower[0, -1] - real) < 0.02
    assert subtracted.upper[0, -1] < 0.5
