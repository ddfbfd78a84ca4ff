"""Large tables as text: the bytes that pandas writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fimo.data.reading import EXACT
from fimo.store import csv_tables
from fimo.store.csv_tables import write_csv

EDGES = [0.0, -0.0, 1.0, -3.0, 0.1, 1e-3, 9.99e-4, 1e-4, 1e-5, 1e-7, 123456.7, 999999.5, 1e6, 1234567.8, 1e8,
         1e16, 1.5e16, 1e22, 3e38, 1e-38, 1e-45, np.inf, -np.inf, np.nan, 16777217.0, 0.30000001]  # fmt: skip


def written(table: pd.DataFrame, folder: Path) -> bytes:
    write_csv(table, folder / "ours.csv")
    table.to_csv(folder / "theirs.csv", index=False, lineterminator="\n")
    assert (folder / "ours.csv").read_bytes() == (folder / "theirs.csv").read_bytes()
    return (folder / "ours.csv").read_bytes()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_of_all_bits_are_those_of_pandas(kind: type, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 256, (20_000, np.dtype(kind).itemsize), dtype=np.uint8).view(kind)[:, 0]
    usual = generator.standard_normal(20_000).astype(kind) * generator.choice([1e-3, 1.0, 1e3], 20_000)
    with np.errstate(over="ignore"):
        edges = np.array([*EDGES] * 770, dtype=np.float64)[:20_000].astype(kind)
    table = pd.DataFrame({"bits": bits, "usual": usual.astype(kind), "edges": edges})
    text = written(table, tmp_path)
    found = pd.read_csv(tmp_path / "ours.csv", **EXACT)
    assert text.count(b"\n") == 20_001
    np.testing.assert_array_equal(found["usual"].to_numpy().astype(kind), table["usual"])
    np.testing.assert_array_equal(found["bits"].to_numpy().astype(kind), table["bits"])


def test_other_columns_are_written_as_pandas_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "CELLS", 15 * 64)
    n = 3 * 64 + 10
    generator = np.random.default_rng(0)
    words = ["plain", "with, comma", 'a "quote"', "", "ü", " space ", '""', "7"]
    table = pd.DataFrame(
        {
            "name, unit": [words[k % 8] for k in range(n)],
            "a": generator.standard_normal(n).astype(np.float32),
            "b": generator.standard_normal(n),
            "whole": np.arange(n, dtype=np.float64),
            "count": np.arange(n),
            "c": generator.standard_normal(n),
            "missing": pd.array([None if k % 3 else k for k in range(n)], dtype="Int64"),
            "d": generator.standard_normal(n),
            "class": pd.Categorical([words[k % 2] for k in range(n)]),
            "day": pd.date_range("2020-01-01", periods=n, freq="h"),
            "e": np.where(np.arange(n) % 5, np.nan, 1.25),
            "f": generator.standard_normal(n),
            "true": np.arange(n) % 2 == 0,
            "g": generator.standard_normal(n),
            "h": generator.standard_normal(n),
        },
        index=np.arange(n) * 7,
    )
    written(table, tmp_path)
    several_lines = table.assign(
        **{"name, unit": table["name, unit"].where(table["count"] != 5, "two\nlines")}
    )
    written(several_lines, tmp_path)
    written(several_lines[64:], tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"only": [1.5, np.nan, 2.0]}),
        pd.DataFrame({"a": [np.nan, np.nan], "b": [np.nan, 1.5]}),
        pd.DataFrame({"a": pd.Series(dtype=float), "b": pd.Series(dtype=float)}),
        pd.DataFrame({"a": [1.5, 2.5], "b": [0.5, 1.5], "c": ["", None]}),
        pd.DataFrame({"a": ["x", None], "b": [1, 2]}),
        pd.DataFrame({"half": np.array([0.1, 2], dtype=np.float16), "b": [0.1, 0.2], "c": [0.1, 1e-9]}),
        pd.DataFrame(index=range(3)),
    ],
)
def test_small_and_empty_tables(table: pd.DataFrame, tmp_path: Path) -> None:
    written(table, tmp_path)
