"""Tables whose cells may be read in several ways: nothing is shifted, renamed or mixed without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fimo.audit.cleaning import cleaned
from fimo.audit.result import ROWS, Audit
from fimo.data.csv import CsvData
from fimo.data.origin import Origin
from fimo.data.parts import parts
from fimo.data.reading import Form, read_file, read_frame
from fimo.data.tabular import pick_target
from fimo.errors import InputError

N = 40


def table(**columns: list) -> pd.DataFrame:
    """A number and a target, besides other columns."""
    generator = np.random.default_rng(0)
    return pd.DataFrame({"x": generator.normal(size=N).round(3), **columns, "y": np.arange(N) * 1.5})


def loaded(folder: Path, frame: pd.DataFrame, name: str = "t.csv", **arguments) -> CsvData:
    if name.endswith("parquet"):
        frame.to_parquet(folder / name)
    elif name.endswith("xlsx"):
        frame.to_excel(folder / name, index=False)
    else:
        frame.to_csv(folder / name, index=False)
    data = CsvData(str(folder / name), **{"target": "y", **arguments})
    data.setup()
    return data


def shown(data: CsvData, name: str) -> dict[int, float | int | str]:
    """What a column shows, by the file's row."""
    return {int(row): data.display("train", k).row[name] for k, row in enumerate(data.origin("train").row)}


# lines


@pytest.mark.parametrize(
    ("separator", "text", "said"),
    [
        ("comma", 'a,b,y\n1,"x",2,\n3,z,4,\n', "line 2 has 4 cells where the first has 3"),
        ("semicolon", 'a;b;y\n1;"x\nand; more";2\n\n3;z;4;5\n', "line 5 has 4 cells where the first has 3"),
        ("comma", '"a, b",y\n"1, 2",3\n4,5,"6\n7"\n', "line 3 has 3 cells where the first has 2"),
    ],
)
def test_a_row_with_more_cells_than_names_is_refused_beside_quoted_cells_too(
    tmp_path: Path, separator: str, text: str, said: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        read_frame(tmp_path / "t.csv", True, separator)


def test_quoted_cells_with_separators_lines_and_much_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f'a, "b, c", y\n"1,2",  "x\n\ny""z", 3\n\n"{"k" * 140_000}", w, 4\n')
    frame = read_frame(tmp_path / "t.csv", True, "comma")
    assert list(frame) == ["a", "b, c", "y"]
    assert frame["b, c"].tolist() == ['x\n\ny"z', "w"]
    assert frame["y"].tolist() == [3, 4]


def test_a_large_files_column_is_of_one_kind(tmp_path: Path) -> None:
    codes, others = [*["01", "02"] * 5_000, "A1"], ",0" * 63  # pandas reads 8192 such rows at a time
    path = tmp_path / "t.csv"
    names = ",".join(f"c{k}" for k in range(63))
    path.write_text(f"code,{names}\n" + "".join(f"{code}{others}\n" for code in codes))
    assert path.stat().st_size > 2**20
    assert read_frame(path, True, "comma")["code"].tolist() == codes


