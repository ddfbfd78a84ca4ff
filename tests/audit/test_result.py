"""An audit's files."""

from pathlib import Path

import pandas as pd
import pytest

from fimo.audit import Audit
from fimo.audit.result import ROWS, SUSPECTS
from fimo.errors import InputError


def rows() -> pd.DataFrame:
    table = pd.DataFrame({name: [0.5, float("nan")] for name in ROWS})
    return table.assign(row=[3, 7], id=["007", "b"], verdict=["helpful", ""], suggested=["", "no"])


def test_an_audit_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    audit = Audit(rows(), summary={"n": 2})
    audit.save(tmp_path)
    again = Audit.load(tmp_path)
    pd.testing.assert_frame_equal(again.rows, audit.rows, check_dtype=False)
    assert again.rows["id"].tolist() == ["007", "b"]
    assert again.summary == {"n": 2}


def test_texts_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    texts = rows().assign(id=["NA", "007"], target=["None", "01"], suggested=["null", ""])
    cleaned = pd.DataFrame({"zip": ["00100", "NA"], "price": ["1.50", ""]})
    Audit(texts, cleaned=cleaned).save(tmp_path)
    again = Audit.load(tmp_path)
    again.save(tmp_path / "again")
    for name in ("id", "target", "suggested"):
        assert again.rows[name].tolist() == texts[name].tolist()
    assert again.rows["score"].isna().tolist() == [False, True]
    assert (tmp_path / "cleaned.csv").read_text() == "zip,price\n00100,1.50\nNA,\n"
    for name in ("rows", "cleaned", "suspects"):
        assert (tmp_path / f"{name}.csv").read_bytes() == (tmp_path / "again" / f"{name}.csv").read_bytes()


def test_targets_that_are_numbers_stay_numbers(tmp_path: Path) -> None:
    for targets in ([1, 0], [1.5, 1e-7]):
        Audit(rows().assign(target=targets)).save(tmp_path)
        assert Audit.load(tmp_path).rows["target"].tolist() == targets


def test_suspects_are_a_file_of_their_own_the_surest_first(tmp_path: Path) -> None:
    three = pd.concat([rows(), rows()[:1]], ignore_index=True).assign(
        id=["a", "b", "c"], suspect_q=[0.2, 0.05, 0.9], suggested=["yes", "no", ""]
    )
    Audit(three).save(tmp_path)
    found = pd.read_csv(tmp_path / "suspects.csv")
    assert found["id"].tolist() == ["b", "a"]
    assert list(found) == list(SUSPECTS)


def test_a_table_without_a_column_of_the_contract_is_refused() -> None:
    with pytest.raises(InputError, match="lacks the columns verdict"):
        Audit(rows().drop(columns="verdict"))


def test_a_folder_without_an_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"audit\.json is missing"):
        Audit.load(tmp_path)
