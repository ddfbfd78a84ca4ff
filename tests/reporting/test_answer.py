"""The first screen of a study and of an audit says what is there, and what it can't know."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from fimo.data.display import Display
from fimo.models.measured import Measured
from fimo.reporting.answer import Answer, NamedRow, listed
from fimo.reporting.audit_answer import audit_answer
from fimo.reporting.class_effects import class_effects
from fimo.reporting.findings import influences
from fimo.reporting.instance_lines import folded, line
from fimo.reporting.measured_rows import measured_rows
from fimo.reporting.plain_text import as_text
from fimo.reporting.study_answer import best_method, study_answer
from tests.reporting.audit_example import example_audit, example_run
from tests.reporting.example import example
from tests.reporting.test_report import following_the_same


def test_verdicts_of_a_study_are_those_of_benjamini_and_hochberg() -> None:
    run = example(noise=0.3)
    rows = measured_rows(run)
    per_seed = run.sensitivity.adjusted[:, -1].double().mean(1).numpy()
    p = stats.ttest_1samp(per_seed, 0).pvalue
    order = np.argsort(p)
    passing = np.flatnonzero(p[order] <= 0.1 * np.arange(1, len(p) + 1) / len(p))
    clear = set(order[: passing[-1] + 1])
    assert 0 < len(clear) < len(p), "both kinds are there"
    assert set(np.flatnonzero(rows["verdict"] != "unclear")) == clear
    for row in rows.itertuples():
        assert row.verdict in ("unclear", "helpful" if row.effect > 0 else "harmful")


def test_a_study_s_answer_counts_what_is_clear_and_names_the_method_that_predicts_best() -> None:
    run = example()
    answer, counts = study_answer(run), measured_rows(run)["verdict"].value_counts()
    assert answer.verdict[0].startswith("Measured: 30 of 397 training rows")
    assert f"{counts['helpful']} helpful and {counts['harmful']} harmful" in answer.verdict[1]
    assert answer.others[0].startswith("follows predicts the measured effects with a cosine of")
    effects = [row.effect for row in answer.helpful]
    assert effects == sorted(effects, reverse=True)
    assert all(row.effect < 0 for row in answer.harmful)


def test_where_a_larger_value_is_better_rows_that_lower_it_when_removed_help() -> None:
    run = example(measured=Measured("correct probability", -1))
    answer, rows = study_answer(run), measured_rows(run)
    assert set(rows.loc[rows["effect"] < 0, "verdict"]) == {"helpful", "unclear"}
    assert all(row.effect < 0 for row in answer.helpful)
    assert all(row.effect > 0 for row in answer.harmful)
    assert (answer.effects, answer.helps) == (
        "mean test correct probability",
        "the correct probability falls",
    )
    assert any("the test correct probability ends higher" in said for said in answer.do)
    helpful, harmful = influences(run)
    assert {row.effect < 0 for row in helpful} == {row.effect > 0 for row in harmful} == {True}
    plain = study_answer(example())
    assert [row.name for row in answer.helpful] == [row.name for row in plain.harmful]


def test_an_audit_of_a_probability_names_it_and_the_rows_that_it_falls_without() -> None:
    run = example_run("classes")
    rows = run.audit.rows.replace({"verdict": {"helpful": "harmful", "harmful": "helpful"}})
    about = {**run.audit.summary, "measured": {"name": "correct probability", "better": -1}}
    turned = dataclasses.replace(run, audit=dataclasses.replace(run.audit, rows=rows, summary=about))
    answer, plain = audit_answer(turned), audit_answer(run)
    assert [row.name for row in answer.helpful] == [row.name for row in plain.harmful]
    assert "Change of the mean test correct probability" in as_text(answer)
    assert any("the test correct probability rises without" in said for said in answer.do)


def test_pictures_that_are_left_are_not_called_a_table() -> None:
    audit = example_audit("classes")
    for cleaned, said in (
        (audit.rows[["row", "id"]], "row and id of each row that is left without what was found"),
        (audit.rows[["row", "id", "target"]], "your table without what was found"),
    ):
        run = dataclasses.replace(example_run("classes"), audit=dataclasses.replace(audit, cleaned=cleaned))
        assert audit_answer(run).files["cleaned.csv"] == said


def test_with_one_seed_no_row_is_called_clear() -> None:
    answer = study_answer(example(seeds=1))
    assert "can't be told" in answer.verdict[1]
    assert {row.verdict for row in (*answer.helpful, *answer.harmful)} == {"unclear"}
    assert any("one seed" in s for s in answer.distrust)


def test_a_method_that_knows_the_measurement_s_noise_is_not_called_the_best() -> None:
    run = following_the_same()
    assert best_method(example())["method"] == "follows"
    assert best_method(run)["method"] == "datainf", "the next best"
    only = run.evaluation[run.evaluation["method"] == "follows"]
    said = study_answer(dataclasses.replace(run, evaluation=only)).others
    assert "so this is too high" in said[0]


def test_a_study_says_what_to_distrust() -> None:
    bad = example(final_model={"train_loss": 1.0, "test_loss": 1.2, "baseline_loss": 1.02}, noise=20.0)
    said = " ".join(study_answer(bad).distrust)
    for reason in ("no better than", "not enough seeds", "Not run, or failed: exact"):
        assert reason in said


def by_class(spread: float, n: int = 80) -> tuple[np.ndarray, list[str]]:
    """Return effects of two classes two apart, and the classes."""
    rng = np.random.default_rng(0)
    classes = ["a" if k % 2 else "b" for k in range(n)]
    return np.array([1.0 if c == "a" else -1.0 for c in classes]) + spread * rng.standard_normal(n), classes


def test_effects_that_follow_one_class_are_found_and_ranked_within_it() -> None:
    effects, classes = by_class(0.2)
    found = class_effects(effects, classes)
    assert found is not None
    table = np.array(classes)
    inside = sum(((effects[table == c] - effects[table == c].mean()) ** 2).sum() for c in "ab")
    share = 1 - (inside / 78) / effects.var(ddof=1)
    assert found.share == pytest.approx(share)
    assert (found.follow, found.helpful, found.harmful) == (True, "a", "b")
    within = found.within(effects, classes)
    assert within[table == "a"].mean() == pytest.approx(0, abs=1e-12)
    names = [f"r{k}" for k in range(len(effects))]
    assert f"r{within.argmax()}, " in found.leading(effects, classes, names)
    assert found.leading(effects, classes, names).endswith(f"{names[np.argsort(within)[2]]} harm most.")
    assert np.argsort(within[table == "a"]).tolist() == np.argsort(effects[table == "a"]).tolist()


def test_ends_of_one_class_each_do_not_make_effects_follow_classes_that_explain_little() -> None:
    one = np.r_[100.0, np.ones(9), 1e-3 * np.arange(30)]  # a few rows have all the effect
    found = class_effects(np.r_[one, -one], ["a"] * 40 + ["b"] * 40)
    assert found is not None
    assert (found.helpful, found.harmful) == ("a", "b")
    assert found.share < 0.1
    assert not found.follow


@pytest.mark.parametrize("seed", range(20))
def test_effects_without_a_class_s_part_are_not_said_to_follow_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = class_effects(rng.standard_t(3, 60), rng.choice(["a", "b", "c"], 60).tolist())
    assert found is not None
    assert not found.follow


def test_of_regression_targets_and_single_classes_nothing_is_said_of_classes() -> None:
    effects, _ = by_class(0.2)
    assert class_effects(effects, [str(k) for k in range(len(effects))]) is None
    assert class_effects(effects, ["a"] * len(effects)) is None
    assert class_effects(np.ones(80), by_class(1)[1]) is None


def test_one_hot_columns_are_put_together_where_they_are_such() -> None:
    row = {"area": 80.0, "city=Rome": 0, "city=Bonn": 1, "city=Oslo": 0, "x=1": 2, "x=2": 0, "a=b": 1}
    assert folded(row) == {"area": 80.0, "city": "Bonn", "x=1": 2, "x=2": 0, "a=b": 1}
    assert folded({"city=Rome": 0, "city=Bonn": 0}) == {"city": "–"}  # noqa: RUF001
    assert folded({"tag=a": 1, "tag=b": 1}) == {"tag=a": 1, "tag=b": 1}, "several at once"
    assert line(Display("x", row=row)).startswith("area 80 · city Bonn · x=1 2")
    assert line(Display("x", text="one\n two " * 100), 20) == "one two one two one…"


def test_names_are_listed_as_in_a_sentence() -> None:
    assert [listed(list("abcdefg")[:k], 3) for k in (1, 2, 3, 7)] == [
        "a", "a and b", "a, b and c", "a, b, c and 4 more",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 110])
def test_text_fits_the_terminal_and_holds_every_row(width: int) -> None:
    answer = study_answer(example())
    text = as_text(answer, width)
    assert max(map(len, text.splitlines())) <= width
    for row in (*answer.helpful, *answer.harmful):
        assert sum(line.startswith(f"{row.name} ") for line in text.splitlines()) == 1
    for sentence in (*answer.verdict, *answer.do, *answer.distrust):
        assert " ".join(sentence.split()) in " ".join(text.replace("\n  ", " ").split())


def test_columns_that_nothing_fills_are_not_printed() -> None:
    rows = (NamedRow("row 3", 1e-4), NamedRow("H7", 2e-4, 1e-5, "helpful"))
    text = as_text(Answer("?", "", [], helpful=rows), 80)
    assert "target" not in text
    assert "+2.00 ± 0.10" in text


def test_an_answer_is_read_back(tmp_path) -> None:
    answer = study_answer(example())
    answer.save(tmp_path)
    assert as_text(Answer.load(tmp_path), 90) == as_text(answer, 90)


def test_an_audit_s_answer_lists_measured_rows_clear_ones_first() -> None:
    run = example_run()
    answer, rows = audit_answer(run), run.audit.rows
    measured = rows[rows["effect"].notna()]
    assert answer.verdict[0].startswith(f"Measured: {len(measured)} of 300 training rows")
    clear = measured[measured["verdict"] == "harmful"].sort_values("effect")
    assert [row.name for row in answer.harmful] == clear["id"].head(5).tolist()
    assert [row.effect for row in answer.harmful] == clear["effect"].head(5).tolist()
    assert "96%" in answer.others[0]
    assert "1.08 ± 0.06" in answer.others[1]
    assert "8 suspects" in answer.do[0]
    assert "The model memorised part of its training set." in answer.distrust


def test_an_audit_that_measured_nothing_says_that_its_rows_are_predicted() -> None:
    audit = example_audit()
    bare = audit.rows.assign(effect=np.nan, effect_sem=np.nan, q=np.nan, verdict="")
    answer = audit_answer(
        dataclasses.replace(example_run(), audit=dataclasses.replace(audit, rows=bare, summary={}))
    )
    assert "none was measured" in answer.verdict[0]
    assert {row.verdict for row in answer.helpful} == {"predicted"}
    assert any("audit.verify=true" in s for s in answer.do)


def test_an_audit_whose_effects_follow_one_class_says_so() -> None:
    assert any("of class negative" in s for s in audit_answer(example_run("text")).distrust)
    assert not any("class" in s for s in audit_answer(example_run("classes")).distrust)


def test_rows_without_an_identifier_are_called_by_their_row() -> None:
    answer = audit_answer(example_run("classes"))
    assert all(row.name.startswith("row ") for row in answer.helpful)
