"""What a method returns: one value whose parts fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

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
            same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
            assert same or field.name == "seconds"  # not measured: NaN


def test_a_file_of_earlier_versions_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "old.safetensors", {"scores": VALUES, "left_out": LEFT_OUT})
    found = Scores.load(tmp_path / "old.safetensors")
    assert torch.equal(found.values, VALUES)
    assert found.access == Access.FINAL_MODEL


def test_what_is_not_finite_of_one_instance_stays_with_it() -> None:
    """Sums by a product with 0 and 1 would spread it."""
    values, bars = VALUES.clone(), VALUES + 1
    values[..., 2], bars[..., 2] = torch.nan, torch.nan
    found = Scores(values, LEFT_OUT, sem=bars, sem_adjusted=bars).grouped([[9], [0], [5]])
    assert torch.equal(found.values[..., :2], VALUES[..., [3, 0]])
    assert found.sem is not None
    assert torch.equal(found.sem[..., :2], VALUES[..., [3, 0]] + 1)
    assert found.values[..., 2].isnan().all()
    assert found.left_out.tolist() == [9, 0, 5]


def test_there_are_no_sums_over_instances_without_a_score() -> None:
    with pytest.raises(InputError, match="no scores of the training instances 1, 7"):
        Scores(VALUES, LEFT_OUT).grouped([[0, 1], [7]])


def test_at_the_end_of_further_training_all_parts_lose_the_axis() -> None:
    full = Scores(VALUES, LEFT_OUT, sem=VALUES + 1, step=torch.tensor([3, 6]), followed=(2,))
    found = full.at_end()
    assert torch.equal(found.values, VALUES[1])
    assert found.sem is not None
    assert torch.equal(found.sem, VALUES[1] + 1)
    assert found.step is None
    assert found.followed == (2,)


def test_the_same_scores_are_the_same_bytes(tmp_path: Path) -> None:
    """In any process: safetensors writes several entries of metadata in any order."""
    for name in ("a", "b"):
        Scores(VALUES, LEFT_OUT, "m", notes=("x",)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert len(file.metadata()) == 1
