"""Passages and completions: what each position predicts, and where no loss is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fimo.data.instances import IGNORED
from fimo.data.language import LanguageData
from fimo.data.passages import Columns, pieces, read_passages
from fimo.data.tokens import ByteTokens, WordTokens
from fimo.errors import InputError

END, PAD = ByteTokens.end, ByteTokens.padding


def corpus(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("abc\n\nde\n\n\nfghij\n")
    (tmp_path / "texts" / "two.txt").write_text("klm\n\nnopqr")
    return tmp_path / "texts"


def language_data(path: Path, **arguments: object) -> LanguageData:
    data = LanguageData(str(path), **arguments)  # type: ignore[arg-type]
    data.setup()
    return data


def prompts(tmp_path: Path, text: str = "prompt\tcompletion\nab\tc\nfgh\tij\n") -> str:
    (tmp_path / "prompts.tsv").write_text(text)
    return str(tmp_path / "prompts.tsv")


def test_each_position_predicts_the_next_token(tmp_path: Path) -> None:
    data = language_data(corpus(tmp_path), prompts=prompts(tmp_path))
    assert isinstance(data.train.inputs, dict)
    ids, targets = data.train.inputs["input_ids"], data.train.targets
    assert ids[1].tolist() == [*b"de", *[PAD] * 3]
    assert targets[1].tolist() == [ord("e"), END, *[IGNORED] * 3]
    assert len(data.train) == 5
    assert (data.inputs, data.outputs, data.task) == (258, 258, "language_modelling")


def test_a_completions_loss_covers_its_own_tokens_only(tmp_path: Path) -> None:
    data = language_data(corpus(tmp_path), prompts=prompts(tmp_path))
    assert isinstance(data.test.inputs, dict)
    assert data.test.inputs["input_ids"].tolist() == [[*b"ab", PAD, PAD, PAD], [*b"fghi", PAD]]
    assert data.test.targets.tolist() == [
        [IGNORED, ord("c"), IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, ord("i"), ord("j"), IGNORED],
    ]
    shown = data.display("test", 1)
    assert (shown.text, shown.target) == ("fgh ▸ …", "ij")


def test_passages_are_held_out_where_no_prompts_are_given(tmp_path: Path) -> None:
    data = language_data(corpus(tmp_path), test_size=2)
    texts = [data.display(s, i).text for s in ("train", "test") for i in range(len(getattr(data, s)))]
    assert sorted(map(str, texts)) == ["abc", "de", "fghij", "klm", "nopqr"]
    assert len(data.test) == 2
    assert data.display("train", 0).target in ("one.txt", "two.txt")


def test_long_passages_become_pieces_of_about_equal_size() -> None:
    assert [len(p) for p in pieces(range(10), 4)] == [4, 3, 3]
    assert pieces(range(3), 8) == [[0, 1, 2]]
    assert pieces([7], 8) == []


def test_predictions_are_read_as_text(tmp_path: Path) -> None:
    data = language_data(corpus(tmp_path))
    outputs = torch.nn.functional.one_hot(torch.tensor([*b"hey", END]), 258).float()
    assert data.prediction(outputs) == "hey"


@pytest.mark.parametrize(
    ("arguments", "table", "key", "said"),
    [
        ({"length": 1}, None, "dataset.length", "at least 2 tokens"),
        (
            {"length": 3},
            "prompt\tcompletion\nabc\tde\n",
            "dataset.length",
            "row 0 .* has 5 tokens.*at least 4",
        ),
        ({}, "prompt\tanswer\nabc\tde\n", "dataset.prompts", "no column 'completion'"),
        (
            {},
            "prompt\tcompletion\nabc\t \n",
            "dataset.prompts",
            r"the completion in data row 0 \(line 2\) of .* is empty",
        ),
    ],
)
def test_bad_settings_and_prompts_are_refused(
    tmp_path: Path, arguments: dict, table: str | None, key: str, said: str
) -> None:
    given = {} if table is None else {"prompts": prompts(tmp_path, table)}
    with pytest.raises(InputError, match=said) as caught:
        language_data(corpus(tmp_path), **arguments, **given)
    assert caught.value.key == key


def test_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.txt file"):
        language_data(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a UTF-8 text file"):
        language_data(tmp_path)
    (tmp_path / "a.txt").write_text("only\n\ntwo")
    with pytest.raises(InputError, match="holds 2 passages"):
        language_data(tmp_path)


def test_passages_to_explain_may_come_from_another_file(tmp_path: Path) -> None:
    for name, count in (("book.txt", 9), ("new.txt", 3)):
        (tmp_path / name).write_text("\n\n".join(f"passage {k} of {name}" for k in range(count)))
    data = LanguageData(str(tmp_path / "book.txt"), test_path=str(tmp_path / "new.txt"))
    data.setup()
    assert (len(data.train), len(data.test)) == (9, 3)
    assert [str(data.named("test", k).text).split(" of ")[1] for k in range(3)] == ["new.txt"] * 3
    assert data.origin("train").row.tolist() == list(range(9))


def rows(tmp_path: Path, *records: dict[str, object]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_a_table_of_texts_is_read_row_by_row(tmp_path: Path) -> None:
    path = rows(tmp_path, *({"text": f"row {k} of it", "name": f"n{k}", "by": "me"} for k in range(10)))
    data = language_data(path, id="name", test_size=2)
    for split, k in (("train", 3), ("test", 1)):
        shown = data.named(split, k)  # type: ignore[arg-type]
        assert (shown.text, shown.id, shown.row) == (
            f"row {shown.data_row} of it", f"n{shown.data_row}", {"by": "me"},
        )  # fmt: skip
    assert len(data.table()) == 10


def test_training_rows_may_be_prompts_with_completions(tmp_path: Path) -> None:
    path = rows(tmp_path, *({"prompt": "ab", "completion": "cd"} for _ in range(5)))
    data = language_data(path, test_size=1)
    assert data.train.targets[0].tolist() == [IGNORED, ord("c"), ord("d")]
    outputs = torch.nn.functional.one_hot(torch.tensor([*b"xcd"]), 258).float()
    assert data.predicted("train", 0, outputs) == "cd"
    assert data.pieces("train", 0) == ("a", "b", "c", "d")


def test_long_rows_are_pieces_of_a_table_of_their_own_and_held_out_whole(tmp_path: Path) -> None:
    path = rows(tmp_path, *({"text": f"{'ab' * k}.", "name": k} for k in range(1, 9)))
    data = language_data(path, id="name", length=6, test_size=2)
    table = data.table()
    for split in ("train", "test"):
        for k in range(len(getattr(data, split))):
            shown = data.named(split, k)  # type: ignore[arg-type]
            assert shown.text == table["text"][shown.data_row]
    names = [[str(i).split("/")[0] for i in data.origins[s].ids] for s in ("train", "test")]  # type: ignore[index]
    assert not set(names[0]) & set(names[1])
    assert sum(map(len, table["text"])) == sum(2 * k + 1 for k in range(1, 9))


def test_each_token_may_be_a_test_instance(tmp_path: Path) -> None:
    arguments = {"path": corpus(tmp_path), "prompts": prompts(tmp_path)}
    whole, each = language_data(**arguments), language_data(**arguments, explain="token")
    assert each.origin("test").ids == ["0:2", "1:3", "1:4"]
    assert each.shown_targets("test") == ["c", "i", "j"]
    assert each.pieces("test", 1) == ("f", "g", "h", "i")
    together = torch.stack([each.test.targets[0], each.test.targets[1:].max(0).values])
    assert torch.equal(together, whole.test.targets)


def test_words_are_tokens_and_unknown_ones_are_said(tmp_path: Path) -> None:
    tokens = WordTokens(["A cat, a <unk> dog's cat.", "a cat"], most=3)
    assert tokens.words[3:] == ["cat", "a", ","]
    assert tokens.encode(["a cow,"]) == [[4, tokens.unknown, 5, tokens.end]]
    assert tokens.decode([4, 3, 5, 3, tokens.end, tokens.padding]) == "a cat, cat"
    assert tokens.pieces([4, 3, 5, tokens.end]) == ["a", " cat", ",", "¶"]
    data = language_data(corpus(tmp_path), prompts=prompts(tmp_path), tokenizer="words")
    assert data.decisions == ("2 of 2 test instances hold unknown words",)
    assert data.outputs == 5 + 3


def test_a_character_of_several_tokens_is_shown_with_its_last() -> None:
    tokens = ByteTokens()
    assert tokens.pieces(tokens.encode(["né"])[0]) == ["n", "", "é", "¶"]


@pytest.mark.parametrize(
    ("records", "arguments", "key", "said"),
    [
        (
            [{"words": "a"}],
            {},
            "dataset.path",
            "no column 'text', nor 'prompt' and 'completion'; it has words",
        ),
        ([{"prompt": "a"}], {}, "dataset.path", "no column 'completion'; it has prompt"),
        ([{"text": "a"}, {"text": " "}], {}, "dataset.path", "text in data row 1 .* is empty"),
        ([{"text": "abc"}] * 9, {"id": "name"}, "dataset.id", "no column 'name'"),
        ([{"text": "abc"}] * 9, {"explain": "word"}, "dataset.explain", "instance or token"),
    ],
)
def test_bad_tables_are_refused(
    tmp_path: Path, records: list[dict], arguments: dict, key: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        language_data(rows(tmp_path, *records), **arguments)
    assert caught.value.key == key


def test_text_files_have_no_identifiers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text files have no columns"):
        language_data(corpus(tmp_path), id="name")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_completions_that_are_numbers_are_as_they_are_written(tmp_path: Path, name: str) -> None:
    rows = [("1+2=", 3), ("1+1.5=", 2.5)] if name == "t.jsonl" else [("code", "0228"), ("1.50", "06")]
    if name == "t.jsonl":
        lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
    else:
        separator = "," if name == "t.csv" else "\t"
        lines = [separator.join(row) for row in [("prompt", "completion"), *rows]]
    (tmp_path / name).write_text("\n".join(lines))
    found = read_passages(str(tmp_path / name), "dataset.prompts", Columns(), prompts=True)
    assert found.prompts == tuple(prompt for prompt, _ in rows)
    assert found.texts == tuple(str(completion) for _, completion in rows)


def test_passages_that_are_lists_or_go_over_the_columns_are_refused(tmp_path: Path) -> None:
    for name, content, said in (
        ("t.jsonl", '{"text": ["a", "b"]}', r"column 'text' of .*t\.jsonl holds lists"),
        ("t.csv", "text\nhello, world\n", r"line 2 has 2 cells where the first has 1"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=said):
            read_passages(str(tmp_path / name), "dataset.path", Columns())
