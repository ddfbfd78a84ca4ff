"""How far a score can be trusted, on synthetic sensitivities of known signal and noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fimo.evaluation import assess
from fimo.reporting import Results, write_report
from fimo.reporting.explorer import explorer_data
from fimo.reporting.trust import coverage, departures, share_of_ceiling_table, trusted_methods
from fimo.scores import Scores
from tests.evaluation.synthetic import synthetic
from tests.reporting.example import example

SEEDS, NOISE, SCALE = 25, 1.0, 1e-4


def run(error: float = NOISE / SEEDS**0.5, wrong: int | None = None) -> Results:
    """Return results with a method ``follows``: the signal with fresh noise, and its error bars."""
    sensitivity, signal = synthetic(seeds=SEEDS, noise=NOISE, left_out=60, scale=SCALE)
    fresh = torch.randn(signal.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scores = signal + SCALE * NOISE / SEEDS**0.5 * fresh
    if wrong is not None:
        scores[:, :, wrong] *= -3
    known = Scores(
        scores,
        sensitivity.left_out,
        "follows",
        predicts_loss_change=True,
        sem_adjusted=torch.full_like(scores, SCALE * error),
    )
    evaluation = assess({"follows": known}, sensitivity, resamples=0)
    return dataclasses.replace(
        example(),
        sensitivity=sensitivity,
        scores={"follows": known},
        evaluation=evaluation.table,
        slopes=evaluation.slopes,
        bootstrap=None,
    )


def test_intervals_of_the_right_size_cover_as_often_as_normal_errors_would() -> None:
    covered = coverage(run(), "follows", range(4))
    assert covered is not None
    assert covered == pytest.approx([0.954] * 4, abs=0.04)  # 300 pairs each; t rather than normal


def test_intervals_that_are_too_small_cover_less() -> None:
    right, small = coverage(run(), "follows"), coverage(run(error=0.0), "follows")
    assert right is not None
    assert small is not None
    assert sum(small) < sum(right) - 0.1  # erf(1) = 0.843 where half the variance is missing


def test_the_row_on_which_a_method_fails_is_named_first() -> None:
    results = run(wrong=17)
    first, second = departures(results, "follows")[:2]
    assert first.index == int(results.sensitivity.left_out[17])
    assert first.expected is not None
    assert first.difference > 3 * first.expected
    assert second.difference < first.difference / 3


def test_the_share_of_the_ceiling_is_the_agreement_divided_by_it() -> None:
    results = run()
    table = share_of_ceiling_table(results, "cosine")
    rows = results.evaluation.query(f"metric == 'cosine' and seeds == {SEEDS}")
    assert table["mean"].tolist() == pytest.approx((rows["mean"] / rows["ceiling"]).tolist())
    assert table["epoch"].tolist() == [1, 2, 3, 4]


def test_only_methods_that_predict_loss_changes_along_further_training_are_judged_so() -> None:
    assert trusted_methods(run()) == ["follows"]
    assert trusted_methods(example()) == []
    assert coverage(example(), "follows") is None


def test_the_page_says_it_and_error_bars_survive_the_runs_folder(tmp_path: Path) -> None:
    results = run(wrong=17)
    results.save(tmp_path, everything=True)
    loaded = Results.load(tmp_path)
    before, after = results.errors("follows"), loaded.errors("follows")
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    page = write_report(loaded, tmp_path / "report.html").read_text()
    assert "How far can these scores be trusted?" in page
    assert f"#{int(results.sensitivity.left_out[17])} (" in page
    assert "How far can these" not in write_report(example(), tmp_path / "other.html").read_text()


def test_errors_of_scores_without_an_axis_of_amounts_are_shown_as_they_are_judged() -> None:
    results = example()
    known = results.scores["datainf"]
    bars = torch.rand_like(known.values)
    scores = {**results.scores, "datainf": dataclasses.replace(known, sem=bars, sem_adjusted=2 * bars)}
    results = dataclasses.replace(results, scores=scores)
    found = results.errors("datainf")
    assert found is not None
    assert torch.equal(found, bars)  # no mean is subtracted from what is no change after further training
    shown = explorer_data(results)["tests"][1]
    place = results.sensitivity.test.tolist().index(shown["index"])
    assert shown["errors"]["datainf"] == pytest.approx(bars[place].tolist(), rel=1e-3)
    assert set(shown["errors"]) == {"datainf"}
