"""The configuration: every choice composes, and mistakes are answered by key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fimo.app.build import PROTOCOL_FIELDS, build_methods
from fimo.app.command import check_choices
from fimo.app.config import FurtherTraining, validated
from fimo.app.search_path import SearchPath
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.methods.catalogue import OTHERS

CONF = Path(__file__).parents[1] / "conf"
PLACES = SearchPath((CONF,))
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
    config = validated(composed(f"{group}={choice}", *needed), PLACES)
    assert set(config[group]) or choice == "none"


@pytest.mark.parametrize("choice", choices("method"))
def test_every_method_composes_under_its_own_name(choice: str) -> None:
    config = validated(composed(f"+method={choice}"), PLACES)
    assert list(config.methods) == [choice.split("/")[-1]]
    assert config.methods[choice.split("/")[-1]]._target_.startswith("fimo.methods.")


# of the benchmark's, whose data must be there: tests/bench
@pytest.mark.parametrize("choice", [c for c in choices("experiment") if not c.startswith("bench/")])
def test_every_experiment_composes(choice: str) -> None:
    assert validated(composed(f"experiment={choice}"), PLACES).further_training.lr > 0


@pytest.mark.parametrize(
    ("experiment", "sgd", "adam"),
    [
        ("paper/concrete", 0.03, 1e-4), ("paper/energy", 0.03, 1e-4), ("paper/fico", 1e-4, 1e-6),
        ("paper/folktables", 1e-4, 1e-6), ("paper/cifar10", 1e-3, 1e-5), ("cifar10_small", 1e-3, 1e-4),
    ],
)  # fmt: skip
def test_an_experiment_has_learning_rates_for_both_optimizers(
    experiment: str, sgd: float, adam: float
) -> None:
    chosen = {
        name: composed(f"experiment={experiment}", f"further_training={name}").further_training
        for name in ("default", "adam")
    }
    assert (chosen["default"].optimizer, chosen["default"].lr) == ("sgd", sgd)
    assert (chosen["adam"].optimizer, chosen["adam"].lr) == ("adam", adam)
    assert composed(f"experiment={experiment}").further_training.optimizer == "sgd"


@pytest.mark.parametrize(("experiment", "lr"), [("paper/sst2", 1e-6), ("sst2_small", 1e-4)])
def test_experiments_with_adamw_leave_the_optimizer_to_the_group(experiment: str, lr: float) -> None:
    own = composed(f"experiment={experiment}").further_training
    assert (own.optimizer, own.lr) == ("adamw", lr)
    assert composed(f"experiment={experiment}", "further_training=adam").further_training.optimizer == "adam"


def test_a_data_sets_file_need_not_hold_more_than_its_target() -> None:
    config = composed("~dataset", "+dataset._target_=fimo.data.bundled.BundledData")
    assert validated(config, PLACES).further_training.batch_size == 32


def test_a_given_learning_rate_is_taken() -> None:
    assert composed("dataset=concrete", "further_training.lr=0.5").further_training.lr == 0.5


def test_the_schema_of_further_training_has_the_protocols_fields_and_defaults() -> None:
    schema = {f.name: f for f in dataclasses.fields(FurtherTraining)}
    for field in dataclasses.fields(Protocol):
        assert field.name in schema, field.name
    given, protocol = FurtherTraining(), Protocol(epochs=1)
    for name in set(PROTOCOL_FIELDS) - {"epochs"}:
        expected = getattr(protocol, name)
        assert getattr(given, name) == (list(expected) if name == "betas" else expected), name


def test_the_default_configuration_of_further_training_is_the_protocols() -> None:
    node = validated(composed("further_training.epochs=20"), PLACES).further_training
    given, plain = Protocol(**{name: node[name] for name in PROTOCOL_FIELDS}), Protocol(epochs=node.epochs)
    assert given == plain


def test_settings_of_a_method_that_is_not_chosen_change_it_among_all() -> None:
    config = validated(composed("++methods.exact.damping=10x"), PLACES)
    files = [CONF / "method" / f"{name}.yaml" for name in choices("method")]
    assert set(config.methods) == {file.stem for file in files if OTHERS not in file.read_text()}
    assert config.methods.exact.damping == "10x"
    assert config.methods.exact._target_ == "fimo.methods.exact.ExactInfluence"


def test_a_single_value_stands_for_a_list_of_one() -> None:
    config = validated(composed("evaluation.metrics=cosine", "model.trainable=head*"), PLACES)
    assert list(config.evaluation.metrics) == ["cosine"]
    assert list(config.model.trainable) == ["head*"]


def test_several_methods_compose() -> None:
    assert set(validated(composed("+method=[tracin,datainf]"), PLACES).methods) == {"tracin", "datainf"}


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("+model.typo=1", "model.typo", "unknown key"),
        ("+trainer.max_epoch=3", "trainer.max_epoch", "max_epochs"),
        ("trainer.max_epochs=abc", "trainer.max_epochs", "expected a whole number or auto but got 'abc'"),
        (
            "further_training.epochs=1.5",
            "further_training.epochs",
            "expected a whole number or auto but got 1.5",
        ),
        ("further_training.epochs=0", "further_training.epochs", "at least 1"),
        ("trainer.max_epochs=-1", "trainer.max_epochs", "at least 0"),
        ("dataset=csv", "dataset.path", "must be given"),
        ("dataset=concrete dataset.path=/nowhere.txt", "dataset.path", "no such file: /nowhere.txt"),
        ("model.checkpoint=/nowhere.ckpt", "model.checkpoint", "no such file"),
        ("+sedd=1", "sedd", "seed"),
        ("further_training.lr=fast", "further_training.lr", "Float"),
        ("logger.wandb.mode=loud", "logger.wandb.mode", "offline, online, disabled"),
        ("threads=0", "threads", "at least 1"),
    ],
)
def test_a_mistake_is_answered_with_its_key(override: str, key: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        validated(composed(*override.split()), PLACES)
    assert caught.value.key == key
    assert said in caught.value.problem
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["+method=trasin", "+method=[graddot,trasin]", "+method=trasin,graddot"])
def test_an_unknown_method_is_answered_with_the_nearest_names(argument: str) -> None:
    with pytest.raises(InputError, match=r"method: no choice 'trasin'; did you mean tracin"):
        check_choices([argument], PLACES)


def test_an_audit_has_no_gold_standard_to_stop_after() -> None:
    with pytest.raises(InputError, match="until: further_training is the gold standard of mode=study"):
        validated(composed("mode=audit", "until=further_training"), PLACES)
    with pytest.raises(InputError, match=r"audit\.tpo: unknown key; did you mean top"):
        validated(composed("+audit.tpo=3"), PLACES)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("best", "removal", "other"), ("best", "limit", 3), ("best", "short", -1), ("best", "budget", 2),
     ("lissa", "damping", "much"), ("tracin", "storage", "disc")],
)  # fmt: skip
def test_a_wrong_setting_of_a_method_is_named_by_its_whole_key(name: str, key: str, value: object) -> None:
    config = composed(f"+method={name}", f"methods.{name}.{key}={value}")
    with pytest.raises(InputError) as caught:
        build_methods(config)
    assert caught.value.key == f"methods.{name}.{key}"
