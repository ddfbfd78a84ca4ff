"""The configuration: every choice composes, and mistakes are answered by key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fimo.command import check_choices
from fimo.config import validated
from fimo.errors import InputError

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ["dataset", "model", "trainer", "further_training", "evaluation", "logger"]

NEEDED = {
    "dataset=csv": [f"dataset.path={CONF}"],
    "dataset=custom": ["dataset.train._target_=my.train", "dataset.test._target_=my.test"],
    "model=custom": ["model.network._target_=my.network"],
}
"""What a user must give."""


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def choices(group: str) -> list[str]:
    return sorted(str(p.relative_to(CONF / group).with_suffix("")) for p in (CONF / group).rglob("*.yaml"))


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g in GROUPS for c in choices(g)])
def test_every_choice_of_every_group_composes_and_passes_its_schema(group: str, choice: str) -> None:
    needed = NEEDED.get(f"{group}={choice}", [])
    config = validated(composed(f"{group}={choice}", *needed), CONF)
    assert set(config[group])


@pytest.mark.parametrize("choice", choices("method"))
def test_every_method_composes_under_its_own_name(choice: str) -> None:
    config = validated(composed(f"+method={choice}"), CONF)
    assert list(config.methods) == [choice.split("/")[-1]]
    assert config.methods[choice.split("/")[-1]]._target_.startswith("fimo.methods.")


@pytest.mark.parametrize("choice", choices("experiment"))
def test_every_experiment_composes(choice: str) -> None:
    assert validated(composed(f"experiment={choice}"), CONF).further_training.lr > 0


def test_several_methods_compose() -> None:
    assert set(validated(composed("+method=[tracin,datainf]"), CONF).methods) == {"tracin", "datainf"}


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("+model.typo=1", "model.typo", "unknown key"),
        ("+trainer.max_epoch=3", "trainer.max_epoch", "max_epochs"),
        ("trainer.max_epochs=abc", "trainer.max_epochs", "Integer"),
        ("trainer.max_epochs=-1", "trainer.max_epochs", "at least 0"),
        ("dataset=csv", "dataset.path", "must be given"),
        ("dataset=concrete dataset.path=/nowhere.txt", "dataset.path", "no such file: /nowhere.txt"),
        ("model.checkpoint=/nowhere.ckpt", "model.checkpoint", "no such file"),
        ("+sedd=1", "sedd", "seed"),
        ("further_training.lr=fast", "further_training.lr", "Float"),
        ("logger.mode=loud", "logger.mode", "offline, online or disabled"),
        ("threads=0", "threads", "at least 1"),
    ],
)
def test_a_mistake_is_answered_with_its_key(override: str, key: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        validated(composed(*override.split()), CONF)
    assert caught.value.key == key
    assert said in caught.value.problem
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["+method=trasin", "+method=[graddot,trasin]", "+method=trasin,graddot"])
def test_an_unknown_method_is_answered_with_the_nearest_names(argument: str) -> None:
    with pytest.raises(InputError, match=r"method: no choice 'trasin'; did you mean tracin"):
        check_choices([argument], CONF)
