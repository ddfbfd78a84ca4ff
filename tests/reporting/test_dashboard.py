from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fimo.errors import InputError
from fimo.live.agreement import STEP
from fimo.reporting.dashboard import dashboard, main
from fimo.reporting.wandb import history, summary
from tests.reporting.example import example, example_tasks


def test_every_panel_shows_something_that_runs_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    run = example(tasks=example_tasks())
    run.save(tmp_path, everything=True)
    assert main([str(tmp_path), "--entity", "team", "--print"]) == 0
    definition = json.loads(capsys.readouterr().out)
    sections = definition["spec"]["section"]["panelBankConfig"]["sections"]
    panels = [panel for section in sections for panel in section["panels"]]
    lines = [p["config"] for p in panels if p["viewType"] == "Run History Line Plot"]
    logged = {key for record in history(run) for key in record}
    assert len(lines) == 4
    for line in lines:
        assert line["xAxis"] == STEP
        assert set(line["metrics"]) <= logged
    kept = set(summary(run))
    for bar in (p["config"] for p in panels if p["viewType"] == "Bar Chart"):
        assert any(key.removeprefix("summary:") in kept for key in bar["metrics"]), bar["metrics"]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match="pip install wandb-workspaces"):
        dashboard("team", "fimo", ["graddot"], ["cosine"])
