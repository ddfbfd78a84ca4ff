from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fimo.errors import InputError
from fimo.evaluation import agreement, assess, evaluate, noise_ceiling, noise_ceilings, seeds_for
from fimo.evaluation.assessment import default_seed_counts, seed_subsets
from fimo.evaluation.bootstrap import bootstrap_agreement
from fimo.evaluation.slope import fitted_slope
from fimo.further_training.sensitivity import adjust
from fimo.scores import Access, Scores
from tests.evaluation.synthetic import synthetic

CONTRACT = [
    "method", "access", "metric", "step", "epoch", "seeds", "mean", "sem", "ceiling", "ceiling_lower",
    "followed_seeds",
    "final_models",
    "sem_models",
]  # fmt: skip


def test_the_table_has_the_contract_s_columns_and_a_row_for_each_case() -> None:
    sensitivity, signal = synthetic()
    table = evaluate({"early": ("FiMO", signal[0]), "follows": ("TAA", signal)}, sensitivity)
    assert list(table.columns) == CONTRACT
    counts = [1, 2, 5, 6]
    assert len(table) == 2 * 3 * 4 * len(counts)
    assert not table.duplicated(["method", "metric", "step", "seeds"]).any()
    assert set(table.seeds) == set(counts)
    assert set(zip(table.step, table.epoch, strict=True)) == {(8, 1), (16, 2), (24, 3), (32, 4)}
    assert table.groupby("method").access.unique().map(list).to_dict() == {
        "early": ["FiMO"],
        "follows": ["TAA"],
    }


