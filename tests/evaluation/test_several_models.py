from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats

from fimo.errors import InputError
from fimo.evaluation import COLUMNS, Evaluation, assess
from fimo.evaluation.several_models import PAIRS, VARIANCE, over_models
from tests.evaluation.synthetic import synthetic


def evaluations(models: int = 3, seeds: int = 6, **changes: object) -> list[Evaluation]:
    """Evaluations of a good and a poor method on final models whose signal differs."""
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(models):
        sensitivity, signal = synthetic(seeds=seeds)
        own = 1e-4 * torch.randn(signal[0].shape, generator=generator)
        sensitivity = dataclasses.replace(sensitivity, raw=sensitivity.raw + own)
        good, poor = (
            (size * signal[0] / 1e-4 + torch.randn(signal[0].shape, generator=generator)).float()
            for size in (1.0, 0.3)
        )
        scores = {"good": ("FiMO", good), "poor": ("FiMO", poor)}
        found.append(assess(scores, sensitivity, resamples=0, seed_spread=True, **changes))
    return found


def test_means_and_errors_over_final_models_are_those_of_their_tables() -> None:
    each = evaluations()
    found = over_models(each)
    assert list(found.table) == COLUMNS
    pd.testing.assert_frame_equal(
        found.table[["method", "metric", "step", "seeds", "access", "followed_seeds"]],
        each[0].table[["method", "metric", "step", "seeds", "access", "followed_seeds"]],
    )
    means = pd.concat([e.table["mean"] for e in each], axis=1)
    ceilings = pd.concat([e.table["ceiling"] for e in each], axis=1)
    pd.testing.assert_series_equal(found.table["mean"], means.mean(axis=1), check_names=False)
    pd.testing.assert_series_equal(found.table["sem_models"], means.sem(axis=1), check_names=False)
    pd.testing.assert_series_equal(found.table["ceiling"], ceilings.mean(axis=1), check_names=False)
    assert set(found.table["final_models"]) == {3}
    row = found.table[(found.table.method == "good") & (found.table.metric == "pearson")].iloc[-1]
    over_tests = torch.stack([e.instances["good", "pearson", 6][-1] for e in each]).mean(0).double()
    assert row["sem"] == pytest.approx(float(over_tests.std() / len(over_tests) ** 0.5), rel=1e-5)


def test_one_final_model_has_no_error_over_final_models() -> None:
    table = evaluations(models=1)[0].table
    assert set(table["final_models"]) == {1}
    assert table["sem_models"].isna().all()


def test_each_two_methods_are_compared_on_the_same_final_models() -> None:
    each = evaluations()
    pairs = over_models(each).pairs
    assert list(pairs) == PAIRS
    assert len(pairs) == 3 * 4
    last = pairs[(pairs.metric == "cosine") & (pairs.epoch == 4)].iloc[0]
    assert (last["method"], last["other"]) == ("good", "poor")
    values = {m: [float(e.instances[m, "cosine", 6][-1].mean()) for e in each] for m in ("good", "poor")}
    test = stats.ttest_rel(values["good"], values["poor"], alternative="greater")
    assert last["probability"] == pytest.approx(1 - test.pvalue, rel=1e-4)
    assert 0.5 < last["probability_another"] < last["probability"]
    assert last["difference"] == pytest.approx(sum(values["good"]) / 3 - sum(values["poor"]) / 3, rel=1e-5)


def test_the_better_method_comes_first_whatever_their_order() -> None:
    each = evaluations()
    turned = [
        dataclasses.replace(e, table=e.table.sort_values("method", ascending=False, kind="stable"))
        for e in each
    ]
    columns = ["metric", "step", "method", "other", "difference", "probability"]
    first, second = (over_models(es).pairs.sort_values(["metric", "step"])[columns] for es in (each, turned))
    pd.testing.assert_frame_equal(first.reset_index(drop=True), second.reset_index(drop=True))


def test_the_parts_of_the_variance_are_those_that_the_means_over_final_models_show() -> None:
    each = evaluations(models=4)
    found = over_models(each)
    assert list(found.variance) == VARIANCE
    assert len(found.variance) == 3 * 2 * 4
    row = found.variance[(found.variance.method == "poor") & (found.variance.metric == "cosine")].iloc[-1]
    table = torch.stack([e.instances["poor", "cosine", 6][-1] for e in each]).double()
    between = float(table.mean(1).var())
    seeds = (row.variance_seeds + row.variance_seeds_tests / 5) / 6
    assert row.variance_models + row.variance_models_tests / 5 + seeds == pytest.approx(between)
    assert row.part_models + row.part_seeds == pytest.approx(between / 4)
    assert row.part_seeds == pytest.approx(seeds / 4)
    assert (row.final_models, row.seeds, row.tests) == (4, 6, 5)


def test_a_method_that_some_final_models_lack_is_left_out_and_named() -> None:
    one, two = evaluations(models=2)
    without = dataclasses.replace(two, table=two.table[two.table.method == "good"])
    found = over_models([one, without])
    assert set(found.table["method"]) == {"good"}
    assert found.pairs.empty
    assert any(note.startswith("poor: has no scores") for note in found.notes)
    with pytest.raises(InputError, match=r"model\.seeds: expected at least 2 evaluations but got 1"):
        over_models([one])


def test_the_tables_are_written(tmp_path: Path) -> None:
    over_models(evaluations()).save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["evaluation.csv", "evaluation_pairs.csv", "evaluation_variance.csv"]
    assert list(pd.read_csv(tmp_path / "evaluation.csv")) == COLUMNS
