"""Calibration, error bars and recall of a screen, where the truth is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.audit.calibration import Errors, calibrated, errors, recall, sizes
from fimo.audit.verdicts import Estimates


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(effect: Tensor, sem: float, seed: int = 7) -> Estimates:
    n = len(effect)
    noisy = effect + sem * normal(n, seed=seed)
    return Estimates(
        noisy, torch.full((n,), sem, dtype=torch.float64), torch.full((n,), 5), torch.full((n,), 9.0)
    )


def test_the_line_is_ordinary_least_squares() -> None:
    x, y = normal(30), normal(30, seed=1)
    found = calibrated(x, measured(y, 1e-9))
    centred = x - x.mean()
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones(30, dtype=x.dtype)], 1), y[:, None]).solution[0]
    assert found.slope == pytest.approx(float(slope))
    residual = y - y.mean() - found.slope * centred
    assert found.slope_sem == pytest.approx(
        float((residual.square().sum() / 28 / centred.square().sum()) ** 0.5)
    )
    assert found.correlation == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))


def test_errors_of_scores_are_recovered_beneath_the_noise_of_measurement() -> None:
    score, size = 3 * normal(4000), 0.2 + normal(4000, seed=1).abs()
    effect = 0.8 * score + 1.5 * size * normal(4000, seed=2)
    found = errors(score, size, measured(effect, 2.0))
    assert found.slope == pytest.approx(0.8, abs=0.05)
    assert found.scale == pytest.approx(1.5, rel=0.1)


def test_rows_chosen_by_their_scores_do_not_bias_the_errors() -> None:
    score, size = normal(20000), torch.ones(20000, dtype=torch.float64)
    effect = score + 0.5 * normal(20000, seed=2)
    chosen = score.abs().argsort()[-2000:]
    found = errors(score[chosen], size[chosen], measured(effect[chosen], 0.1))
    assert found.slope == pytest.approx(1.0, abs=0.03)
    assert found.scale == pytest.approx(0.5, rel=0.1)


def test_sizes_are_between_a_rows_own_spread_and_the_common_one() -> None:
    found = sizes(torch.tensor([[1.0, 7.0]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[26.0, 74.0]], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("verified", [20, 40, 80])
def test_recall_is_estimated_without_bias(verified: int) -> None:
    estimates, truths, inside = [], [], 0
    for seed in range(30):
        score = normal(600, seed=3 * seed)
        effect = score + 0.5 * normal(600, seed=3 * seed + 1)
        rows = torch.cat([score.argsort()[:verified], score.argsort()[-verified:]])
        half = Errors(scales=torch.tensor([0.5], dtype=torch.float64))
        found = recall(
            score, torch.ones(600, dtype=torch.float64), half, rows,
            measured(effect[rows], 0.1, 3 * seed + 2), 20, torch.Generator().manual_seed(seed),
        )  # fmt: skip
        true = torch.cat([effect.argsort()[:20], effect.argsort()[-20:]])
        truths.append(float(torch.isin(true, rows).double().mean()))
        estimates.append(found.estimate)
        inside += found.lower - 1e-9 <= truths[-1] <= found.upper + 1e-9
    assert sum(estimates) / 30 == pytest.approx(sum(truths) / 30, abs=0.03)
    assert inside >= 22  # of 30, at 90 %


def test_what_measurement_can_not_tell_of_errors_is_not_taken_as_none() -> None:
    score, size = normal(600), 0.1 * torch.ones(600, dtype=torch.float64)
    rows = torch.cat([score.argsort()[:30], score.argsort()[-30:]])
    known = {}
    for sem in (0.01, 100.0):
        effects = measured(score[rows], sem)
        found = errors(score[rows], size[rows], effects)
        known[sem] = recall(score, size, found, rows, effects, 20, torch.Generator().manual_seed(0))
    assert known[0.01].lower > 0.9
    assert known[100.0].lower < 0.3
    assert known[100.0].upper - known[100.0].lower > 0.5