def test_means_and_sems_are_those_of_the_test_instances() -> None:
    sensitivity, signal = synthetic()
    table = evaluate({"early": ("FiMO", signal[0])}, sensitivity, metrics=["spearman"])
    values = agreement(signal[0], sensitivity.sensitivity, "spearman").numpy()
    full = table[table.seeds == 6]
    np.testing.assert_allclose(full["mean"], values.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(full["sem"], values.std(-1, ddof=1) / np.sqrt(5), rtol=1e-5)
    ceiling = noise_ceiling(sensitivity.raw, "spearman")[:, -1]
    np.testing.assert_allclose(full["ceiling"], ceiling, rtol=1e-5)


def test_the_ceilings_are_in_the_table_and_too_low_a_one_is_called_not_enough_seeds() -> None:
    sensitivity, signal = synthetic(seeds=4, noise=6.0, tests=40)
    result = assess({"m": ("FiMO", signal[0])}, sensitivity, resamples=0)
    for metric in ("cosine", "spearman"):
        found = noise_ceilings(sensitivity.raw, metric, seed_counts=[1, 2, 4])
        rows = result.table[result.table.metric == metric]
        for column, values in (("ceiling", found.upper), ("ceiling_lower", found.lower)):
            table = rows.pivot(index="step", columns="seeds", values=column)
            np.testing.assert_allclose(table, values, rtol=1e-3)
    last = result.table.query("metric == 'cosine' and seeds == 4 and step == 32")["ceiling"].item()
    assert 0 < last < 0.5
    expected = f"ceiling (cosine) after all further training is {last:.2f}"
    assert [note for note in result.notes if "not enough seeds" in note and expected in note]
    assert f"about {seeds_for(last, 4)} would reach 0.9" in result.notes[0]
    sensitivity, signal = synthetic(noise=0.5)
    assert assess({"m": ("FiMO", signal)}, sensitivity, resamples=0).notes == ()


def test_one_seed_s_agreement_is_the_mean_over_each_seed_alone() -> None:
    sensitivity, signal = synthetic()
    table = evaluate({"early": ("FiMO", signal[0])}, sensitivity, metrics=["cosine"], seed_counts=[1])
    alone = torch.stack([agreement(signal[0], one, "cosine") for one in sensitivity.adjusted]).mean(0)
    np.testing.assert_allclose(table["mean"], alone.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(table["sem"], alone.std(-1) / np.sqrt(5), rtol=1e-5)


def test_more_seeds_agree_better_with_the_truth() -> None:
    sensitivity, signal = synthetic(seeds=10, tests=20, noise=2.0)
    table = evaluate({"truth": ("FiMO", signal)}, sensitivity)
    by_count = table[table.step == 32].pivot(index="metric", columns="seeds", values="mean")
    assert (by_count.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)


def test_undefined_values_are_counted_and_reported() -> None:
    sensitivity, signal = synthetic()
    constant = signal[0].clone()
    constant[2] = 0.0
    result = assess({"partly": ("FiMO", constant)}, sensitivity, metrics=["pearson"], resamples=3)
    assert result.bootstrap.undefined.tolist() == [1, 1, 1, 1]
    assert result.bootstrap.instances.tolist() == [5, 5, 5, 5]
    assert result.table["mean"].notna().all()
    assert any("partly: pearson is undefined for 4 of 20" in note for note in result.notes)


def test_one_seed_is_evaluated_without_a_ceiling_and_says_so() -> None:
    sensitivity, signal = synthetic(seeds=1)
    result = assess({"early": ("FiMO", signal[0])}, sensitivity, resamples=5)
    assert set(result.table.seeds) == {1}
    assert result.table.ceiling.isna().all()
    assert result.table["mean"].notna().all()
    assert any("one seed" in note for note in result.notes)


def test_slopes_say_by_how_much_scores_miss_the_size_of_the_loss_change() -> None:
    sensitivity, signal = synthetic(noise=0.01)
    torch.testing.assert_close(fitted_slope(signal, signal + 1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(fitted_slope(signal / 10, signal), torch.full((4,), 10.0).double())
    expected = np.polyfit(signal[0].flatten() - signal[0].mean(-1, keepdim=True).expand(5, 30).flatten(),
                          sensitivity.sensitivity[2].double().flatten(), 1)[0]  # fmt: skip
    assert fitted_slope(signal[0], sensitivity.sensitivity)[2].item() == pytest.approx(expected, rel=1e-5)
    result = assess(
        {"a": ("FiMO", signal / 2), "b": ("FiMO", signal)},
        sensitivity,
        estimate_loss_change=["a"],
        resamples=0,
    )
    assert set(result.slopes.method) == {"a"}
    np.testing.assert_allclose(result.slopes.slope, 2, rtol=0.01)


def test_a_prediction_of_the_raw_changes_is_adjusted_as_they_are() -> None:
    sensitivity, signal = synthetic(noise=0.0)
    raw_prediction = signal + 5 * signal.abs().max()  # right but for what the adjustment takes away
    scores = {"predicts": ("FiMO", raw_prediction), "frozen": ("FiMO", raw_prediction[-1])}

    def last(names: list[str]) -> pd.Series:
        table = assess(scores, sensitivity, ["cosine"], [6], estimate_loss_change=names, resamples=0).table
        return table[table.step == 32].set_index("method")["mean"]

    assert last(["predicts"])["predicts"] == pytest.approx(1, abs=1e-4)
    assert last([])["predicts"] < 0.3
    assert last(["frozen"])["frozen"] == pytest.approx(last([])["frozen"]), "judged as the paper does"


def test_bootstrap_intervals_cover_the_expected_agreement_about_as_often_as_they_say() -> None:
    """60 experiments; the expected agreement is their mean. Both seeds and test instances are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    strength = 2 * torch.rand(60, 12, 1, generator=generator)  # test instances differ in their signal
    scores = torch.randn(60, 12, 20, generator=generator)
    noise = torch.randn(60, 8, 1, 12, 20, generator=generator)
    raws = (strength * scores)[:, None, None] + 1.5 * noise
    expected = torch.stack(
        [agreement(s, adjust(raw.mean(0)), "pearson").mean() for s, raw in zip(scores, raws, strict=True)]
    ).mean()
    inside = []
    for s, raw in zip(scores, raws, strict=True):
        low, high = bootstrap_agreement({"m": s}, raw, "pearson", resamples=60, generator=generator)["m"]
        inside.append(bool(low <= expected <= high))
    assert 0.85 <= np.mean(inside) <= 1.0


def test_the_same_seed_gives_the_same_table() -> None:
    sensitivity, signal = synthetic(seeds=9)
    first, second = (assess({"m": ("FiMO", signal)}, sensitivity, resamples=4) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.bootstrap, second.bootstrap)


def test_subsets_hold_distinct_seeds_and_cover_the_number_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    assert seed_subsets(4, 1, 10, generator) == [[0], [1], [2], [3]]
    subsets = seed_subsets(20, 5, 10, generator)
    assert len(subsets) >= 10
    assert all(len(set(s)) == 5 for s in subsets)
    assert not {*subsets[0]} & {*subsets[1]}, "pieces of one order are disjoint"
    assert len(seed_subsets(3, 2, 10, generator)) <= 3, "no subset counts twice"


@pytest.mark.parametrize(
    ("seeds", "counts"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 5]), (30, [1, 2, 5, 10, 20, 30])]
)
def test_default_numbers_of_seeds_end_with_all(seeds: int, counts: list[int]) -> None:
    assert default_seed_counts(seeds) == counts


def test_bad_input_is_named() -> None:
    sensitivity, signal = synthetic()
    with pytest.raises(InputError, match=r"scores of m: expected \[5, 30\]"):
        evaluate({"m": ("FiMO", signal[:, :3])}, sensitivity)
    with pytest.raises(InputError, match="no scores"):
        evaluate({}, sensitivity)
    with pytest.raises(InputError, match=r"evaluation.seed_counts"):
        evaluate({"m": ("FiMO", signal)}, sensitivity, seed_counts=[9])


def test_saving_writes_the_contract_s_file(tmp_path: Path) -> None:
    sensitivity, signal = synthetic()
    result = assess({"m": ("FiMO", signal)}, sensitivity, estimate_loss_change=["m"], resamples=2)
    result.save(tmp_path)
    assert list(pd.read_csv(tmp_path / "evaluation.csv").columns) == CONTRACT
    assert len(pd.read_csv(tmp_path / "evaluation_bootstrap.csv")) == 12
    assert len(pd.read_csv(tmp_path / "evaluation_slopes.csv")) == 4


def test_the_table_says_whether_a_method_followed_the_gold_standard_s_own_seeds() -> None:
    sensitivity, signal = synthetic()
    scores = dict.fromkeys(("own", "shared", "frozen"), ("TAA", signal))
    followed = {"own": [6, 7], "shared": [5, 6]}

    def column(**more: object) -> dict[str, str]:
        table = evaluate({**scores, "early": ("FiMO", signal[0])}, sensitivity, ["cosine"], [6], **more)  # type: ignore[arg-type]
        return dict(zip(table["method"], table["followed_seeds"], strict=True))

    expected = {"own": "other", "shared": "same", "frozen": "none", "early": "none"}
    assert column(followed=followed) == expected
    assert column() == {"own": "unknown", "shared": "unknown", "frozen": "unknown", "early": "none"}


def test_python_and_the_command_line_judge_a_following_method_alike() -> None:
    sensitivity, signal = synthetic(noise=0.0)
    raw = {"follows": ("TAA", signal + 5 * signal.abs().max())}
    command_line = assess(raw, sensitivity, estimate_loss_change=["follows"], resamples=0).table
    pd.testing.assert_frame_equal(evaluate(raw, sensitivity), command_line)
    assert evaluate(raw, sensitivity, ["cosine"])["mean"].min() == pytest.approx(1, abs=1e-4)
    unadjusted = evaluate(raw, sensitivity, ["cosine"], estimate_loss_change=[])
    assert unadjusted["mean"].max() < 0.3, "as a method is judged that gives no loss changes"


def test_scores_say_for_themselves_what_pairs_need_arguments_for() -> None:
    sensitivity, signal = synthetic()
    left_out, raw = sensitivity.left_out, signal + 0.01 * signal[..., :1]  # unadjusted
    values = {"early": signal[0], "follows": raw}
    pairs = {"early": ("CPA", values["early"]), "follows": ("TAA", values["follows"])}
    scores = {
        "early": Scores(values["early"], left_out, access=Access.CHECKPOINTS),
        "follows": Scores(
            values["follows"],
            left_out,
            access=Access.TRAINING_ALGORITHM,
            predicts_loss_change=True,
            followed=(0, 7),
        ),
    }
    expected = assess(
        pairs, sensitivity, estimate_loss_change=["follows"], followed={"follows": [0, 7]}, resamples=2
    )
    found = assess(scores, sensitivity, resamples=2)
    pd.testing.assert_frame_equal(found.table, expected.table)
    pd.testing.assert_frame_equal(found.slopes, expected.slopes)
    assert set(found.table[found.table["method"] == "follows"]["followed_seeds"]) == {"same"}


def test_scores_of_all_training_instances_are_judged_on_those_left_out() -> None:
    sensitivity, signal = synthetic()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    values = torch.zeros(len(signal[0]), 100, dtype=signal.dtype)
    values[:, [order.tolist().index(i) for i in sensitivity.left_out.tolist()]] = signal[0]
    found = evaluate({"m": Scores(values, order)}, sensitivity)
    pd.testing.assert_frame_equal(found, evaluate({"m": ("FiMO", signal[0])}, sensitivity))
    with pytest.raises(InputError, match=r"^scores of m: there are no scores of the training instances"):
        evaluate({"m": Scores(values[:, :50], order[:50])}, sensitivity)
    with pytest.raises(InputError, match=r"^scores of m: they explain other test instances"):
        evaluate({"m": Scores(values, order, test=sensitivity.test + 1)}, sensitivity)


def test_scores_of_single_instances_are_summed_for_a_sensitivity_of_groups() -> None:
    sensitivity, signal = synthetic()
    members = torch.stack([sensitivity.left_out, sensitivity.left_out + 1], 1)
    members[1::2, 1] = -1
    groups = dataclasses.replace(sensitivity, groups=members)
    values = torch.zeros(len(signal[0]), 100, dtype=signal.dtype)
    values[:, sensitivity.left_out] = signal[0] - 1.0
    values[:, sensitivity.left_out[::2] + 1] = 1.0
    values[:, sensitivity.left_out[1::2]] += 1.0
    found = evaluate({"m": Scores(values, torch.arange(100))}, groups)
    pd.testing.assert_frame_equal(found, evaluate({"m": ("FiMO", signal[0])}, sensitivity), rtol=1e-9)
