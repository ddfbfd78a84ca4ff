"""What a method returns: one value whose parts fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fimo.errors import InputError
from fimo.scores import Access, Scores
from fimo.store.files import write_tensors

VALUES, LEFT_OUT = torch.arange(24.0).view(2, 3, 4), torch.tensor([0, 3, 5, 9])


def test_scores_are_frozen_and_say_what_they_are() -> None:
    scores = Scores(VALUES, LEFT_OUT, "response")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.values = VALUES  # type: ignore[misc]
    expected = "Scores(response (FiMO): 3 test x 4 left-out instances, at 2 amounts of further training)"
    assert repr(scores) == expected


def test_the_last_amount_of_further_training_is_that_of_scores_without_the_axis() -> None:
    assert torch.equal(Scores(VALUES, LEFT_OUT).last, VALUES[1])
    assert torch.equal(Scores(VALUES[0], LEFT_OUT).last, VALUES[0])


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"values": VALUES[0, 0]}, "scores"),
        ({"left_out": LEFT_OUT[:3]}, "scores"),
        ({"sem": VALUES[0]}, "sem"),
        ({"sem_adjusted": VALUES[:, :1]}, "sem_adjusted"),
        ({"step": torch.arange(3)}, "step"),
        ({"values": VALUES[0], "epoch": torch.arange(3)}, "epoch"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}: "):
        Scores(**{"values": VALUES, "left_out": LEFT_OUT} | changed)


def test_bars_are_those_of_values_as_they_are_judged() -> None:
    scores = Scores(VALUES, LEFT_OUT, sem=VALUES + 1, sem_adjusted=VALUES + 2)
    assert scores.bars(subtract_mean=True) is scores.sem_adjusted
    assert scores.bars(subtract_mean=False) is scores.sem
    assert dataclasses.replace(scores, sem_adjusted=None).bars(subtract_mean=True) is scores.sem
    assert Scores(VALUES, LEFT_OUT).bars(subtract_mean=True) is None


def test_a_file_of_scores_is_read_back_whole(tmp_path: Path) -> None:
    full = Scores(
        VALUES.double(), LEFT_OUT, "best", Access.TRAINING_ALGORITHM, True, VALUES + 1, VALUES + 2, "half",
        torch.tensor([5, 9]), torch.tensor([1, 2]), (3, 4), 17, ("a", "b"), LEFT_OUT[:, None],
        torch.arange(3),
    )  # fmt: skip
    for scores in (full, Scores(VALUES[0], LEFT_OUT)):
        scores.save(tmp_path / "scores.safetensors")
        found = Scores.load(tmp_path / "scores.safetensors")
        for field in dataclasses.fields(Scores):
            before, after = getattr(scores, field.name), getattr(found, field.name)
            assert type(before) is type(after)
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after


def test_a_file_of_earlier_versions_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "old.safetensors", {"scores": VALUES, "left_out": LEFT_OUT})
    found = Scores.load(tmp_path / "old.safetensors")
    assert torch.equal(found.values, VALUES)
    assert found.access == Access.FINAL_MODEL
