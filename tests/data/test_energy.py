"""Energy efficiency: the paper's columns, from a text table or an Excel sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fimo.data.energy import FEATURES, EnergyData
from fimo.errors import InputError


def frame(rows: int = 20) -> pd.DataFrame:
    values = np.random.default_rng(0).uniform(1, 9, (rows, 10)).round(3)
    return pd.DataFrame(values, columns=[*(f"X{k}" for k in range(1, 9)), "Y1", "Y2"])


@pytest.mark.parametrize("target", ["heating", "cooling"])
def test_the_chosen_load_is_the_target_and_the_other_is_dropped(tmp_path: Path, target: str) -> None:
    frame().to_csv(tmp_path / "energy.csv", index=False)
    data = EnergyData(str(tmp_path / "energy.csv"), target)
    data.setup()
    shown = [data.display("train", i) for i in range(len(data.train))]
    assert all(tuple(s.row or ()) == FEATURES for s in shown)
    column = frame()["Y1" if target == "heating" else "Y2"]
    assert {s.target for s in shown} <= {f"{v:.6g} kWh/m²" for v in column}
    assert (len(data.train), len(data.test)) == (18, 2)


def test_an_excel_sheet_with_a_blank_margin_equals_the_text_table(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl", reason="openpyxl, which writes the sheet, is not installed")
    padded = frame().reindex(range(25)).assign(blank=np.nan)
    padded.to_excel(tmp_path / "energy.xlsx", index=False)
    frame().to_csv(tmp_path / "energy.csv", index=False, header=False)
    sheet, table = EnergyData(str(tmp_path / "energy.xlsx")), EnergyData(str(tmp_path / "energy.csv"))
    sheet.setup()
    table.setup()
    np.testing.assert_array_equal(sheet.train.inputs, table.train.inputs)
    np.testing.assert_array_equal(sheet.test.targets, table.test.targets)


@pytest.mark.parametrize(
    ("change", "target", "key", "said"),
    [
        (lambda f: f.drop(columns=["X1", "Y2"]), "heating", "dataset.path", "but got 8 columns"),
        (lambda f: f.drop(columns=["Y2"]), "cooling", "dataset.target", "holds the heating load only"),
    ],
)
def test_a_table_of_another_shape_is_refused(
    tmp_path: Path, change: object, target: str, key: str, said: str
) -> None:
    change(frame()).to_csv(tmp_path / "energy.csv", index=False)  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        EnergyData(str(tmp_path / "energy.csv"), target).setup()
    assert caught.value.key == key
    assert said in caught.value.problem


def test_what_is_no_sheet_and_an_unknown_load_are_refused(tmp_path: Path) -> None:
    (tmp_path / "energy.xlsx").write_bytes(b"not a sheet")
    with pytest.raises(InputError, match=r"dataset.path: not an Excel sheet"):
        EnergyData(str(tmp_path / "energy.xlsx")).setup()
    with pytest.raises(InputError, match=r"dataset.target: expected heating or cooling"):
        EnergyData(target="both")
