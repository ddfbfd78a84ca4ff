"""What a run measures: whose runs the gold standard averages, and whose runs methods follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from fimo.app.plan import Plan
from fimo.errors import InputError
from fimo.further_training import other_seeds
from fimo.further_training.seeds import LARGEST, relation
from tests.cases import CASES

CONF = Path(__file__).parents[1] / "conf"


def plan(*overrides: str) -> Plan:
    case = CASES["mlp_regression"]()
    data: Any = type("Data", (), {"train": case.train, "test": case.test})
    with initialize_config_dir(str(CONF), version_base="1.3"):
        few = ["further_training.left_out=4", "further_training.test=2", "further_training.epochs=2"]
        return Plan.of(compose("config", overrides=[*few, *overrides]), data)


def test_methods_follow_as_many_seeds_of_their_own_as_the_gold_standard_has() -> None:
    assert plan("further_training.seeds=3").followed == [3, 4, 5]
    assert plan("further_training.seeds=[4,9,2]").followed == [10, 11, 12]
    grown = plan("further_training.seeds=20")
    assert grown.followed == list(range(20, 40)), "seeds that a smaller gold standard's methods followed"
    assert plan("further_training.seeds=20", "scale=0.25").followed == [5, 6, 7, 8, 9]


def test_all_parts_of_a_gold_standard_follow_the_same_seeds_and_none_of_the_whole_s() -> None:
    parts = [
        plan("further_training.seeds=6", f"further_training.shard={k}/3", "until=further_training")
        for k in range(3)
    ]
    assert [part.seeds for part in parts] == [[0, 3], [1, 4], [2, 5]]
    assert [part.followed for part in parts] == [[6, 7, 8, 9, 10, 11]] * 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [("same", [0, 1, 2]), ("2", [3, 4]), ("5", [3, 4, 5, 6, 7]), ("[1,7]", [1, 7]), ("null", [3, 4, 5])],
)
def test_other_seeds_to_follow_can_be_asked_for(value: str, expected: list[int]) -> None:
    followed = plan("further_training.seeds=3", f"further_training.followed_seeds={value}").followed
    assert followed == expected


@pytest.mark.parametrize("value", ["own", "0", "[1,1]", "[-1]", "[]"])
def test_seeds_that_can_t_be_followed_are_refused_under_their_own_key(value: str) -> None:
    with pytest.raises(InputError, match=r"^further_training.followed_seeds: expected "):
        plan(f"further_training.followed_seeds={value}")
    with pytest.raises(InputError, match=r"^further_training.seeds: expected "):
        plan(f"further_training.seeds={value}")


def test_other_seeds_are_none_of_the_given_even_where_there_are_none_above() -> None:
    assert other_seeds([LARGEST - 1, 0, 2], 3) == [1, 3, 4]
    assert other_seeds([LARGEST - 2], 1) == [LARGEST - 1]


def test_one_shared_seed_is_enough_to_know_noise() -> None:
    assert relation([], [0, 1]) == "none"
    assert relation([2, 3], [0, 1]) == "other"
    assert relation([1, 2, 3], [0, 1]) == "same"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("batch_size=24", ["further_training.batch_size: 24 is more than the 23 training instances"]),
        (
            "batch_size=23 evaluate_every=11",
            ["further_training.evaluate_every: 11 is more than the 10 steps"],
        ),
        ("batch_size=23 evaluate_every=10", []),
    ],
)
def test_settings_that_mean_less_than_they_say_are_warned_of(
    settings: str, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plan("further_training.epochs=10", *(f"further_training.{setting}" for setting in settings.split()))
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == len(said)
    assert all(message.startswith(start) for message, start in zip(warned, said, strict=True))
