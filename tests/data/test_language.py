"""Passages and completions: what each position predicts, and where no loss is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fimo.data.instances import IGNORED
from fimo.data.language import LanguageData, pieces
from fimo.data.tokens import ByteTokens
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
    assert data.test.inputs["input_ids"].tolist() == [[*b"ab", PAD, PAD], [*b"fghi"]]
    assert data.test.targets.tolist() == [
        [IGNORED, ord("c"), IGNORED, IGNORED],
        [IGNORED, IGNORED, ord("i"), ord("j")],
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
        ({"length": 3}, "prompt\tcompletion\nabc\tde\n", "dataset.prompts", "row 0 of .* has 5 tokens"),
        ({}, "prompt\tanswer\nabc\tde\n", "dataset.prompts", "no column 'completion'"),
        ({}, "prompt\tcompletion\nabc\t \n", "dataset.prompts", "the completion in row 0 of .* is empty"),
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
