"""FICO: special codes handled as the paper does, against a row-by-row reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fimo.data.fico import FEATURES, TARGET, FicoData, without_special_codes
from fimo.errors import InputError


def table(rows: int = 60) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.integers(0, 30, (rows, len(FEATURES))), columns=list(FEATURES))
    special = generator.uniform(size=frame.shape)
    frame = frame.mask(special < 0.15, -8).mask(special < 0.05, -9)
    for column in ("MSinceMostRecentDelq", "MSinceMostRecentInqexcl7days"):
        frame[column] = frame[column].mask(generator.uniform(size=rows) < 0.3, -7)
    frame["MaxDelq2PublicRecLast12M"] = generator.integers(-9, 10, rows).clip(min=-8)
    frame.iloc[[3, 17]] = -9
    frame.insert(0, TARGET, np.where(generator.uniform(size=rows) < 0.5, "Bad", "Good"))
    return frame


def expected(frame: pd.DataFrame) -> list[list[float]]:
    """Apply the rules of the paper's appendix to one value after another."""
    rows = [list(map(float, row[1:])) for row in frame.itertuples(index=False)]
    rows = [row for row in rows if any(v > -9 for v in row)]
    delinquency, inquiry, worst = (
        FEATURES.index(c)
        for c in ("MSinceMostRecentDelq", "MSinceMostRecentInqexcl7days", "MaxDelq2PublicRecLast12M")
    )
    largest = {c: max(row[c] for row in rows) for c in (delinquency, inquiry)}

    def mean(column: int) -> float:
        values = [row[column] for row in rows if row[column] >= 0]
        return sum(values) / len(values)

    average = mean(delinquency)
    for row in rows:
        row[delinquency] = {-7.0: largest[delinquency] + 1, -8.0: average}.get(
            row[delinquency], row[delinquency]
        )
        row[inquiry] = {-7.0: 0.0, -8.0: largest[inquiry] + 1}.get(row[inquiry], row[inquiry])
        row[worst] = min(row[worst], 7.0)
    means = [mean(column) for column in range(len(FEATURES))]
    return [[means[k] if v in (-8.0, -9.0) else v for k, v in enumerate(row)] for row in rows]


def test_special_codes_are_handled_as_in_the_paper() -> None:
    frame = table()
    found = without_special_codes(frame[list(FEATURES)].astype(float))
    assert list(found.index) == [i for i in range(len(frame)) if i not in (3, 17)]
    np.testing.assert_allclose(found.to_numpy(), expected(frame), rtol=1e-12)


def test_the_data_are_the_same_with_and_without_a_header(tmp_path: Path) -> None:
    table().to_csv(tmp_path / "with.csv", index=False)
    table().to_csv(tmp_path / "without.csv", index=False, header=False)
    ours, theirs = FicoData(str(tmp_path / "with.csv")), FicoData(str(tmp_path / "without.csv"))
    ours.setup()
    theirs.setup()
    np.testing.assert_array_equal(ours.train.inputs, theirs.train.inputs)
    assert ours.class_names == ("Bad", "Good")
    assert (ours.inputs, ours.outputs, len(ours.train) + len(ours.test)) == (23, 2, 58)
    assert abs(float(ours.train.inputs.mean())) < 1e-6
    assert abs(float(ours.train.inputs.std(0, correction=0)[0]) - 1) < 1e-5


def test_a_label_stays_with_its_row_when_rows_are_dropped(tmp_path: Path) -> None:
    frame = table()
    frame["ExternalRiskEstimate"] = range(len(frame))
    frame.loc[3, FEATURES] = -9
    frame.to_csv(tmp_path / "fico.csv", index=False)
    data = FicoData(str(tmp_path / "fico.csv"))
    data.setup()
    for index in range(len(data.train)):
        shown = data.display("train", index)
        assert shown.row is not None
        assert shown.target == frame[TARGET][int(shown.row["ExternalRiskEstimate"])]


def test_bad_files_are_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset.path: must be given"):
        FicoData().setup()
    with pytest.raises(InputError, match=r"dataset.path: no such file"):
        FicoData(str(tmp_path / "none.csv")).setup()
    table().drop(columns=["NumTotalTrades"]).to_csv(tmp_path / "fico.csv", index=False)
    with pytest.raises(InputError, match=r"lacks the columns NumTotalTrades"):
        FicoData(str(tmp_path / "fico.csv")).setup()
