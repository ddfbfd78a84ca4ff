"""Sweeps of Weights & Biases: their files, and the arguments that W&B's own agent makes of them.

The agent's protocol needs a server; what it starts is made here by the client's own functions.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from fimo.app.config import validated
from fimo.app.mistakes import readable
from fimo.app.search_path import SearchPath
from tests.live.offline_run import read_offline_run
from tests.live.test_run import SMALL

ROOT = Path(__file__).parents[1]
PLACES = SearchPath.of([], ROOT / "conf")
SWEEPS = sorted((ROOT / "conf" / "sweeps").glob("*.yaml"))


def command(sweep: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    """Return the command that W&B's agent starts for chosen values, as its code puts it together."""
    from wandb.sdk.launch.sweeps import utils

    arguments = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in chosen.items()}})
    found: list[str] = []
    for part in utils.create_sweep_command(sweep["command"]):
        if part == "${env}":
            continue
        name = part[2:-1] if part.startswith("${") else None
        found += arguments[name] if name else [part]
    return found


def some_values(sweep: dict[str, Any]) -> dict[str, Any]:
    def value(node: dict[str, Any]) -> Any:
        if "value" in node:
            return node["value"]
        return random.Random(0).choice(node["values"]) if "values" in node else node["min"]

    return {name: value(node) for name, node in sweep["parameters"].items()}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_what_an_agent_starts_is_a_configuration(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    started = command(sweep, some_values(sweep))
    assert started[:3] == ["python", "-m", "src.run"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = validated(compose("config", overrides=[readable(a) for a in started[3:]]), PLACES)
    assert config.report is False
    assert set(config.methods) <= {"graddot", "ekfac", "datainf"}


def test_every_kind_of_value_that_an_agent_hands_over_is_understood() -> None:
    chosen = {
        "method": ["graddot", "ekfac"], "further_training.lr": 1e-05, "report": True, "threads": None,
        "further_training.seeds": 4, "evaluation.metrics": ["cosine"],
    }  # fmt: skip
    started = command({"command": ["${args_no_hyphens}"]}, chosen)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = validated(compose("config", overrides=[readable(a) for a in started]), PLACES)
    assert set(config.methods) == {"graddot", "ekfac"}
    assert config.further_training.lr == 1e-5
    assert config.report is True
    assert config.threads is None
    assert list(config.evaluation.metrics) == ["cosine"]


def test_an_agents_job_logs_the_fields_of_any_run_into_the_run_that_it_was_given(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "conf" / "sweeps" / "damping.yaml").read_text())
    chosen = some_values(sweep)
    parameters = tmp_path / "config.yaml"
    parameters.write_text(
        yaml.safe_dump({"wandb_version": 1, **{k: {"value": v} for k, v in chosen.items()}})
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "OMP_NUM_THREADS": "1", "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "job1", "WANDB_MODE": "offline",
        "WANDB_SWEEP_PARAM_PATH": str(parameters),
    }  # fmt: skip
    _, *arguments = command(sweep, chosen)
    ended = subprocess.run(
        [sys.executable, *arguments, *SMALL, f"store={tmp_path}/store", f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    run = read_offline_run(tmp_path / "run")
    assert run.id == "job1"
    assert run.sweep == "sweep1"
    assert run.config["methods.datainf.damping"] == pytest.approx(0.001)
    assert sweep["metric"]["name"] in run.summary
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {k: v for k, v in run.summary.items() if k in kept} == kept
