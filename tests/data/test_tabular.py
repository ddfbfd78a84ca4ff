"""Tables: the paper's protocol, and clear answers to bad files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from fimo.data.bundled import BundledData
from fimo.data.concrete import ConcreteData
from fimo.data.csv import CsvData, read_frame
from fimo.errors import InputError

FIMO_DATA = os.environ.get("FIMO_DATA")


def test_the_split_and_standardisation_are_the_papers() -> None:
    data = BundledData("diabetes")
    data.setup()
    x, y = load_diabetes(return_X_y=True, scaled=False)
    x_train, x_test, y_train, y_test = train_test_split(x, y[:, None], test_size=0.1, random_state=0)
    features, target = StandardScaler().fit(x_train), StandardScaler().fit(y_train)
    np.testing.assert_allclose(data.train.inputs, features.transform(x_train), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.test.inputs, features.transform(x_test), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.test.targets, target.transform(y_test), rtol=1e-5, atol=1e-6)


def test_displays_are_in_original_units() -> None:
    data = BundledData("diabetes")
    data.setup()
    x, y = load_diabetes(return_X_y=True, scaled=False)
    _, x_test, _, y_test = train_test_split(x, y, test_size=0.1, random_state=0)
    shown = data.display("test", 3)
    assert list(shown.row.values()) == list(x_test[3])
    assert shown.target == f"{y_test[3]:g} progression"


def test_classes_are_numbered_and_named() -> None:
    data = BundledData("breast_cancer")
    data.setup()
    assert data.outputs == 2
    assert data.class_names == ("benign", "malignant")
    assert data.display("train", 0).target == data.class_names[data.train.targets[0]]


def write(folder: Path, text: str) -> str:
    path = folder / "table.csv"
    path.write_text(text)
    return str(path)


ROWS = "\n".join(f"{k},{k * k % 7},{'yes' if k % 3 else 'no'}" for k in range(20))


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
def test_the_separator_is_found(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path, ("a,b,label\n" + ROWS).replace(",", separator))
    data = CsvData(path, target="label", task="classification")
    data.setup()
    assert data.class_names == ("no", "yes")
    assert len(data.train) + len(data.test) == 20
    assert list(data.display("train", 0).row) == ["a", "b"]


def test_a_target_is_picked_by_name_or_index_and_a_header_may_be_absent(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    by_index = CsvData(path, target=-1, task="classification", header=False)
    by_index.setup()
    assert by_index.class_names == ("no", "yes")
    first = CsvData(write(tmp_path, "a,b,label\n" + ROWS), target="a", task="regression")
    first.setup()
    assert list(first.display("train", 0).row) == ["b", "label"]


@pytest.mark.parametrize(
    ("text", "arguments", "key", "said"),
    [
        ("a,b,label\n" + ROWS, {"target": "lable"}, "dataset.target", "no column 'lable'; there are a, b"),
        ("a,b,label\n" + ROWS, {"target": 7}, "dataset.target", "below 3 but got 7"),
        ("a,b,label\n" + ROWS + "\n1,x,no", {}, "dataset", "column 'b' has 'x' in data row 20 (line 22)"),
        ("a,b,label\n" + ROWS + "\n1,,no", {"missing": "refuse"}, "dataset.path",
         "'b' has a missing value (NaN) in data row 20 (line 22); dataset.missing=impute"),
        ("a,b,label\n" + ROWS + "\n1,inf,no", {}, "dataset.path", "'inf' in data row 20"),
        ("a,b,label\n" + ROWS + "\n1,2,", {}, "dataset.target", "missing value in data row 20"),
        ("a,b,label\n" + ROWS.replace("yes", "no"), {}, "dataset.target", "one class only ('no')"),
        ("", {}, "dataset.path", "is empty"),
        ("a\n1\n2", {}, "dataset.separator", "one column only"),
        ("1,2,3\n" * 9, {}, "dataset.header", "numbers only; set dataset.header=false"),
        ("a,b,label\n" + ROWS + "\n1,2,x,4", {}, "dataset.path", "not a table"),
    ],
)  # fmt: skip
def test_a_bad_table_is_answered_with_what_was_found(
    tmp_path: Path, text: str, arguments: dict, key: str, said: str
) -> None:
    data = CsvData(write(tmp_path, text), **{"target": -1, "task": "classification", **arguments})
    with pytest.raises(InputError) as caught:
        data.setup()
    assert caught.value.key == key
    assert said in caught.value.problem


def test_a_missing_file_and_an_unknown_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset.path: no such file"):
        CsvData(str(tmp_path / "none.csv")).setup()
    with pytest.raises(InputError, match=r"dataset\.task"):
        CsvData(str(tmp_path), task="ranking")


def test_columns_are_dropped_or_become_indicators_and_rows_with_empty_cells_go(tmp_path: Path) -> None:
    rows = [f"{k},2024-01-{k + 1:02d},{'' if k == 3 else k * k},{'abc'[k % 3]},{k % 5}" for k in range(20)]
    path = write(tmp_path, "id,day,x,city,y\n" + "\n".join(rows))
    data = CsvData(path, "y", drop=["id", "day"], one_hot=["city"], missing="drop")
    data.setup()
    assert len(data.train) + len(data.test) == 19
    shown = data.display("test", 0).row
    assert list(shown) == ["x", "city"], "a category is one column again"
    assert shown["city"] in "abc"
    assert set(data.train.inputs[:, 1:].unique().tolist()) == {0.0, 1.0}  # indicators as they are
    assert (data.train.inputs[:, 1:].sum(1) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        ({"drop": ["c"]}, "dataset.drop", "no feature column 'c'; there are a, b"),
        ({"one_hot": ["label"]}, "dataset.one_hot", "no feature column 'label'"),
        ({"missing": "mean"}, "dataset.missing", "expected impute, drop, refuse but got 'mean'"),
        ({"encoding": "utf-61"}, "dataset.encoding", "Python knows no encoding 'utf-61'"),
        ({"encoding": "utf-16"}, "dataset.path", "is not utf-16 text"),
        ({"separator": "comas"}, "dataset.separator", "expected auto, comma, "),
        ({"test_size": 0.999}, "dataset.test_size", "0.999 of 20 instances can't be held out"),
        ({"split_seed": -1}, "dataset.split_seed", "expected a number from 0"),
    ],
)
def test_choices_for_a_table_that_do_not_fit_are_named(
    tmp_path: Path, arguments: dict, key: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        CsvData(write(tmp_path, f"a,b,label\n{ROWS}"), task="classification", **arguments).setup()
    assert caught.value.key == key
    assert said in caught.value.problem


def test_numbers_are_read_as_the_nearest_float(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    written = generator.normal(size=(500, 2)) * 10.0 ** generator.integers(-12, 3, (500, 2))
    rows = "\n".join(f"{a!r},{b!r}" for a, b in written.tolist())
    (tmp_path / "table.csv").write_text(f"a,b\n{rows}\n")
    assert (read_frame(tmp_path / "table.csv", True, "comma").to_numpy() == written).all()


def test_other_encodings_are_read_when_named(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(f"größe,b,label\n{ROWS}".encode("latin-1"))
    with pytest.raises(InputError, match=r"is not utf-8 text; set dataset\.encoding"):
        CsvData(str(tmp_path / "table.csv"), task="classification", encoding="utf-8").setup()
    for encoding in ("latin-1", "auto"):
        data = CsvData(str(tmp_path / "table.csv"), task="classification", encoding=encoding)
        data.setup()
        assert "größe" in data.display("train", 0).row
    assert any("is read as cp1252" in line for line in data.decisions), "a guess is said"


def test_concrete_offline_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIMO_CACHE", str(tmp_path))
    monkeypatch.setattr("fimo.data.concrete.HOME", "http://127.0.0.1:9/concrete.zip")
    with pytest.raises(
        InputError, match=r"dataset.path: not given, and http.*can't be fetched.*set dataset.path"
    ):
        ConcreteData().setup()


@pytest.mark.skipif(FIMO_DATA is None, reason="FIMO_DATA is not set")
def test_concrete_reads_the_public_table_without_a_header() -> None:
    data = ConcreteData(f"{FIMO_DATA}/concrete/concrete.txt")
    data.setup()
    assert (len(data.train), len(data.test), data.inputs) == (927, 103, 8)
    assert data.display("train", 0).target.endswith("MPa")


def test_batches_cover_the_training_set_once_per_epoch_in_a_seeded_order() -> None:
    data = BundledData("diabetes", batch_size=50)
    data.setup()
    torch.manual_seed(0)
    first = [b.targets for b in data.train_dataloader()]
    torch.manual_seed(0)
    again = [b.targets for b in data.train_dataloader()]
    assert [len(b) for b in first] == [50] * 7 + [47]
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.cat(first).sort(0).values, data.train.targets.sort(0).values)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a,a,label\n" + ROWS)
    with pytest.raises(InputError, match=r"dataset\.path: .* has several columns named 'a'; rename them"):
        CsvData(path, target="label", task="classification").setup()


@pytest.mark.parametrize("line", [3, 19])
def test_a_line_with_a_cell_too_many_is_named_whatever_the_separator_is_set_to(
    tmp_path: Path, line: int
) -> None:
    lines = ("a,b,label\n" + ROWS).splitlines()
    lines[line - 1] += ",1"
    path = write(tmp_path, "\n".join(lines))
    for separator in ("auto", "comma"):
        with pytest.raises(InputError, match=f"dataset.path: .*: line {line} has 4 cells where the first"):
            CsvData(path, target="label", task="classification", separator=separator).setup()


def test_a_class_of_one_row_is_warned_of_in_training_and_refused_in_the_test_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a,b,label\n" + ROWS + "\n1,2,rare")
    seeds = range(12)
    held_out = [s for s in seeds if 20 in train_test_split(np.arange(21), test_size=0.1, random_state=s)[1]]
    assert held_out
    for seed in seeds:
        caplog.clear()
        data = CsvData(path, target="label", task="classification", split_seed=seed)
        if seed in held_out:
            with pytest.raises(
                InputError, match=r"class 'rare' in the test part only \(data row 20 \(line 22\)\)"
            ):
                data.setup()
        else:
            data.setup()
        assert "dataset.target: column 'label' has only one row of its class: rare" in caplog.text


def test_a_class_that_is_a_number_is_named_as_such_and_may_be_none(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b,label\n" + "1,2,3\n2,1,4\n" * 5)
    (tmp_path / "test.csv").write_text("a,b,label\n1,2,3\n1,2,8\n")
    data = CsvData(tmp_path / "train.csv", "label", "classification", test_path=tmp_path / "test.csv")
    with pytest.raises(InputError, match=r"class 8 in the test part only .*dataset\.task=regression"):
        data.setup()


def test_numbers_whose_squares_overflow_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,label\n" + ROWS + "\n1,-1e200,yes")
    with pytest.raises(InputError, match=r"column 'b' has -1e\+200 in data row 20 .* too large"):
        CsvData(path, target="label", task="classification").setup()
