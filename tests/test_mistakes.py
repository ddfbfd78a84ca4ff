"""Command lines that Hydra would refuse over several lines, or need not refuse at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from fimo.app.mistakes import in_one_line, nearest_key, readable
from fimo.app.search_path import SearchPath

CONF = Path(__file__).parents[1] / "conf"
PLACES = SearchPath((CONF,))


@pytest.mark.parametrize("name", ["a, b.csv", "a=b (1).csv", "it's.csv", "[x]{y}.csv"])
def test_a_path_that_is_there_needs_no_quotes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    (parsed,) = OverridesParser.create().parse_overrides([readable(f"dataset.path={path}")])
    assert parsed.value() == str(path)


def test_folders_to_be_made_and_the_home_folder_need_no_quotes() -> None:
    arguments = ["hydra.run.dir=/tmp/a, b", "store=~/st,ore", "dataset.path=~/none.csv"]
    parsed = OverridesParser.create().parse_overrides([*map(readable, arguments)])
    assert [p.value() for p in parsed] == ["/tmp/a, b", f"{Path.home()}/st,ore", f"{Path.home()}/none.csv"]


@pytest.mark.parametrize(
    "argument",
    [
        "further_training.left_out=[0,1]", "+method=[tracin,datainf]", "further_training=default,adam", "-m",
        "dataset.path='a, b'", "hydra.run.dir=out/${now:%H}", "--help", "a=", "store=out",
    ],
)  # fmt: skip
def test_other_arguments_stay_as_they_are(argument: str) -> None:
    assert readable(argument) == argument


def test_methods_and_their_settings_are_additions() -> None:
    assert readable("method=tracin") == "+method=tracin"
    assert readable("methods.exact.damping=10x") == "++methods.exact.damping=10x"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("further_training.lrr=1", "further_training.lrr: unknown key; did you mean lr"),
        ("max_epochs=3", "max_epochs: unknown key; did you mean trainer.max_epochs"),
        ("model.max_epochs=3", "model.max_epochs: unknown key; did you mean trainer.max_epochs"),
        (
            "further_trainin.lr=1",
            "further_trainin.lr: unknown key; did you mean model.lr or further_training",
        ),
        ("model.network.hiden=[8]", "model.network.hiden: unknown key; did you mean hidden?"),
        (
            "logger=none logger.wandb.tags=[a]",
            "logger.wandb.tags: unknown key of the chosen file; a key of logger=wandb",
        ),
        ("seed=1,2", "seed: got several values; [1,2] is a list, -m sweeps over them"),
        ("nonsense", "nonsense: expected KEY=VALUE"),
        ("dataset.name=[", "dataset.name: '[' can't be read"),
    ],
)
def test_what_hydra_refuses_is_one_line_with_the_key(override: str, said: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Exception) as caught:  # noqa: PT011
        compose("config", overrides=override.split())
    line = str(in_one_line(caught.value, PLACES))
    assert said in line
    assert "\n" not in line


def test_the_nearest_key_of_a_method_is_known() -> None:
    assert "damping" in nearest_key("methods.datainf.dampin", PLACES)


def test_w_and_bs_settings_may_be_given_in_short() -> None:
    assert readable("logger.mode=online") == "logger.wandb.mode=online"
    assert readable("logger.wandb.mode=online") == "logger.wandb.mode=online"
    assert readable("logger.csv.name=x") == "logger.csv.name=x"
    assert readable("logger=none") == "logger=none"
