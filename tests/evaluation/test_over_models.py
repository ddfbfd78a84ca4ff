from __future__ import annotations

import doctest

import pytest
import torch
from scipy import stats
from torch import Tensor

import fimo.evaluation.over_models as module
from fimo.errors import InputError
from fimo.evaluation.metrics import agreement
from fimo.evaluation.over_models import SeedSpread, probability_better, seed_spreads, variance_components

SDS = {"models": 0.3, "seeds": 0.5, "tests": 0.4, "models_tests": 0.2, "seeds_tests": 0.6}


def drawn(models: int, seeds: int, tests: int, repeats: int = 1) -> Tensor:
    """Values ``[n, K, S, J]`` that are sums of independent normal terms with deviations ``SDS``."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "models": (models, 1, 1),
        "seeds": (models, seeds, 1),
        "tests": (1, 1, tests),
        "models_tests": (models, 1, tests),
        "seeds_tests": (models, seeds, tests),
    }
    terms = (
        sd * torch.randn(repeats, *shapes[name], generator=generator, dtype=torch.float64)
        for name, sd in SDS.items()
    )
    return sum(terms, torch.zeros(()))


def spreads_of(values: Tensor) -> list[SeedSpread]:
    """Spreads of values ``[..., K, S, J]`` whose agreement is their mean over seeds."""
    seeds = values.shape[-2]
    mean = values.mean(-2)
    without = (seeds * mean[..., None, :] - values) / max(1, seeds - 1)  # [..., K, S, J]
    models = range(values.shape[-3])
    return [SeedSpread.of(mean[..., k, :], without[..., k, :, :].movedim(-2, 0)) for k in models]


def test_components_of_known_size_are_estimated_without_bias() -> None:
    found = variance_components(spreads_of(drawn(4, 3, 6, repeats=20_000)))
    for name, sd in SDS.items():
        estimates = getattr(found, name)
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - sd**2) < 4 * error, name
        assert error < 0.01


def test_the_parts_sum_to_the_variance_of_a_mean_drawn_anew() -> None:
    values = drawn(4, 3, 6, repeats=20_000)
    found = variance_components(spreads_of(values))
    torch.testing.assert_close(found.mean, values.mean((1, 2, 3)))
    parts = {name: sd**2 for name, sd in SDS.items()}
    exact = module.VarianceComponents(
        **{name: torch.tensor([value]) for name, value in parts.items()},
        mean=torch.zeros(1),
        counts=(4, 3),
        defined=torch.tensor([6]),
    ).of_mean()
    expected = {
        "models": parts["models"] / 4 + parts["models_tests"] / 24,
        "seeds": parts["seeds"] / 12 + parts["seeds_tests"] / 72,
        "tests": parts["tests"] / 6,
    }
    assert {name: float(value) for name, value in exact.items()} == pytest.approx(expected)
    assert sum(expected.values()) == pytest.approx(float(found.mean.var()), rel=0.03)


def test_the_parts_of_models_and_seeds_are_the_squared_standard_error_over_final_models() -> None:
    values = drawn(4, 3, 6, repeats=200)
    parts = variance_components(spreads_of(values)).of_mean()
    squared = values.mean((2, 3)).var(-1) / 4
    whole = parts["models"] > 0
    assert whole.sum() > 50
    torch.testing.assert_close((parts["models"] + parts["seeds"])[whole], squared[whole])


def test_mean_squares_are_those_of_a_plain_analysis_of_variance() -> None:
    values = drawn(2, 5, 7)[0]
    spread = spreads_of(values)[1]
    table = values[1]  # [S, J]
    rows, columns, all_of_it = table.mean(1), table.mean(0), table.mean()
    between = sum(7 * (row - all_of_it) ** 2 for row in rows) / 4
    rest = [(table[s, j] - rows[s] - columns[j] + all_of_it) ** 2 for s in range(5) for j in range(7)]
    assert float(spread.between_seeds) == pytest.approx(float(between))
    assert float(spread.residual) == pytest.approx(float(sum(rest)) / 24)


def test_an_undefined_test_instance_counts_as_if_it_were_not_there() -> None:
    values = drawn(3, 4, 8)
    holed = values.clone()
    holed[..., 5] = torch.nan
    kept = [j for j in range(8) if j != 5]
    found, expected = (variance_components(spreads_of(v)) for v in (holed, values[..., kept]))
    for name in (*SDS, "mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.defined.tolist() == [7]


def test_with_one_seed_its_part_is_counted_with_the_final_models() -> None:
    values = drawn(4, 1, 6, repeats=20_000)
    found = variance_components(spreads_of(values))
    assert found.seeds.isnan().all()
    assert found.seeds_tests.isnan().all()
    together = SDS["models"] ** 2 + SDS["seeds"] ** 2
    assert float(found.models.mean()) == pytest.approx(together, rel=0.05)
    parts = found.of_mean()
    assert parts["seeds"].isnan().all()
    torch.testing.assert_close(parts["models"], values.mean((2, 3)).var(-1) / 4)


def test_the_spread_over_seeds_is_that_of_agreements_measured_again_with_other_seeds() -> None:
    """The jackknife's variance is too large rather than too small (Efron and Stein, 1981)."""
    generator = torch.Generator().manual_seed(4)
    signal = torch.randn(5, 20, generator=generator)
    scores = {"method": signal + torch.randn(5, 20, generator=generator)}
    means, estimates = [], []
    for _ in range(300):
        raw = (signal + 2 * torch.randn(8, 5, 20, generator=generator))[:, None]
        found = agreement(scores["method"], raw.mean(0), "cosine")
        spread = seed_spreads(scores, raw, {"method": found}, "cosine", subtract_mean=False)["method"]
        means.append(found.mean())
        estimates.append(spread.between_seeds / (5 * 8))
    ratio = torch.stack(estimates).mean() / torch.stack(means).var()
    assert 0.9 < float(ratio) < 1.3


