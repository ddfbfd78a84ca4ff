from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fimo.errors import InputError
from fimo.live.agreement import STEP
from fimo.reporting.dashboard import dashboard, main
from fimo.reporting.wandb import history, summary
from tests.reporting.example import example, example_tasks

LIVE = {
    "final_model/train_loss", "final_model/val_loss", "final_model/val_accuracy",
    "further_training/test_loss", "further_training/test_loss_sd", "further_training/distance",
    "further_training/ceiling", "further_training/per_second", "further_training/time_left",
}  # fmt: skip
"""What callbacks log; ``tests/live/test_run.py`` sees it logged."""

AXES = (STEP, "final_model/epoch", "further_training/replica_steps", "further_training/seeds")
MEDIA = {"report", "figures/seeds/cosine", "figures/cost/cosine"}
TABLES = {"methods", "instances"}
"""``tests/reporting/test_wandb.py`` sees them logged."""


@pytest.fixture
def definition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    pytest.importorskip("wandb_workspaces")
    example(tasks=example_tasks()).save(tmp_path, everything=True)
    assert main([str(tmp_path), "--entity", "team", "--print"]) == 0
    return json.loads(capsys.readouterr().out)


def sections(definition: dict[str, Any]) -> list[dict[str, Any]]:
    return definition["spec"]["section"]["panelBankConfig"]["sections"]


def test_every_panel_shows_something_that_runs_log(definition: dict[str, Any]) -> None:
    run = example(tasks=example_tasks())
    logged = LIVE | {key for record in history(run) for key in record}
    kept = set(summary(run))
    seen = set()
    for panel in (panel for section in sections(definition) for panel in section["panels"]):
        config = panel["config"]
        seen.add(panel["viewType"])
        if panel["viewType"] == "Run History Line Plot":
            assert config["xAxis"] in AXES
            assert set(config["metrics"]) <= logged, config["metrics"]
        elif panel["viewType"] == "Bar Chart":
            assert any(key.removeprefix("summary:") in kept for key in config["metrics"]), config["metrics"]
        elif panel["viewType"] == "Media Browser":
            assert set(config["mediaKeys"]) <= MEDIA
        elif panel["viewType"] == "Weave":
            assert any(f'"{name}"' in json.dumps(config) for name in TABLES)
    assert {"Run History Line Plot", "Bar Chart", "Media Browser", "Weave"} <= seen


def test_a_dozen_panels_at_most_are_open(definition: dict[str, Any]) -> None:
    first, *others = sections(definition)
    assert first["isOpen"]
    assert len(first["panels"]) <= 12
    assert others
    assert not any(section["isOpen"] for section in others)


def test_an_audits_rows_are_shown() -> None:
    pytest.importorskip("wandb_workspaces")
    found = dashboard("team", "fimo", [], [], audit=True)._to_model().model_dump_json(by_alias=True)
    assert '"rows"' in found
    assert "agreement" not in found


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match=r"pip install 'fimo\[dashboard\]'"):
        dashboard("team", "fimo", ["graddot"], ["cosine"])
