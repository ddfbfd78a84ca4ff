"""Changes of distributions over seeds, against scipy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test, wasserstein_distance
from torch import Tensor

from fimo.errors import InputError
from fimo.further_training import distribution
from fimo.further_training.distribution import compared
from fimo.further_training.sensitivity import Sensitivity


def losses(seeds: int, tests: int = 3, left_out: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Losses of full runs ``[S, J]``, and of runs in which mean, spread and form differ ``[S, J, L]``."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(seeds, tests, dtype=torch.float64, generator=generator)
    noise = torch.randn(seeds, tests, left_out, dtype=torch.float64, generator=generator)
    scale = torch.tensor([0.1, 0.1, 1.5, 0.0], dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    return full, full[..., None] + shift[:left_out] + scale[:left_out] * noise


def variance_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(np.var(b, axis=axis, ddof=1) - np.var(a, axis=axis, ddof=1))


def mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(np.mean(b - a, axis=axis))


def distance(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(np.sort(a, axis=axis) - np.sort(b, axis=axis)).mean(axis=axis)


@pytest.mark.parametrize("seeds", [2, 5, 8])
def test_statistics_and_exact_p_values_are_scipys(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "BLOCK", 1000)  # some pairs at a time
    full, without = losses(seeds)
    found = compared(full, without)
    for j in range(3):
        for i in range(4):
            a, b = full[:, j].numpy(), without[:, j, i].numpy()
            assert float(found.mean[j, i]) == pytest.approx(np.mean(b - a), abs=1e-12)
            assert float(found.variance_full[j, i]) == pytest.approx(np.var(a, ddof=1))
            assert float(found.variance_without[j, i]) == pytest.approx(np.var(b, ddof=1))
            assert float(found.wasserstein[j, i]) == pytest.approx(wasserstein_distance(a, b), abs=1e-12)
            centred = (a - a.mean(), b - b.mean())
            for name, pair, statistic in (
                ("mean_p", (a, b), mean_difference),
                ("variance_p", centred, variance_difference),
                ("wasserstein_p", (a, b), distance),
            ):
                expected = permutation_test(
                    pair, statistic, permutation_type="samples", vectorized=True, n_resamples=np.inf,
                    alternative="greater",
                ).pvalue  # fmt: skip
                assert float(getattr(found, name)[j, i]) == pytest.approx(expected), (name, j, i)


def test_random_permutations_are_near_the_exact_p_values() -> None:
    full, without = losses(12)
    exact, drawn = compared(full, without, 4095), compared(full, without, 1999, seed=3)
    for name in ("mean_p", "variance_p", "wasserstein_p"):
        p = getattr(exact, name)
        error = (p * (1 - p) / 2000).sqrt() + 1 / 2000
        assert ((getattr(drawn, name) - p).abs() < 4.5 * error).all(), name
        assert float(getattr(drawn, name).min()) >= 1 / 2000


def test_under_no_effect_p_values_are_uniform() -> None:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(9, 1, 1, dtype=torch.float64, generator=generator)
    runs = common + torch.randn(9, 400, 2, dtype=torch.float64, generator=generator)
    found = compared(runs[..., 0], runs[..., 1:])
    for name in ("mean_p", "wasserstein_p", "variance_p"):
        p = getattr(found, name).flatten()
        for level in (0.05, 0.2, 0.5):
            share = float((p <= level).double().mean())
            slack = 4 * (level * (1 - level) / 400) ** 0.5
            # centring by each sample's own mean makes the variance's p-values a little conservative or not
            assert share < level + slack + 0.03 * (name == "variance_p"), (name, level)
            assert share > level - slack - 0.02, (name, level)


def test_what_changes_is_told_from_what_does_not() -> None:
    full, without = losses(14, seed=2)
    found = compared(full, without)
    assert (found.mean_p[:, 1] < 0.01).all()
    assert (found.wasserstein_p[:, 1] < 0.01).all()
    assert (found.variance_p[:, 1] > 0.01).all()
    assert (found.variance_without[:, 2] > found.variance_full[:, 2]).all()
    for name in ("mean", "wasserstein"):
        assert not getattr(found, name)[:, 3].any()
        assert (getattr(found, f"{name}_p")[:, 3] == 1).all()


def sensitivity(seeds: int = 5) -> Sensitivity:
    full, without = losses(seeds)
    raw = (without - full[..., None]).float()
    return Sensitivity(
        torch.stack([torch.zeros_like(raw), raw], 1),
        step=torch.tensor([4, 8]), epoch=torch.tensor([1, 2]), left_out=torch.tensor([3, 5, 6, 9]),
        test=torch.tensor([0, 2, 7]), seeds=torch.arange(seeds),
        full_losses=torch.stack([full, full], 1),
    )  # fmt: skip


def test_a_sensitivity_shows_its_distributions_as_a_table() -> None:
    found = sensitivity()
    table = found.distribution()
    assert list(table) == [
        "step", "epoch", "test", "train", "mean", "mean_p", "variance_full", "variance_without", "variance_p",
        "wasserstein", "wasserstein_p",
    ]  # fmt: skip
    assert table[["step", "epoch", "test", "train"]].iloc[5].tolist() == [8, 2, 2, 5]
    full, without = losses(5)
    expected = compared(full, without)
    np.testing.assert_allclose(table["wasserstein"], expected.wasserstein.flatten(), atol=1e-6)
    np.testing.assert_allclose(table["mean"], found.raw[:, 1].double().mean(0).flatten(), atol=1e-12)
    assert not found.distribution(0)["wasserstein"].any()
    rows = dataclasses.replace(
        found, left_out_row=torch.tensor([30, 50, 60, 90]), test_row=torch.tensor([1, 2, 3])
    ).distribution()
    assert rows[["test_row", "train_row"]].iloc[5].tolist() == [2, 50]


def test_what_has_no_distribution_is_refused() -> None:
    found = sensitivity()
    with pytest.raises(InputError, match="full runs' losses are not known"):
        dataclasses.replace(found, full_losses=None).distribution()
    with pytest.raises(InputError, match="point: expected -2 to 1 but got 2"):
        found.distribution(2)
    with pytest.raises(InputError, match="at least 2 but got 1"):
        sensitivity(1).distribution()
    with pytest.raises(InputError, match="permutations"):
        found.distribution(permutations=0)
