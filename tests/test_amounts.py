"""Numbers of epochs that the size of the data chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fimo.app.amounts import settle_amounts
from fimo.app.config import validated
from fimo.app.plan import Plan
from tests.test_config import PLACES, composed


def settled(rows: int, *overrides: str) -> Any:
    config = validated(composed("dataset=csv", "dataset.path=pyproject.toml", *overrides), PLACES)
    settle_amounts(config, SimpleNamespace(train=range(rows), batch_size=config.dataset.batch_size))  # type: ignore[arg-type]
    return config


@pytest.mark.parametrize(
    ("rows", "of_training", "of_further_training"),
    # an epoch of 32 instances a step has 1, 29, 313, 500 and 1,563 steps; of 10,000,000 rows, one is enough
    [(10, 100, 20), (927, 100, 20), (10_000, 63, 20), (16_000, 40, 20), (50_000, 12, 6), (10_000_000, 1, 1)],
)
def test_large_data_sets_have_fewer_epochs(rows: int, of_training: int, of_further_training: int) -> None:
    config = settled(rows)
    assert (config.trainer.max_epochs, config.further_training.epochs) == (of_training, of_further_training)


def test_larger_batches_have_more_epochs() -> None:
    config = settled(50_000, "dataset.batch_size=128", "further_training.batch_size=64")
    assert (config.trainer.max_epochs, config.further_training.epochs) == (51, 12)


def test_what_was_asked_for_stays() -> None:
    config = settled(50_000, "trainer.max_epochs=300", "further_training.epochs=40")
    assert (config.trainer.max_epochs, config.further_training.epochs) == (300, 40)


def test_steps_need_no_epochs() -> None:
    assert settled(50_000, "further_training.steps=7").further_training.epochs is None


def test_what_a_data_set_recommends_stays() -> None:
    config = validated(composed("dataset=digits"), PLACES)
    data: Any = SimpleNamespace(train=range(10**6), batch_size=32)
    settle_amounts(config, data)
    assert config.trainer.max_epochs == 30


def test_scale_shortens_what_was_chosen() -> None:
    config = settled(50_000, "scale=0.5")
    data: Any = SimpleNamespace(train=range(50_000), test=range(20))
    assert Plan.of(config, data).protocol.epochs == 3
