"""Verdicts against dense formulas and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from fimo.audit.verdicts import (
    Estimates,
    chance_of_decision,
    estimated,
    false_discovery_rates,
    inverse_trigamma,
    looks,
    prior_variance,
)


def test_rates_are_benjamini_and_hochbergs() -> None:
    p = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    expected = stats.false_discovery_control(p.numpy(), method="bh")
    np.testing.assert_allclose(false_discovery_rates(p), expected)


def test_a_weight_is_what_a_p_value_is_divided_by() -> None:
    p = torch.tensor([0.01, 0.02, 0.5, 0.04], dtype=torch.float64)
    weight = torch.tensor([3.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    expected = stats.false_discovery_control((p / (weight / 2)).clamp(max=1).numpy(), method="bh")
    np.testing.assert_allclose(false_discovery_rates(p, weight), expected)


@pytest.mark.parametrize("x", [1e-8, 0.01, 0.3, 1.0, 4.0, 1000.0, 1e8])
def test_inverse_trigamma(x: float) -> None:
    assert inverse_trigamma(float(special.polygamma(1, x))) == pytest.approx(x, rel=1e-6)


def test_the_prior_of_variances_is_recovered() -> None:
    generator = np.random.default_rng(0)
    true = 3.0 * 8 / generator.chisquare(8, 4000)
    freedom = generator.choice([4, 9], 4000)
    squares = true * generator.chisquare(freedom)
    variance, prior_freedom = prior_variance(torch.from_numpy(squares), torch.from_numpy(freedom).double())
    assert variance == pytest.approx(3.0, rel=0.05)
    assert prior_freedom == pytest.approx(8.0, rel=0.15)


def test_equal_variances_are_pooled() -> None:
    changes = torch.randn(4, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimated(changes)
    assert float(found.freedom.min()) > 100
    torch.testing.assert_close(found.sem, torch.full_like(found.sem, 0.5), rtol=0.06, atol=0)


def test_without_a_prior_the_p_value_is_the_t_tests() -> None:
    changes = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    np.testing.assert_allclose(estimated(changes).p, stats.ttest_1samp(changes.numpy(), 0).pvalue)


def test_rows_with_fewer_seeds_and_rows_without_any_change() -> None:
    changes = torch.randn(5, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1
    changes[3:, 0] = torch.nan
    changes[1:, 1] = torch.nan
    changes[:, 2] = 0.0
    found = estimated(changes)
    assert found.seeds[:4].tolist() == [3, 1, 5, 5]
    assert found.mean[0] == pytest.approx(float(changes[:3, 0].mean()))
    assert found.sem[0] > found.sem[3]
    assert found.sem[1].isnan()
    assert found.p[1:3].tolist() == [1.0, 1.0]


def discoveries(draw: str, seeds: int, rows: int, generator: np.random.Generator) -> tuple[float, float]:
    """Return the share of wrong signs among the discoveries after several looks, and the share found."""
    effect = np.where(np.arange(rows) < rows // 5, 3.0, 0.0) * generator.choice([-1, 1], rows)
    scale = np.exp(0.5 * generator.standard_normal(rows))
    noise = {
        "normal": lambda: generator.standard_normal((seeds, rows)),
        "heavy": lambda: generator.standard_t(3, (seeds, rows)),
        # now and then a row counts ten times as much, as in a run's last batch
        "rare": lambda: (
            generator.standard_normal((seeds, rows))
            + 9 * effect * ((generator.random((seeds, rows)) < 0.05) - 0.05)
        ),
    }[draw]()
    changes = torch.from_numpy(effect + scale * noise)
    p = torch.ones(rows, dtype=torch.float64)
    rounds = looks(seeds)
    for until in rounds:
        p = torch.minimum(p, len(rounds) * estimated(changes[:until]).p)
    found = (false_discovery_rates(p.clamp(max=1)) <= 0.1).numpy()
    right = found & (np.sign(changes.numpy().mean(0)) == np.sign(effect))
    return (found & ~right).sum() / max(1, found.sum()), right.sum() / (rows // 5)


@pytest.mark.parametrize("draw", ["normal", "heavy", "rare"])
@pytest.mark.parametrize("seeds", [5, 10, 20])
def test_false_discoveries_stay_below_the_rate_with_looks_and_other_noise(draw: str, seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    shares = np.array([discoveries(draw, seeds, 100, generator) for _ in range(150)])
    wrong, right = shares.mean(0)
    assert wrong <= 0.1 + 2 * shares[:, 0].std() / 150**0.5
    assert right > 0.2


def test_the_chance_of_a_decision_is_its_frequency() -> None:
    """An effect is drawn from its flat prior given three seeds; then the other nine come."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean = torch.tensor([0.2, 0.9, -1.6], dtype=torch.float64)
    sem = torch.full((3,), 3**-0.5, dtype=torch.float64)
    effect = mean + sem * normal(40000, 3)
    final = (3 * mean + 9 * (effect + normal(40000, 3) / 3)) / 12
    bound = float(stats.norm.isf(0.01 / 2))
    frequency = ((final.abs() * 12**0.5) > bound).double().mean(0)
    given = Estimates(mean, sem, torch.full((3,), 3), torch.full((3,), torch.inf, dtype=torch.float64))
    found = chance_of_decision(given, 12, torch.full((3,), 0.01, dtype=torch.float64))
    torch.testing.assert_close(found, frequency, rtol=0, atol=0.01)


def test_looks_double() -> None:
    assert looks(10) == [3, 5, 10]
    assert looks(40) == [3, 5, 10, 20, 40]
    assert looks(2) == [2]
