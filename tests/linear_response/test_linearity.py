"""The error that seeds share, estimated from a few real runs, against errors that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.linear_response.linearity import Discrepancy, discrepancy, heavier_tails, stratified

STEPS = [1, 2, 4, 8, 16]
TESTS, LEFT_OUT, CHECKED = 12, 40, 8


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


def estimate(scores: Tensor, residual: Tensor, count: int = CHECKED) -> Discrepancy:
    size = (scores - scores.mean(2, keepdim=True)).square().mean((0, 1))
    checked, weight = stratified(size, count)
    return discrepancy(STEPS, residual[..., checked], scores, checked, weight)


@pytest.mark.parametrize(
    ("growth", "common", "noise"), [(0.5, 0.0, 0.1), (1.0, 0.0, 0.1), (0.25, 0.3, 0.1), (0.75, 0.0, 0.0)]
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


def test_noise_of_a_seed_is_not_taken_for_an_error_that_all_share() -> None:
    without, much = [], []
    for seed in range(20):
        for noise, found in ((0.05, without), (0.6, much)):
            scores, _, residual = drawn(seed, 0.5, 0.0, noise)
            found.append(estimate(scores, residual).own.mean())
    # the noise's own variance in the seeds' mean is twice that of the error
    assert torch.stack(much).mean() < 2 * torch.stack(without).mean()


def test_exact_predictions_have_no_error() -> None:
    scores, _, residual = drawn(0, 0.5, 0.0, 0.0)
    missed = estimate(scores, torch.zeros_like(residual))
    assert not missed.raw().any()
    assert not missed.adjusted().any()


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


@pytest.mark.parametrize("freedom", [4, 5, 8, 13, 40])
def test_bars_are_widened_as_student_s_distribution_is(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    exact = [stats.t.ppf(stats.norm.cdf(z), freedom) / z for z in (1, 2)]
    assert heavier_tails(freedom) == pytest.approx(sum(exact) / 2, rel=0.02)
