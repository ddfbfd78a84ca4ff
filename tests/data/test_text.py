"""Labelled texts: tokenised once, padded, drawn; clear answers to bad files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fimo.data.reading import Form, read_file
from fimo.data.text import TextData, read_table
from fimo.data.tokens import ByteTokens, ModelTokens, make_tokens
from fimo.errors import InputError
from tests.models.folders import save_tokenizer

FIMO_DATA = os.environ.get("FIMO_DATA")
TRAIN = "sentence\tlabel\n" + "\n".join(
    f'{"a good" if k % 2 else "the very dull"} "film" {"bright " * (k % 4)}\t{k % 2}' for k in range(20)
)
TEST = "sentence\tlabel\na bad film\t0\nnull\t1\ngood\t1\n"


def folder(tmp_path: Path, train: str = TRAIN, test: str = TEST) -> Path:
    (tmp_path / "train.tsv").write_text(train)
    (tmp_path / "validation.tsv").write_text(test)
    return tmp_path


def text_data(path: Path, **arguments: object) -> TextData:
    settings = {"tokenizer": "bytes", "text": "sentence", "class_names": ["negative", "positive"]}
    data = TextData(str(path), **{**settings, **arguments})  # type: ignore[arg-type]
    data.setup()
    return data


def test_texts_become_padded_indices_with_a_mask(tmp_path: Path) -> None:
    data = text_data(folder(tmp_path))
    assert isinstance(data.test.inputs, dict)
    ids, mask = data.test.inputs["input_ids"], data.test.inputs["attention_mask"]
    longest = max(len(line.split("\t")[0].encode()) for line in TRAIN.splitlines()[1:]) + 1
    assert ids.shape == mask.shape == (3, longest)
    assert mask.sum(1).tolist() == [11, 5, 5]
    assert ids[1].tolist() == [*b"null", ByteTokens.end, *[ByteTokens.padding] * (longest - 5)]
    assert data.test.targets.tolist() == [0, 1, 1]
    assert (data.inputs, data.outputs, len(data.train)) == (258, 2, 20)


def test_quotation_marks_and_the_word_null_are_text(tmp_path: Path) -> None:
    data = text_data(folder(tmp_path))
    assert data.display("train", 0).text == 'the very dull "film"'
    assert data.display("test", 1).text == "null"
    assert data.display("test", 1).target == "positive"
    assert data.prediction(torch.tensor([2.0, 1.0])) == "negative"


def test_long_texts_keep_the_token_that_ends_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = text_data(folder(tmp_path), max_length=6)
    assert isinstance(data.test.inputs, dict)
    assert data.test.inputs["input_ids"][0].tolist() == [*b"a bad", ByteTokens.end]
    assert "21 of 23 texts are cut to 6 tokens" in caplog.text


def test_training_texts_are_drawn_by_seed_and_test_texts_are_the_first(tmp_path: Path) -> None:
    path = folder(tmp_path)
    first, again = (text_data(path, train_size=8, test_size=2) for _ in range(2))
    other = text_data(path, train_size=8, split_seed=1)
    shown = [[d.display("train", i) for i in range(8)] for d in (first, again, other)]
    assert shown[0] == shown[1] != shown[2]
    assert first.test.targets.tolist() == [0, 1]


def test_one_file_is_split(tmp_path: Path) -> None:
    rows = ["text,label", *(f"text {k},{'yes' if k % 3 else 'no'}" for k in range(20))]
    (tmp_path / "all.csv").write_text("\n".join(rows))
    data = TextData(str(tmp_path / "all.csv"), tokenizer="bytes", test_size=0.2)
    data.setup()
    assert (len(data.train), len(data.test), data.class_names) == (16, 4, ("no", "yes"))


def test_all_formats_hold_the_same_texts(tmp_path: Path) -> None:
    path = folder(tmp_path)
    frame = read_table(path / "train.tsv")
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for name in ("t.csv", "t.jsonl"):
        assert read_table(tmp_path / name)["sentence"].tolist() == frame["sentence"].tolist()
    pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is not installed")
    frame.to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet")["sentence"].tolist() == frame["sentence"].tolist()


@pytest.mark.parametrize(
    ("train", "test", "arguments", "key", "said"),
    [
        (
            TRAIN + "\n   \t1",
            TEST,
            {},
            "dataset.path",
            "the sentence in data row 20 (line 22) of the train data is empty",
        ),
        (
            TRAIN,
            TEST + "fine\t2\n",
            {},
            "dataset.target",
            "label '2' in data row 3 (line 5) of the test data is not among",
        ),
        (TRAIN, TEST, {"text": "words"}, "dataset.text", "no column 'words' in the train data"),
        (TRAIN, "sentence\tlabel\n", {}, "dataset.path", "the test data have no rows"),
        (TRAIN, TEST, {"tokenizer": None}, "dataset.tokenizer", "must be given; a text model"),
        (TRAIN, TEST, {"max_length": 0}, "dataset.max_length", "expected a positive number"),
        (TRAIN.replace("\t1", "\t0"), TEST, {"class_names": None}, "dataset.target", "has 1 classes"),
    ],
)
def test_bad_texts_are_answered_by_key(
    tmp_path: Path, train: str, test: str, arguments: dict, key: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        text_data(folder(tmp_path, train, test), **arguments)
    assert caught.value.key == key
    assert said in caught.value.problem
    assert "\n" not in str(caught.value)


def test_missing_files_and_an_unreachable_hub_are_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"holds no train file"):
        text_data(tmp_path)
    with pytest.raises(InputError, match=r"no such file"):
        text_data(tmp_path / "none.tsv")
    with pytest.raises(InputError, match=r"must be given: a folder with train"):
        TextData(tokenizer="bytes").setup()
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"the data set 'glue:sst2' is not here, and HF_HUB_OFFLINE is set"):
        TextData(hub="glue:sst2", tokenizer="bytes").setup()


def test_a_models_tokenizer_adds_its_special_tokens_and_its_limit(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_tokenizer(tmp_path, longest=5)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 16}')
    tokens = ModelTokens(str(tmp_path))
    assert (tokens.vocabulary, tokens.padding, tokens.longest) == (12, 0, 5)
    assert tokens.encode(["a good film"])[0] == [2, 7, 4, 6, 3]
    assert tokens.encode(["a good film"], special=False)[0] == [7, 4, 6]
    assert tokens.decode([2, 7, 4, 6, 3, 0]) == "a good film"
    (tmp_path / "data").mkdir()
    data = text_data(folder(tmp_path / "data"), tokenizer=str(tmp_path))
    assert isinstance(data.train.inputs, dict)
    assert data.train.inputs["input_ids"].shape == (20, 5)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset.tokenizer: .* has no tokenizer that can be read"):
        make_tokens(str(tmp_path))


def test_bytes_round_trip_any_text() -> None:
    tokens = ByteTokens()
    assert tokens.decode(tokens.encode(["naïve, 日本"])[0]) == "naïve, 日本"


@pytest.mark.skipif(FIMO_DATA is None, reason="FIMO_DATA is not set")
def test_sst2_is_read_as_it_is_published() -> None:
    data = text_data(Path(str(FIMO_DATA)) / "sst2", train_size=100)
    assert (len(data.train), len(data.test)) == (100, 872)
    assert 0.4 < float(data.test.targets.double().mean()) < 0.6


def test_a_test_file_a_column_of_parts_and_json_lines_are_the_same_texts(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"text": [f"film {k}" for k in range(30)], "label": ["no", "yes"] * 15,
         "part": ["Test" if k % 5 == 0 else "train" for k in range(30)]}
    )  # fmt: skip
    frame.to_csv(tmp_path / "all.csv", index=False)
    is_test = frame["part"] == "Test"
    frame[~is_test].to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    frame[is_test].to_json(tmp_path / "more.jsonl", orient="records", lines=True)
    column = text_data(str(tmp_path / "all.csv"), text="text", split="part", class_names=None)
    files = text_data(
        str(tmp_path / "train.jsonl"), text="text", test_path=str(tmp_path / "more.jsonl"), class_names=None
    )
    for split in ("train", "test"):
        one, other = getattr(column, split).tensors(), getattr(files, split).tensors()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert column.origin("test").row.tolist() == np.flatnonzero(is_test).tolist()
    assert "6 test rows (test)" in column.decisions[0]
    assert files.origin("test").where(2) == "data row 2 (line 3)"
    with pytest.raises(InputError, match=r"dataset\.split: no column 'parts'"):
        text_data(str(tmp_path / "all.csv"), text="text", split="parts", class_names=None)


def test_the_classes_column_may_still_be_called_label(tmp_path: Path) -> None:
    rows = ["text,kind", *(f"text {k},{'yes' if k % 3 else 'no'}" for k in range(20))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    for name in ("target", "label"):
        data = text_data(str(tmp_path / "t.csv"), text="text", class_names=None, **{name: "kind"})
        assert data.class_names == ("no", "yes")


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["all.csv", "all.tsv"])
def test_texts_that_look_like_numbers_and_the_cleaned_table_are_as_they_are_written(
    tmp_path: Path, name: str
) -> None:
    texts = [f"{37 * k % 1000:06}" for k in range(18)] + ["0.00", "12345678901234567890"]
    separator = "\t" if name.endswith("tsv") else ","
    rows = [(text, str(k % 2), f"0{k}.50", "TRUE") for k, text in enumerate(texts)]
    lines = [separator.join(row) for row in [("text", "label", "price", "new"), *rows]]
    path = written(tmp_path / name, *lines)
    data = text_data(path, text="text", class_names=None)  # type: ignore[arg-type]
    assert isinstance(data.train.inputs, dict)
    for k, row in enumerate(data.origin("train").row):
        assert data.display("train", k).text == texts[row]
        assert bytes(i for i in data.train.inputs["input_ids"][k] if i < 256).decode() == texts[row]
    assert data.class_names == ("0", "1")
    assert data.table().to_csv(index=False, sep=separator) == Path(path).read_text()


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "2", "1", "02"], ("1", "2", "10")),
        (["1.0", "0.0", "1", "0"], ("0", "1")),
        (["TRUE", "false", "True", "FALSE"], ("False", "True")),
        (["pos ", "neg", "pos", "neg"], ("neg", "pos")),
        (["b", "01", "1", "b"], ("01", "1", "b")),
        ([1, "1", 0, "0"], ("0", "1")),
        ([1.0, 0.0, 1.0, 0.0], ("0", "1")),
        ([True, False, "true", "False"], ("False", "True")),
        (
            ["12345678901234567890", "12345678901234567891"] * 2,
            ("12345678901234567890", "12345678901234567891"),
        ),
    ],
)
def test_labels_are_called_as_a_tables_classes_are(tmp_path: Path, labels: list, names: tuple) -> None:
    rows = [{"text": f"film {k}", "label": label} for k, label in enumerate(labels * 5)]
    lines = [json.dumps(row) for row in rows]
    found = [TextData(written(tmp_path / "t.jsonl", *lines), tokenizer="bytes")]
    if all(isinstance(label, str) for label in labels):
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        found.append(TextData(written(tmp_path / "t.csv", *lines), tokenizer="bytes"))
    for data in found:
        data.setup()
        assert data.class_names == names


@pytest.mark.parametrize(
    ("given", "labels", "targets"),
    [
        ([1, 0], [0, 1], [1, 0]),
        (["1", "0"], [0, 1], [1, 0]),
        ([1, 2], [1, 2], [0, 1]),
        ([1, 2], [0, 1], [0, 1]),
        (["no", "yes"], ["yes", "00"], None),
        (["no", "yes"], ["01", "00"], [1, 0]),
        (["007", "08"], ["007", "08"], [0, 1]),
    ],
)
def test_given_classes_are_names_or_else_those_of_the_numbers(
    tmp_path: Path, given: list, labels: list, targets: list | None
) -> None:
    lines = ["text,label", *(f"film {k},{labels[k % 2]}" for k in range(8))]
    path = written(tmp_path / "t.csv", *lines)
    data = TextData(path, test_path=path.replace("t.csv", "u.csv"), tokenizer="bytes", class_names=given)
    written(tmp_path / "u.csv", *lines)
    if targets is None:
        with pytest.raises(
            InputError, match=r"dataset\.target: label '00' in data row 1 \(line 3\) of the train"
        ):
            data.setup()
        return
    data.setup()
    assert data.train.targets.tolist() == data.test.targets.tolist() == targets * 4


def test_a_line_with_more_cells_than_the_header_is_refused(tmp_path: Path) -> None:
    lines = ["text,label", *(f"a film {k},{k % 2}," for k in range(8))]
    for name, given in (("t.csv", lines), ("t.tsv", [line.replace(",", "\t") for line in lines])):
        with pytest.raises(
            InputError, match=rf"{name} is not a table .*: line 2 has 3 cells where the first has 2"
        ):
            text_data(written(tmp_path / name, *given), text="text")  # type: ignore[arg-type]
    lines = ["text,label", *(f'"a film, {k}",{k % 2}' for k in range(8))]
    assert len(text_data(written(tmp_path / "t.csv", *lines), text="text").train) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['"broken,0', "fine,1"], "begins in line 4 is never closed"),
        (['"broken,0', "fine,1", '"well, quoted",0'], "begins in line 4 is followed by text in line 6"),
        (['"one', 'two",1', '"broken,0', '"fine",1'], "begins in line 6 is followed by text in line 7"),
        (['"broken,0', "fine,1", '5",0'], "begins in line 4 holds whole rows, up to line 6"),
        (['"good\n\n""film"", 1\n2; 3",1', '5" wide,0', "'\"',1"], None),
        (['"scored 4,1\nor so",1', '"x, 1\ny, 0\nz",1'], None),
        (['"hello" he said,1'], None),
    ],
)
def test_a_quotation_mark_that_swallows_rows_is_refused_with_its_line(
    tmp_path: Path, lines: list[str], said: str | None
) -> None:
    path = Path(written(tmp_path / "t.csv", "text,label", "a,0", "b,1", *lines))
    for read in (read_table, lambda path: read_file(path, Form())[0]):
        if said is None:
            assert len(read(path)) == 2 + len(lines)
        else:
            with pytest.raises(InputError, match=said):
                read(path)


def test_lines_of_json_are_read_under_either_name_and_what_is_neither_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "é", "label": 1}, {"text": "b", "label": 0}]
    path = tmp_path / "t.json"
    written(path, *map(json.dumps, rows))
    for read in (read_table, lambda path: read_file(path, Form())[0]):
        path.write_text("\n".join(map(json.dumps, rows)))
        assert read(path).to_dict("records") == rows
        path.write_text(json.dumps(rows))
        assert read(path).to_dict("records") == rows
        for content, said in (
            ('{"text": 1}\noops', "line 2 of .* is no JSON value by itself: .*expected a list of rows, col"),
            ('[{"text": 1}', "is no JSON: .*expected a list of rows"),
            ("null", "holds no table"),
            ("3", "holds no table"),
        ):
            path.write_text(content)
            with pytest.raises(InputError, match=said):
                read(path)
        for name in ("l.json", "l.jsonl"):
            (tmp_path / name).write_bytes(json.dumps(rows[0], ensure_ascii=False).encode("latin-1"))
            with pytest.raises(InputError, match=f"{name} is not UTF-8 text, as JSON is"):
                read(tmp_path / name)
    latin = read_file(tmp_path / "l.jsonl", Form(encoding="latin-1"))[0]
    assert latin.to_dict("records") == rows[:1]


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"text": ["a", "b"], "label": 1}, {}, r"dataset\.text: column 'text' of the whole data holds lists"),
        ({"text": "a", "label": [1]}, {}, r"dataset\.target: column 'label' holds lists"),
        (
            {"text": "a", "label": 1},
            {"split": "part", "test_size": 0.2},
            r"dataset\.test_size: the data have a test",
        ),
        (
            {"text": "a", "label": 1},
            {"test_path": "t", "test_size": 0.2},
            r"dataset\.test_size: the data have a test",
        ),
    ],
)
def test_lists_and_a_share_of_data_with_a_test_part_are_refused(
    tmp_path: Path, row: dict, settings: dict, said: str
) -> None:
    path = written(tmp_path / "t.jsonl", *[json.dumps(row)] * 8)
    with pytest.raises(InputError, match=said):
        TextData(path, tokenizer="bytes", **settings).setup()


def test_a_column_of_parts_may_be_written_as_decimals(tmp_path: Path) -> None:
    lines = ["text,label,test", *(f"film {k},{k % 2},{'1.0' if k > 5 else '0.0'}" for k in range(8))]
    data = text_data(written(tmp_path / "t.csv", *lines), text="text", split="test")  # type: ignore[arg-type]
    assert data.origin("test").row.tolist() == [6, 7]
