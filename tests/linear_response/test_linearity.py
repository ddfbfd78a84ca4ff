"""The error that seeds share, estimated from a few real runs, against errors that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.linear_response.linearity import Discrepancy, dealt, discrepancy, heavier_tails, stratified

STEPS = [1, 2, 4, 8, 16]
TESTS, LEFT_OUT, CHECKED = 12, 40, 16


def drawn(seed: int, growth: float, common: float, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [E, J, L], the error that seeds share, and residuals of two seeds with noise of their own."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sizes = torch.exp(normal(LEFT_OUT))
    scores = sizes * normal(TESTS, LEFT_OUT)
    error = 0.3 * sizes**growth * normal(TESTS, LEFT_OUT) + common * normal(TESTS, 1)
    time = torch.tensor(STEPS, dtype=torch.float64).sqrt()[:, None, None]
    scores, error = scores * time, error * time
    residual = error + noise * time * sizes**growth * normal(2, len(STEPS), TESTS, LEFT_OUT)
    return scores, error, residual


def size_of(scores: Tensor) -> Tensor:
    return (scores - scores.mean(2, keepdim=True)).square().mean((0, 1))


def estimate(scores: Tensor, residual: Tensor, count: int = CHECKED, seeds: int = 8) -> Discrepancy:
    checked = dealt(size_of(scores), count, seeds)
    return discrepancy(STEPS, residual[..., checked.instances], scores, checked)


@pytest.mark.parametrize(
    ("growth", "common", "noise"), [(0.5, 0.0, 0.1), (0.9, 0.0, 0.1), (0.25, 0.3, 0.1), (0.75, 0.0, 0.0)]
)
def test_the_standard_deviation_covers_the_error_as_often_as_it_says(
    growth: float, common: float, noise: float
) -> None:
    shares = []
    for seed in range(40):
        scores, error, residual = drawn(seed, growth, common, noise)
        missed = estimate(scores, residual)
        widened = heavier_tails(CHECKED)
        adjusted = error - error.mean(2, keepdim=True)
        for e, variance in ((error, missed.raw()), (adjusted, missed.adjusted())):
            z = e.abs() / variance.sqrt() / widened
            shares.append([float((z <= k).double().mean()) for k in (1, 2)])
    one, two = torch.tensor(shares).view(40, 2, 2).mean(0).T
    # 40 draws, each of a few independent scales: a standard error of about .015 and .008
    assert ((one - 0.68).abs() < 0.08).all(), one
    assert ((two - 0.95).abs() < 0.04).all(), two


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("freedom", [4.0, 50.0])
def test_noise_of_single_seeds_is_not_taken_for_an_error_that_all_share(noise: float, freedom: float) -> None:
    """Also where it has heavy tails: half the difference of two seeds says less there than the mean shows."""
    ratios = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(TESTS, LEFT_OUT, generator=g, dtype=torch.float64).expand(len(STEPS), -1, -1)
        error, own = (torch.randn(n, *scores.shape[1:], generator=g, dtype=torch.float64) for n in (1, 2))
        heavy = torch.distributions.Chi2(freedom)
        torch.manual_seed(seed)
        own = own * (freedom / heavy.sample(own.shape)).sqrt().double()
        missed = estimate(scores, (error + noise * own)[:, None].expand(-1, len(STEPS), -1, -1))
        ratios.append(missed.own.median())
    # the noise's variance in the seeds' mean, which a mean over many seeds doesn't have, is noise^2 / 2
    assert 0.6 < torch.stack(ratios).mean().sqrt() < 1.45


def test_the_noise_of_a_seed_that_all_its_runs_share_is_not_an_error_of_all_seeds() -> None:
    """Two seeds can't tell it from one; four groups with seeds of their own can."""
    found: dict[int, list[Tensor]] = {2: [], 8: []}
    for seed in range(40):
        scores, _, residual = drawn(seed, 0.5, 0.0, 0.1)
        g = torch.Generator().manual_seed(seed)
        for seeds, values in found.items():
            checked = dealt(size_of(scores), CHECKED, seeds)
            offset = torch.randn(2, 4, generator=g, dtype=torch.float64)[:, checked.group]
            there = residual[..., checked.instances] + offset[:, None, None]
            values.append(discrepancy(STEPS, there, scores, checked).common.mean())
    # of variance 1 each, and 1/2 for the mean over two
    assert torch.stack(found[8]).mean() < 0.1
    assert torch.stack(found[2]).mean() > 2 * torch.stack(found[8]).mean()


def test_where_noise_hides_the_error_its_variance_is_in_doubt() -> None:
    clear, hidden = [], []
    for seed in range(10):
        for noise, found in ((0.05, clear), (3.0, hidden)):
            scores, _, residual = drawn(seed, 0.5, 0.0, noise)
            missed = estimate(scores, residual)
            assert missed.doubt is not None
            found.append((missed.doubt / missed.own).median())
    assert torch.stack(clear).median() < 0.1
    assert torch.stack(hidden).median() > 0.4


