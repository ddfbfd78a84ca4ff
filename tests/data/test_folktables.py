"""ACS income: the task's rows, one-hot codes, and which columns are standardised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fimo.data.folktables import CODES, NUMERIC, FolktablesData
from fimo.errors import InputError


def persons(rows: int = 80) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({c: generator.integers(1, 5, rows) for c in CODES})
    frame["AGEP"] = generator.integers(10, 90, rows)
    frame["WKHP"] = generator.integers(0, 60, rows)
    frame["PINCP"] = generator.choice([50, 30_000, 50_000, 90_000], rows)
    frame["PWGTP"] = generator.integers(0, 9, rows)
    frame["ST"] = 25
    frame.loc[0, "SEX"] = np.nan
    return frame


def loaded(tmp_path: Path, frame: pd.DataFrame) -> FolktablesData:
    frame.to_csv(tmp_path / "psam_p25.csv", index=False)
    data = FolktablesData(str(tmp_path / "psam_p25.csv"))
    data.setup()
    return data


def test_rows_are_adults_with_work_and_income(tmp_path: Path) -> None:
    frame = persons()
    data = loaded(tmp_path, frame)
    wanted = [
        row
        for row in frame.itertuples()
        if row.AGEP > 16 and row.PINCP > 100 and row.WKHP > 0 and row.PWGTP > 0
    ]
    assert len(data.train) + len(data.test) == len(wanted)
    assert len(data.test) == -(-len(wanted) // 4)
    over = sum(row.PINCP > 50_000 for row in wanted)
    assert int(data.train.targets.sum() + data.test.targets.sum()) == over
    assert data.class_names == ("50k or less", "over 50k")


def test_numbers_are_standardised_and_indicators_left_as_they_are(tmp_path: Path) -> None:
    data = loaded(tmp_path, persons())
    inputs = np.asarray(data.train.inputs)
    width = len(NUMERIC)
    assert abs(inputs[:, :width].mean(0)).max() < 1e-6
    np.testing.assert_allclose(inputs[:, :width].std(0), 1, rtol=1e-5)
    assert set(np.unique(inputs[:, width:])) == {0.0, 1.0}
    assert (inputs[:, width:].sum(1) >= len(CODES) - 1).all()
    row = data.display("train", 0).row
    assert row is not None
    assert row["AGEP"] > 16


def test_a_person_file_without_needed_columns_or_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset.path: the person file lacks the columns WKHP, MAR"):
        loaded(tmp_path, persons().drop(columns=["MAR", "WKHP"]))
    with pytest.raises(InputError, match=r"no adult with work and income"):
        loaded(tmp_path, persons().assign(AGEP=12))


def test_without_the_file_and_the_package_the_answer_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "folktables", None)
    with pytest.raises(InputError, match=r"dataset.path: not given, and the package folktables"):
        FolktablesData().setup()