def test_a_separator_beyond_ascii_is_taken(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a¦b\n1¦2\n3¦4\n", encoding="utf-8")
    assert read_frame(tmp_path / "t.csv", True, "¦").to_numpy().tolist() == [[1, 2], [3, 4]]


# dates


@pytest.mark.parametrize(
    ("one", "other"), [("31/01/2020", "03/15/2020"), ("31.01.2020", "03.15.2020"), ("31-01-20", "3-15-20")]
)
def test_dates_of_both_orders_in_a_column_are_refused(tmp_path: Path, one: str, other: str) -> None:
    frame = table(seen=[one, other] * (N // 2))
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, frame)
    assert caught.value.key == "dataset.day_first"
    for part in ("'seen'", f"{one} with the day first", f"{other} with the month first"):
        assert part in caught.value.problem
    assert loaded(tmp_path, frame, drop=["seen"]).inputs == 1
    assert loaded(tmp_path, frame, one_hot=["seen"]).inputs == 3


@pytest.mark.parametrize(
    ("cells", "given"), [(["31/01/2020", "02/03/2020"], False), (["03.15.2020", "02.08.2020"], True)]
)
def test_dates_that_contradict_the_setting_are_refused(tmp_path: Path, cells: list, given: bool) -> None:
    with pytest.raises(InputError, match=rf"'seen' has {cells[0]}, which is no date with the") as caught:
        loaded(tmp_path, table(seen=cells * (N // 2)), day_first=given)
    assert caught.value.key == "dataset.day_first"


def days(data: CsvData) -> np.ndarray:
    return np.sort(data._columns[1].values.unique())  # type: ignore[index]


@pytest.mark.parametrize(
    ("cells", "given", "read"),
    [
        (["02.08.2020", "03.15.2020"], None, ["2020-02-08", "2020-03-15"]),
        (["02.08.2020", "03.05.2020"], None, ["2020-05-03", "2020-08-02"]),
        (["02.08.2020", "03.05.2020"], False, ["2020-05-03", "2020-08-02"]),
        (["02/08/2020", "03/05/2020"], False, ["2020-02-08", "2020-03-05"]),
        (["02/08/2020", "13/05/2020"], None, ["2020-05-13", "2020-08-02"]),
        (["01.01.55", "31.12.69"], None, ["1969-12-31", "2055-01-01"]),
        (["1-Jan-68 10:00", "2-Feb-75 11:00"], None, ["1975-02-02T11", "2068-01-01T10"]),
    ],
)
def test_days_and_months_and_short_years(tmp_path: Path, cells: list, given: bool | None, read: list) -> None:
    data = loaded(tmp_path, table(seen=cells * (N // 2)), day_first=given)
    assert days(data).astype("datetime64[h]").tolist() == np.array(read, "datetime64[h]").tolist()
    short = any("seen (two-digit years are 1969 to 2068)" in line for line in data.decisions)
    assert short == (not any("2020" in cell for cell in cells))


# identifiers


IDS = ["00001", "1.50", "1.1", "1.10", "NA", "nan", *[f"{k:05d}" for k in range(6, N)]]


@pytest.mark.parametrize("name", ["t.csv", "t.xlsx"])
def test_identifiers_are_as_they_are_written(tmp_path: Path, name: str) -> None:
    data = loaded(tmp_path, table(id=[f" {word} " for word in IDS]), name, id="id")
    called = {int(row): i for part in ("train", "test") for row, i in
              zip(data.origin(part).row, data.origin(part).ids, strict=True)}  # fmt: skip
    assert [called[k] for k in range(N)] == IDS


@pytest.mark.parametrize("name", ["t.csv", "t.xlsx"])
def test_an_empty_identifier_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"dataset\.id: column 'id' is empty in data row 3"):
        loaded(tmp_path, table(id=[*IDS[:3], "", *IDS[4:]]), name, id="id")


def test_identifiers_of_a_file_without_names_are_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{k % 3},{word},{k}\n" for k, word in enumerate(IDS)))
    frame, _, _ = read_file(tmp_path / "t.csv", Form(header=False, id="1"))
    assert list(frame) == ["0", "1", "2"]
    assert frame["1"].tolist() == IDS


# targets


def test_a_targets_name_comes_before_an_index() -> None:
    frame = pd.DataFrame([[1, 2, 3, 4]], columns=["y", "x", "1", "2021"])
    assert [pick_target(frame, t)[1].name for t in (1, "1", 2021, "2021", 2, -1, "0")] == [
        "1", "1", "2021", "2021", "1", "2021", "y",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([0.0, 1.0], ("0", "1")),
        ([1234567.0, 2.0], ("2", "1234567")),
        ([0.1234567, 2.0], ("0.1234567", "2")),
    ],
)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_floating_point_classes_are_called_alike_everywhere(
    tmp_path: Path, classes: list, names: tuple, kind: str
) -> None:
    frame = table().assign(y=np.array(classes * (N // 2), kind))
    data = loaded(tmp_path, frame, "t.parquet", task="classification")
    assert data.class_names == names
    assert set(data.shown_targets("train")) == set(names)
    for k in range(10):
        assert data.display("train", k).target == names[int(data.train.targets[k])]


def test_a_question_mark_is_no_class_but_other_words_are(tmp_path: Path) -> None:
    frame = table().assign(y=[*["-", "none"] * (N // 2 - 1), "a", " ? "]).astype({"y": str})
    with pytest.raises(InputError, match=rf"dataset\.target: .* missing value in data row {N - 1}"):
        loaded(tmp_path, frame)
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{k},{c}\n" for k, c in enumerate("-?ab-?ab-ab-ab")))
    data = CsvData(str(tmp_path / "t.csv"), target="y", missing="drop")
    assert set(data.read().target) == {"-", "a", "b"}


# cells that are no single values


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}])
def test_a_column_of_lists_or_records_is_named_and_can_be_left_out(tmp_path: Path, value: object) -> None:
    frame = table(embedding=[value] * N)
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, frame, "t.parquet")
    assert caught.value.key == "dataset.path"
    assert caught.value.problem == (
        "column 'embedding' holds lists or records, not single values; leave it out with "
        "dataset.drop=[embedding]"
    )
    data = loaded(tmp_path, frame, "t.parquet", drop=["embedding"])
    assert data.inputs == 1
    row = data.named("train", 0).row
    assert row is not None
    assert set(row) == {"x", "embedding"}
    with pytest.raises(InputError, match=r"dataset\.target: column 'embedding' holds lists or records"):
        loaded(tmp_path, frame, "t.parquet", target="embedding")


# parts


@pytest.mark.parametrize(
    ("name", "of_test"),
    [
        *((name, True) for name in ("istest", "is_test", "isTest", "test", "in_test", "test_set", "testset",
                                    "IS_TEST", "holdout", "hold_out", "is Holdout", "validation")),
        *((name, False) for name in ("train", "is_train", "isTraining")),
        *((name, None) for name in ("latest", "not_test", "isNotTest", "no-test", "non_train", "contest",
                                    "trainer", "invalid", "test_or_train")),
    ],
)  # fmt: skip
def test_truth_values_are_of_the_part_that_a_word_of_the_name_says(name: str, of_test: bool | None) -> None:
    column = pd.Series([1, 0, 0], name=name)
    if of_test is None:
        with pytest.raises(InputError, match="expected train and test"):
            parts(column, str)
    else:
        train, test, _ = parts(column, str)
        assert (test.tolist(), train.tolist()) == (([0], [1, 2]) if of_test else ([1, 2], [0]))


# per cent


def test_cells_with_and_without_per_cent_signs_are_said(tmp_path: Path) -> None:
    said = "cells with and without % are read alike"
    data = loaded(tmp_path, table(rate=["15%", "0.28", "-", "7 %"] * (N // 4)))
    assert f"rate has 15% and 0.28: {said}" in data.decisions
    assert set(shown(data, "rate").values()) >= {15.0, 0.28, 7.0}
    alike = loaded(tmp_path, table(rate=["15%", "28%", "-", "7 %"] * (N // 4)))
    assert not any(said in line for line in alike.decisions)
    of_target = loaded(tmp_path, table().assign(y=["15%", "0.28", "7.5%", "3"] * (N // 4)), task="regression")
    assert f"y has 15% and 0.28: {said}" in of_target.decisions


# the cleaned table


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["t.csv", "t.xlsx"])
def test_the_cleaned_table_has_names_if_the_file_has_them(tmp_path: Path, header: bool, name: str) -> None:
    frame = pd.DataFrame([["a", "01"], ["b", "1.50"], ["c", "x"]], columns=["p", "q"])
    if name.endswith("xlsx"):
        frame.to_excel(tmp_path / name, index=False, header=header)
    else:
        frame.to_csv(tmp_path / name, index=False, header=header)
    data = CsvData(str(tmp_path / name), header=header)
    audit = Audit(
        pd.DataFrame(columns=list(ROWS)),
        cleaned=cleaned(data.table(), Origin.counted(3), [1]),
        summary={"task": "regression"},
    )
    audit.save(tmp_path / "out")
    assert (tmp_path / "out" / "cleaned.csv").read_text() == "p,q\n" * header + "a,01\nc,x\n"
    again = Audit.load(tmp_path / "out")
    assert again.summary == {"task": "regression"}
    assert again.cleaned is not None
    assert again.cleaned.to_numpy().tolist() == [["a", "01"], ["c", "x"]]
    assert list(again.cleaned) == (["p", "q"] if header else ["0", "1"])
