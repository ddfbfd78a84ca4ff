"""The page of an audit: complete, offline, and true to the audit's tables."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest

import fimo
from fimo.errors import InputError
from fimo.reporting.audit_answer import audit_answer
from fimo.reporting.audit_report import listed_rows, write_audit_report
from fimo.reporting.audit_run import EVERY_ROW, AuditRun, train_rows
from tests.reporting.audit_example import example_audit, example_run
from tests.reporting.test_report import Balance, page_data, page_text


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_audit_report(example_run(), tmp_path_factory.mktemp("audit") / "report.html")


def test_the_page_lists_every_row_with_what_was_measured(report: Path) -> None:
    audit, table = example_audit(), page_data(report)["tables"]["rows"]
    labels = [c["label"] for c in table["columns"]]
    named = {row[0]: dict(zip(labels, row, strict=True)) for row in table["rows"]}
    assert len(named) == len(audit.rows) == 300
    for row in audit.rows.itertuples():
        shown = named[row.id]
        assert shown["verdict"] == row.verdict
        assert shown["predicted effect"] == pytest.approx([row.score, row.score_sem], rel=1e-5)
        if row.verdict:
            assert shown["measured effect"] == pytest.approx([row.effect, row.effect_sem], rel=1e-5)
        else:
            assert shown["measured effect"] is None
    assert "district" in labels, "one-hot columns are one"
    assert not any(label.startswith("district=") for label in labels)


def test_each_named_test_instance_comes_with_its_rows_and_what_moves_its_prediction(report: Path) -> None:
    audit, tests = example_audit(), page_data(report)["tests"]
    assert [test["name"] for test in tests] == ["H00003", "H00017"]
    labels = [c["label"] for c in tests[0]["table"]["columns"]]
    assert "moves the prediction by (EUR)" in labels
    pairs = audit.pairs[(audit.pairs["test_row"] == 3) & audit.pairs["effect"].notna()].set_index("id")
    measured = [r for r in tests[0]["table"]["rows"] if r[1] is not None]
    assert {r[0] for r in measured} == set(pairs.index)
    for row in measured:
        assert row[1][0] == pytest.approx(pairs.loc[row[0], "effect"], rel=1e-5)
        assert row[2][0] == pytest.approx(pairs.loc[row[0], "prediction_effect"], rel=1e-5)


def test_suspects_come_surest_first_with_what_was_given_and_suggested(report: Path) -> None:
    audit, table = example_audit(), page_data(report)["tables"]["suspects"]
    wanted = audit.rows[audit.rows["suspect_q"] <= 0.1].sort_values("suspect_q")
    assert [row[0] for row in table["rows"]] == wanted["id"].tolist() == audit.suspects["id"].tolist()
    assert [float(row[2]) for row in table["rows"]] == wanted["suggested"].astype(float).tolist()


def test_where_no_suspect_is_sure_the_first_ones_are_shown_and_none_is_named(tmp_path: Path) -> None:
    audit = example_audit()
    unsure = audit.rows.assign(suspect_q=audit.rows["suspect_q"] + 0.5, suggested="")
    run = dataclasses.replace(example_run(), audit=dataclasses.replace(audit, rows=unsure))
    path = write_audit_report(run, tmp_path / "report.html")
    shown = page_data(path)["tables"]["suspects"]["rows"]
    assert [row[0] for row in shown] == unsure.sort_values("suspect_q")["id"].head(20).tolist()
    assert "None is sure" in page_text(path)
    assert not any("suspect" in said for said in audit_answer(run).do)


def test_the_page_asks_nothing_of_a_network_and_is_well_formed(tmp_path: Path) -> None:
    for name, run in {
        "table": example_run(),
        "text": example_run("text"),
        "bare": AuditRun(example_audit()),
        "frames": AuditRun.of_frames(example_audit(), pd.DataFrame({"a": range(400), "b": "x < y"})),
        "rows alone": AuditRun(type(example_audit())(example_audit().rows)),
    }.items():
        text = page_text(write_audit_report(run, tmp_path / f"{name}.html"))
        assert not re.search(r'(src|href)="(?!data:|#)', text)
        parser = Balance()
        parser.feed(text)
        assert parser.stack == []
        visible = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)
        assert not re.search(r"\b(nan|None|Undefined)\b", visible), name
        assert "<script>alert" not in text
        assert "<b>service" not in visible


def test_an_audit_of_text_offers_the_ranking_within_the_class(tmp_path: Path) -> None:
    path = write_audit_report(example_run("text"), tmp_path / "report.html")
    table = page_data(path)["tables"]["rows"]
    labels = [c["label"] for c in table["columns"]]
    assert "within its class" in labels
    assert "rank within the class" in page_text(path)
    rows = example_run("text").audit.rows.set_index("id")
    within = rows["score"] - rows.groupby("target")["score"].transform("mean")
    for row in table["rows"]:
        shown = row[labels.index("within its class")][0]
        assert shown == pytest.approx(within[row[0].removeprefix("row ")], rel=1e-4, abs=1e-9)


def test_of_a_large_training_set_the_rows_that_matter_are_listed() -> None:
    audit = example_audit(n=EVERY_ROW + 1)
    listed = set(listed_rows(AuditRun(audit))["row"])
    assert len(listed) < 500
    assert set(audit.rows.loc[audit.rows["verdict"] != "", "row"]) <= listed
    assert set(audit.suspects["row"]) <= listed
    assert audit.rows.loc[audit.rows["score"].idxmin(), "row"] in listed


def test_every_row_of_a_small_table_keeps_its_values_and_of_texts_those_that_are_shown() -> None:
    audit = example_audit()
    assert train_rows(audit, columns=7) == sorted(audit.rows["row"])
    assert 100 < len(train_rows(audit)) < 300


def test_a_folder_gives_the_same_page_back(tmp_path: Path) -> None:
    run = example_run()
    run.save(tmp_path)
    again = AuditRun.load(tmp_path)
    assert (again.shown, again.config, again.dataset) == (run.shown, run.config, run.dataset)
    one, two = (write_audit_report(r, tmp_path / f"{k}.html") for k, r in enumerate((run, again)))
    assert page_data(one) == page_data(two)
    (tmp_path / "audit_report.json").unlink()
    assert len(AuditRun.load(tmp_path).audit.rows) == 300, "what Audit.save alone wrote"


def test_from_python_an_audit_is_reported_with_the_rows_of_the_user_s_own_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({"area": range(1000, 1400), "city": "Bonn", "flat": True})
    path = fimo.report(example_audit(), tmp_path / "report.html", train=frame)
    table = page_data(path)["tables"]["rows"]
    labels = [c["label"] for c in table["columns"]]
    rows = example_audit().rows.set_index("id")["row"]
    for shown in table["rows"]:
        assert shown[labels.index("area")] == 1000 + rows[shown[0]]
    assert labels[-3:] == ["area", "city", "flat"]


def test_a_table_that_is_too_short_to_be_the_audited_one_is_refused(tmp_path: Path) -> None:
    short = pd.DataFrame({"a": range(10)})
    with pytest.raises(InputError, match="train: has 10 rows, but the audit is of a table with a data row"):
        fimo.report(example_audit(), tmp_path / "report.html", train=short)