def test_the_spread_of_one_seed_is_unknown() -> None:
    raw = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = seed_spreads({"a": raw[0]}, raw, {"a": torch.ones(3, 4)}, "pearson")["a"]
    assert found.seeds == 1
    assert found.residual.shape == (3,)
    assert found.residual.isnan().all()


def test_what_has_no_variance_between_models_is_refused() -> None:
    one, *others = spreads_of(drawn(3, 4, 5))
    with pytest.raises(InputError, match=r"model\.seeds: components of variance take at least 2"):
        variance_components([one])
    with pytest.raises(InputError, match=r"further_training\.seeds: final models have \[3, 4\]"):
        variance_components([one, *spreads_of(drawn(2, 3, 5)), *others])


def test_the_probability_is_one_minus_the_paired_t_tests_p_value() -> None:
    values = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = probability_better(values)
    for n in range(2):
        for one in range(4):
            for other in range(4):
                if one == other:
                    assert float(found[n, one, one]) == 0.5
                    continue
                test = stats.ttest_rel(values[n, one], values[n, other], alternative="greater")
                assert float(found[n, one, other]) == pytest.approx(1 - test.pvalue)
    torch.testing.assert_close(found + found.mT, torch.ones_like(found))


def test_probabilities_of_methods_that_are_equally_good_are_uniform() -> None:
    """Of the mean, and of one more final model: how the posterior and the prediction are calibrated."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(4000, 2, 4, generator=generator) * torch.tensor([[0.1], [0.3]])
    assert stats.kstest(probability_better(values)[:, 0, 1], "uniform").pvalue > 0.01
    one_more = torch.randn(4000, 2, 1, generator=generator) * torch.tensor([[0.1], [0.3]])
    beyond = values - torch.stack([one_more[:, 0] - one_more[:, 1], torch.zeros(4000, 1)], 1)
    assert stats.kstest(probability_better(beyond, on_another=True)[:, 0, 1], "uniform").pvalue > 0.01
    assert stats.kstest(probability_better(beyond)[:, 0, 1], "uniform").pvalue < 1e-6


def test_final_models_without_a_value_of_either_method_do_not_count_for_the_two() -> None:
    values = torch.tensor(
        [[0.5, 0.6, 0.8, torch.nan], [0.4, 0.3, 0.6, 0.1], [0.2, torch.nan, torch.nan, 0.0]]
    )
    found = probability_better(values)
    assert float(found[0, 1]) == pytest.approx(float(probability_better(values[:2, :3])[0, 1]))
    assert found[0, 2].isnan()
    assert found[2, 0].isnan()
    assert found[1, 2].isfinite()


def test_a_method_that_is_better_by_the_same_amount_everywhere_surely_beats_the_other() -> None:
    values = torch.tensor([[0.5, 0.75], [0.25, 0.5], [0.25, 0.5]])
    assert probability_better(values).tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]


def test_rounding_makes_no_method_better() -> None:
    same = torch.tensor([[0.5, 0.75, 0.6]]).expand(2, 3) + torch.tensor([[1e-7], [0.0]])
    assert probability_better(same).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_the_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0
