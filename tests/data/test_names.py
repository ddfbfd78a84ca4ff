"""Instances keep the names that they have in the user's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fimo.data.bundled import BundledData
from fimo.data.concrete import ConcreteData
from fimo.data.csv import CsvData
from fimo.data.custom import CustomData
from fimo.data.datamodule import InstancesModule
from fimo.data.fico import FEATURES, TARGET, FicoData
from fimo.data.idx import IdxData
from fimo.data.image import ImageData
from fimo.data.language import LanguageData
from fimo.data.text import TextData
from fimo.errors import InputError
from tests.data.test_idx import write

SPLITS = ("train", "test")


def table() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.normal(size=(40, 2)).round(3), columns=["a", "b"])
    frame.insert(0, "house", [f"H{k:03d}" for k in range(100, 140)])
    frame["street"] = [f"street {k % 5}" for k in range(40)]
    frame["y"] = frame["a"] * 2 + 1
    frame.loc[[3, 17], "b"] = np.nan
    return frame


def loaded(data: InstancesModule) -> InstancesModule:
    data.setup()
    return data


def csv_data(folder: Path, frame: pd.DataFrame, **arguments: object) -> InstancesModule:
    path = folder / "houses.csv"
    frame.to_csv(path, index=False)
    return loaded(CsvData(str(path), target="y", **arguments))  # type: ignore[arg-type]


def test_a_tables_rows_keep_number_name_and_what_is_no_feature_through_dropping_and_splitting(
    tmp_path: Path,
) -> None:
    frame = table()
    data = csv_data(tmp_path, frame, id="house", drop=["street"], missing="drop")
    rows = np.concatenate([data.origin(split).row for split in SPLITS])
    assert sorted(rows) == [k for k in range(40) if k not in (3, 17)]
    for split in SPLITS:
        origin = data.origin(split)
        chosen = frame.iloc[origin.row]
        assert origin.id == tuple(chosen["house"])
        assert origin.source == "houses.csv"
        assert origin.beside is not None
        assert origin.beside["street"].tolist() == chosen["street"].tolist()
        shown = data.named(split, 2)
        assert shown.data_row == origin.row[2]
        assert shown.id == chosen["house"].iloc[2]
        assert shown.row == {
            "a": chosen["a"].iloc[2], "b": chosen["b"].iloc[2], "street": chosen["street"].iloc[2]
        }  # fmt: skip
    order = torch.argsort(data.train.inputs[:, 0])  # type: ignore[index]
    in_file = frame["a"].to_numpy()[data.origin("train").row]
    assert order.tolist() == np.argsort(in_file).tolist(), "row numbers are those of the values"


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"house": "H1"}, {"id": "house"}, r"dataset\.id: several rows are called H1"),
        ({}, {"id": "hous"}, r"dataset\.id: no column 'hous'; did you mean house\?"),
        (
            {"house": [None, *range(39)]},
            {"id": "house"},
            r"dataset\.id: column 'house' is empty in data row 0",
        ),
        ({}, {"id": "y"}, r"dataset\.id: column 'y' is the target"),
    ],
)
def test_ids_that_name_no_row_are_refused(tmp_path: Path, change: dict, arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        csv_data(tmp_path, table().assign(**change), drop=["street"], missing="drop", **arguments)


def test_errors_give_the_files_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = ["a,y", *(f"{k},{k * k % 7}" for k in range(12))]
    lines[4] = "x,3"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"column 'a' has 'x' in data row 3 \(line 5\)"):
        loaded(CsvData(str(path)))
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    with pytest.raises(InputError, match=r"in data row 3 \(line 6\)"):
        loaded(CsvData(str(path)))
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]))  # rows and lines no longer go together
    with pytest.raises(InputError, match=r"in data row 3 among"):
        loaded(CsvData(str(path)))


def test_texts_keep_their_rows_through_the_draw_and_their_ids(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"nr": [f"r{k}" for k in range(30)], "text": [f"film {k}" for k in range(30)],
         "label": [k % 2 for k in range(30)], "source": ["web"] * 30}
    )  # fmt: skip
    frame.to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    frame.iloc[:8].to_csv(tmp_path / "validation.tsv", sep="\t", index=False)
    data = loaded(TextData(str(tmp_path), tokenizer="bytes", id="nr", train_size=11, test_size=5))
    assert data.origin("test").row.tolist() == [0, 1, 2, 3, 4]
    assert len(data.origin("train")) == 11
    for k, row in enumerate(data.origin("train").row):
        shown = data.named("train", k)
        assert (shown.text, shown.id, shown.row) == (f"film {row}", f"r{row}", {"source": "web"})
    one = loaded(TextData(str(tmp_path / "train.tsv"), tokenizer="bytes"))
    rows = [row for split in SPLITS for row in one.origin(split).row]
    assert sorted(rows) == list(range(30))
    assert one.named("test", 0).text == f"film {one.origin('test').row[0]}"
    frame.loc[4, "nr"] = "r3"
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    with pytest.raises(InputError, match=r"dataset\.id: several rows are called r3"):
        loaded(TextData(str(tmp_path / "t.jsonl"), tokenizer="bytes", id="nr"))


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_ids_of_texts_stay_as_they_are_written(tmp_path: Path, suffix: str) -> None:
    numbers = ["007", "7", "1.50", "NA", *(f"{k:04}" for k in range(16))]
    frame = pd.DataFrame({"nr": numbers, "text": [f"film {k}" for k in range(20)], "label": [0, 1] * 10})
    frame.to_csv(tmp_path / f"all.{suffix}", sep="\t" if suffix == "tsv" else ",", index=False)
    data = loaded(TextData(str(tmp_path / f"all.{suffix}"), tokenizer="bytes", id="nr"))
    assert sorted(i for split in SPLITS for i in data.origin(split).ids) == sorted(numbers)


def test_images_are_called_by_their_files(tmp_path: Path) -> None:
    for split in SPLITS:
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (4, 4), (40 * k, 0, 0)).save(tmp_path / split / name / f"{k}.png")
    data = loaded(ImageData(str(tmp_path), train_size=4))
    origin = data.origin("train")
    files = [f"{name}/{k}.png" for name in ("cat", "dog") for k in range(3)]
    assert list(origin.ids) == [files[row] for row in origin.row]
    apart = loaded(ImageData(str(tmp_path / "train"), test_path=str(tmp_path / "test")))
    assert torch.equal(apart.train.inputs, loaded(ImageData(str(tmp_path))).train.inputs)  # type: ignore[arg-type]
    assert apart.origin("test").ids == files
    assert [i.split("/")[0] for i in origin.ids] == [data.class_names[t] for t in data.train.targets]


def test_elements_of_ones_own_are_called_by_a_column(tmp_path: Path) -> None:
    elements = [{"x": [k / 10, 1.0], "label": k % 2, "name": f"e{k}"} for k in range(8)]
    data = loaded(CustomData(elements, elements[:3], id="name"))
    assert data.origin("test").ids == ["e0", "e1", "e2"]
    assert set(data.train.inputs) == {"x"}
    frame = pd.DataFrame({"x": np.arange(8.0), "z": 1.0, "label": [0, 1] * 4, "name": list("abcdefgh")})
    framed = loaded(CustomData(frame, frame.iloc[2:5], id="name"))
    assert framed.origin("test").ids == ["c", "d", "e"]
    assert framed.train.inputs.shape == (8, 2)  # type: ignore[union-attr]
    with pytest.raises(
        InputError, match=r"dataset\.id: no column 'nam' in dataset\.train; did you mean name"
    ):
        loaded(CustomData(elements, elements, id="nam"))


def test_rows_of_the_papers_sets_are_those_of_their_source(tmp_path: Path) -> None:
    data = loaded(BundledData("diabetes"))
    assert sorted(np.concatenate([data.origin(s).row for s in SPLITS])) == list(range(442))
    generator = np.random.default_rng(1)
    mixes = generator.uniform(1, 2, (20, 9)).round(4)
    (tmp_path / "concrete.txt").write_text("\n".join(" ".join(map(str, row)) for row in mixes))
    concrete = loaded(ConcreteData(str(tmp_path / "concrete.txt")))
    cement = [concrete.named("train", k).row["cement"] for k in range(18)]  # type: ignore[index]
    assert cement == mixes[concrete.origin("train").row, 0].tolist()
    credit = pd.DataFrame(generator.integers(1, 9, (30, len(FEATURES))), columns=list(FEATURES))
    credit.iloc[[0, 7]] = -9  # no record at all: dropped
    credit.insert(0, TARGET, ["Good", "Bad"] * 15)
    credit.to_csv(tmp_path / "fico.csv", index=False)
    fico = loaded(FicoData(str(tmp_path / "fico.csv")))
    rows = np.concatenate([fico.origin(s).row for s in SPLITS])
    assert sorted(rows) == [k for k in range(30) if k not in (0, 7)]
    assert [fico.display("train", k).target for k in range(5)] == [
        credit[TARGET][row] for row in fico.origin("train").row[:5]
    ]


def test_passages_are_counted_through_the_files(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"passage number {k}" for k in range(12)))
    data = loaded(LanguageData(str(tmp_path)))
    for split in SPLITS:
        for k, row in enumerate(data.origin(split).row):
            assert str(data.named(split, k).text).endswith(f" {row}")


def texts_of(folder: Path) -> InstancesModule:
    rows = [f"film {k},{'no' if k % 3 else 'yes'}" for k in range(12)]
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    return TextData(str(folder), tokenizer="bytes")


def images_of(folder: Path) -> InstancesModule:
    for k in range(12):
        for split in SPLITS:
            path = folder / split / ("cat" if k % 3 else "dog") / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 20 * k).save(path)
    return ImageData(str(folder), channels=1)


def digits_of(folder: Path) -> InstancesModule:
    write(folder, "train", 12)
    write(folder, "t10k", 4)
    return IdxData(str(folder))


def elements_of(folder: Path) -> InstancesModule:
    elements = [{"x": [k / 10, 1.0], "z": k, "label": k % 3} for k in range(12)]
    return CustomData(elements, elements[:3])


@pytest.mark.parametrize("source", [texts_of, images_of, digits_of, elements_of])
def test_what_is_shown_is_the_instance_itself_where_others_are_held_out(
    tmp_path: Path, source: Callable[[Path], InstancesModule]
) -> None:
    data = loaded(source(tmp_path))
    whole = [data.display("train", k) for k in range(12)]
    data.hold_out(0.3)
    rows = data.origin("train").row
    assert len(rows) == 8
    assert [data.shown("train", k) for k in range(8)] == [whole[row] for row in rows]
    assert data.shown_targets("train") == [whole[row].target for row in rows]
    assert [data.display("train", k) for k in range(12)] == whole
