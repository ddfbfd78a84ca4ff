"""An audit's files."""

from pathlib import Path

import pandas as pd
import pytest

from fimo.audit import Audit
from fimo.audit.result import ROWS
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


def test_a_table_without_a_column_of_the_contract_is_refused() -> None:
    with pytest.raises(InputError, match="lacks the columns verdict"):
        Audit(rows().drop(columns="verdict"))


def test_a_folder_without_an_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"audit\.json is missing"):
        Audit.load(tmp_path)
