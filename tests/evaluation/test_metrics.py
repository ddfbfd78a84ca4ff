from __future__ import annotations

import doctest

import pytest
import torch
from scipy import stats
from torchmetrics.functional import (
    cosine_similarity,
    kendall_rank_corrcoef,
    pearson_corrcoef,
    spearman_corrcoef,
)

import fimo.evaluation.metrics as module
from fimo.errors import InputError
from fimo.evaluation import METRICS, agreement
from fimo.evaluation.metrics import mean_and_sem, ranks
from tests.evaluation.synthetic import synthetic

PLAIN = {
    "cosine": lambda u, v: cosine_similarity(u[None], v[None], reduction="none")[0],
    "spearman": spearman_corrcoef,
    "pearson": pearson_corrcoef,
    "kendall": kendall_rank_corrcoef,
}


@pytest.mark.parametrize("metric", METRICS)
def test_each_value_is_torchmetrics_of_that_pair_of_vectors(metric: str) -> None:
    sensitivity, signal = synthetic()
    values = agreement(signal[1], sensitivity.sensitivity, metric)
    assert values.shape == (4, 5)
    for e in range(4):
        for j in range(5):
            # torchmetrics' own guards against division by zero would move values of size 1e-4
            pair = signal[1, j].float() * 1e4, sensitivity.sensitivity[e, j] * 1e4
            torch.testing.assert_close(values[e, j], PLAIN[metric](*pair), atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_that_follow_further_training_meet_their_own_evaluation_point(metric: str) -> None:
    sensitivity, _ = synthetic()
    perfect = agreement(sensitivity.sensitivity, sensitivity.sensitivity, metric)
    torch.testing.assert_close(perfect, torch.ones(4, 5))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-36, 1e30])
def test_the_scale_of_scores_does_not_matter(metric: str, scale: float) -> None:
    sensitivity, signal = synthetic()
    expected = agreement(signal, sensitivity.sensitivity, metric)
    torch.testing.assert_close(agreement(signal * scale, sensitivity.sensitivity * 1e-30, metric), expected)


def test_ties_share_the_mean_of_their_ranks() -> None:
    values = torch.randint(0, 5, (40, 17), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.tensor(stats.rankdata(values.numpy(), axis=-1)).double()  # float32 since SciPy 1.18
    torch.testing.assert_close(ranks(values.double()), expected)
    torch.testing.assert_close(ranks(values), expected.float())


@pytest.mark.parametrize("metric", METRICS)
def test_constant_and_non_finite_vectors_are_undefined_and_others_are_not(metric: str) -> None:
    sensitivity, signal = synthetic()
    scores = signal[0].clone()
    scores[1] = 0.0
    scores[2, 3] = torch.nan
    undefined = agreement(scores, sensitivity.sensitivity, metric).isnan()
    assert undefined.tolist() == [[False, True, True, False, False]] * 4


def test_a_vector_of_equal_numbers_is_constant_whatever_rounding_does_to_its_mean() -> None:
    sensitivity, signal = synthetic()
    scores = torch.full_like(signal[0], 0.1)
    assert agreement(scores, sensitivity.sensitivity, "pearson").isnan().all()
    assert agreement(scores, sensitivity.sensitivity, "spearman").isnan().all()
    assert not agreement(scores, sensitivity.sensitivity, "cosine").isnan().any()


@pytest.mark.parametrize("most", [1, 500, 2**22])
def test_kendalls_tau_is_scipys_with_ties_and_undefined_where_a_vector_is_constant(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAIRS", most)  # pairs held at once: no value depends on it
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randint(0, 4, (6, 17), generator=generator).float() for _ in range(2))
    u[3] = 2.0
    found = agreement(u, v[None], "kendall")[0]
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(u.numpy(), v.numpy(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected).float(), equal_nan=True, atol=1e-6, rtol=0)
    assert found.isnan().tolist() == [False, False, False, True, False, False]


def test_mean_and_sem_are_over_defined_values() -> None:
    nan = torch.nan
    values = torch.tensor([[1.0, 2.0, nan, 4.0], [nan, nan, nan, 1.0], [2.0, nan, nan, 5.0]])
    mean, sem = mean_and_sem(values)
    torch.testing.assert_close(mean, torch.tensor([7 / 3, 1.0, 3.5]))
    assert sem[0].item() == pytest.approx(stats.sem([1.0, 2.0, 4.0]))
    assert sem[1].isnan()
    assert sem[2].item() == pytest.approx(stats.sem([2.0, 5.0]))


def test_wrong_shapes_and_metrics_are_refused_by_name() -> None:
    sensitivity, signal = synthetic()
    with pytest.raises(InputError, match=r"scores: expected \[5, 30\] or \[4, 5, 30\] but got \[5, 29\]"):
        agreement(signal[0, :, 1:], sensitivity.sensitivity)
    with pytest.raises(InputError, match=r"evaluation\.metrics: expected one of cosine, spearman, pearson"):
        agreement(signal, sensitivity.sensitivity, "hoeffding")  # type: ignore[arg-type]


def test_the_docstring_s_example_is_true() -> None:
    assert doctest.testmod(module).failed == 0