def test_test_instances_and_checked_ones_have_scales_of_their_own() -> None:
    """Errors that differ by test and by left-out instance, where effects do not."""
    shares, ratios = [], []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(TESTS, LEFT_OUT, generator=g, dtype=torch.float64).expand(len(STEPS), -1, -1)
        of_test = (0.5 * torch.randn(TESTS, 1, generator=g, dtype=torch.float64)).exp()
        of_instance = (0.5 * torch.randn(LEFT_OUT, generator=g, dtype=torch.float64)).exp()
        error = of_test * of_instance * torch.randn(TESTS, LEFT_OUT, generator=g, dtype=torch.float64)
        missed = estimate(scores, error.expand(2, len(STEPS), -1, -1))
        checked = dealt(size_of(scores), CHECKED, 8).instances
        z = error.abs() / missed.raw()[0].sqrt() / heavier_tails(CHECKED)
        shares.append([float((z <= k).double().mean()) for k in (1, 2)])
        of_row = missed.own[0].mean(1).log()
        ratios.append(torch.corrcoef(torch.stack([of_row, of_test[:, 0].log()]))[0, 1])
        assert missed.own[0, :, checked].mean(0).std() > 0
    one, two = torch.tensor(shares).mean(0)
    assert abs(one - 0.68) < 0.08
    assert abs(two - 0.95) < 0.04
    assert torch.stack(ratios).mean() > 0.7


def test_what_an_instance_shows_beyond_the_usual_is_its_error_and_not_its_seeds_noise() -> None:
    found = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(TESTS, LEFT_OUT, generator=g, dtype=torch.float64)
        scores[:, 3] *= 3.0  # so that it is checked
        error = 0.3 * torch.randn(TESTS, LEFT_OUT, generator=g, dtype=torch.float64)
        error[:, 3] *= 10.0
        noise = torch.randn(2, TESTS, LEFT_OUT, generator=g, dtype=torch.float64)
        everywhere = [
            x[..., None, :, :].expand(*x.shape[:-2], len(STEPS), -1, -1) for x in (scores, error + noise)
        ]
        missed = estimate(*everywhere)
        assert missed.noise is not None
        found.append(
            torch.stack(
                [missed.own[-1, :, 3].mean() / 9.0, missed.noise[-1, 0, 3], missed.noise[-1, 0].median()]
            )
        )
    of_error, of_noise, usual = torch.stack(found).mean(0)
    assert 0.5 < of_error < 1.5
    assert of_noise < 0.4  # 0.5 of 9.5, but noise is expected to grow with effects
    assert usual > 0.5


def test_instances_are_dealt_to_groups_of_all_sizes_with_two_seeds_each() -> None:
    size = torch.arange(40.0)
    checked = dealt(size, 16, 10)
    assert torch.bincount(checked.group).tolist() == [4, 4, 4, 4]
    for g in range(4):
        mine = checked.instances[checked.group == g]
        assert mine.max() > 25
        assert mine.min() < 15
    assert len(set(checked.runs)) == 32
    assert checked.seeds == list(range(8))
    for k, (i, s) in enumerate(checked.runs):
        assert i == checked.instances[k % 16]
        assert s == 2 * checked.group[k % 16] + k // 16
    assert dealt(size, 16, 5).seeds == [0, 1, 2, 3]
    assert dealt(size, 16, 3).seeds == [0, 1]
    assert dealt(size, 6, 10).seeds == [0, 1]
    effects = torch.arange(32.0)[:, None, None]
    assert checked.by_instance(effects)[:, 0, 0].tolist() == torch.arange(32.0).view(2, 16).tolist()


def test_exact_predictions_have_no_error() -> None:
    scores, _, residual = drawn(0, 0.5, 0.0, 0.0)
    missed = estimate(scores, torch.zeros_like(residual))
    assert not missed.raw().any()
    assert not missed.adjusted().any()
    assert missed.doubt is not None
    assert not missed.doubt.any()


def test_an_error_of_all_instances_cancels_when_their_mean_is_subtracted() -> None:
    scores, _, residual = drawn(0, 0.5, 0.0, 0.0)
    offset = torch.full_like(residual, 2.0)
    missed = estimate(torch.ones_like(scores), offset)
    torch.testing.assert_close(missed.common, torch.full_like(missed.common, 4.0))
    assert missed.adjusted().max() < 1e-20


def test_the_unit_of_losses_changes_nothing() -> None:
    scores, _, residual = drawn(3, 0.5, 0.2, 0.1)
    one, other = estimate(scores, residual), estimate(1e-6 * scores, 1e-6 * residual)
    torch.testing.assert_close(other.own, 1e-12 * one.own, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(other.common, 1e-12 * one.common, rtol=1e-6, atol=1e-18)


def test_a_point_where_runs_diverged_has_no_variance_and_others_have() -> None:
    scores, _, residual = drawn(0, 0.5, 0.0, 0.1)
    residual[0, -1] = torch.inf
    missed = estimate(scores, residual)
    assert missed.own[-1].isnan().all()
    assert missed.raw()[:-1].isfinite().all()


def test_too_few_instances_say_nothing() -> None:
    scores, _, residual = drawn(0, 0.5, 0.0, 0.1)
    assert estimate(scores, residual, count=2).own.isnan().all()


def test_strata_hold_the_largest_and_all_sizes_and_stand_for_all() -> None:
    size = torch.arange(40.0)
    checked, weight = stratified(size, 8)
    assert checked[0] == 39
    assert checked.tolist() == sorted(checked.tolist(), reverse=True)
    assert checked[-1] < 5
    assert weight.sum() == pytest.approx(40)
    half, weight = stratified(size, 8, largest=4)
    assert half[:4].tolist() == [39, 38, 37, 36]
    assert weight.tolist() == [1, 1, 1, 1, 9, 9, 9, 9]
    assert stratified(size[:5], 8)[0].tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("freedom", [2, 4, 8, 13, 40])
def test_bars_are_widened_as_student_s_distribution_is(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert heavier_tails(freedom) == pytest.approx(stats.t.ppf(stats.norm.cdf(1), freedom), rel=1e-3)
