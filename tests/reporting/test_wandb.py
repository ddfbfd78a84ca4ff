from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fimo.errors import InputError
from fimo.reporting import InstanceDisplay
from fimo.reporting.wandb import STEP, instance_rows, log_run
from tests.reporting.example import example, show_text
from tests.reporting.offline_run import OfflineRun, read_offline_run


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineRun, Path]:
    """Two jobs of a sweep in one process; the first is read back."""
    sweep = tmp_path_factory.mktemp("sweep")
    for job, name in enumerate(["first", "second"]):
        folder = sweep / str(job)
        (folder / ".hydra").mkdir(parents=True)
        hydra = {"mode": "MULTIRUN", "sweep": {"dir": "${now:%H}"}, "overrides": {"task": [f"seed={job}"]}}
        (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": hydra}))
        log_run(example(name), {"project": "tests", "tags": ["quick"]}, folder)
    return read_offline_run(sweep / "0"), sweep


def test_jobs_of_a_sweep_in_one_process_are_runs_of_their_own_in_one_group(
    logged: tuple[OfflineRun, Path],
) -> None:
    first, sweep = logged
    second = read_offline_run(sweep / "1")
    assert (first.name, second.name) == ("first", "second")
    assert first.group == second.group == sweep.name
    assert first.exit_code == second.exit_code == 0
    assert len(first.history) == len(second.history)


def test_config_is_flat(logged: tuple[OfflineRun, Path]) -> None:
    config = logged[0].config
    assert config["further_training.lr"] == 0.01
    assert config["dataset.name"] == "diabetes"
    assert logged[0].project == "tests"
    assert {"quick", "diabetes", "graddot"} <= set(logged[0].tags)


def test_agreement_is_logged_against_the_amount_of_further_training(logged: tuple[OfflineRun, Path]) -> None:
    run = logged[0]
    points = [h for h in run.history if "agreement/graddot/cosine" in h]
    assert [h[STEP] for h in points] == [8, 16, 24, 32]
    table = example().evaluation
    rows = table[(table.method == "graddot") & (table.metric == "cosine") & (table.seeds == 6)]
    assert [h["agreement/graddot/cosine"] for h in points] == pytest.approx(rows["mean"].tolist())
    assert [h["ceiling/cosine"] for h in points] == pytest.approx(rows["ceiling"].tolist())
    assert [h["ceiling_lower/cosine"] for h in points] == pytest.approx(rows["ceiling_lower"].tolist())
    assert run.metrics["agreement/*"] == STEP or run.metrics["agreement/graddot/cosine"] == STEP


def test_summary_holds_what_runs_are_compared_by(logged: tuple[OfflineRun, Path]) -> None:
    summary = logged[0].summary
    last = example().evaluation
    last = last[(last.step == 32) & (last.seeds == 6) & (last.metric == "cosine")].set_index("method")
    assert summary["last/graddot/cosine"] == pytest.approx(last.loc["graddot", "mean"])
    assert summary["last_ceiling/cosine"] == pytest.approx(last.loc["graddot", "ceiling"])
    assert summary["last_ceiling_lower/cosine"] == pytest.approx(last.loc["graddot", "ceiling_lower"])
    assert summary["followed_seeds/follows"] == "unknown"
    assert "followed_seeds/graddot" not in summary
    assert summary["best_method/cosine"] == "follows"
    assert summary["cost/further_training/seconds"] == 95
    assert summary["final_model/test_loss"] == 0.5


def test_figures_stay_interactive_and_instances_are_a_table(logged: tuple[OfflineRun, Path]) -> None:
    run, sweep = logged
    media = next(h for h in run.history if "instances" in h)
    assert media["figures/agreement/cosine"]["_type"] == "plotly-file"
    (files,) = (sweep / "0").glob("wandb/offline-run-*/files")
    figure = json.loads((files / media["figures/agreement/cosine"]["path"]).read_text())
    assert any(trace.get("name") == "noise ceiling" for trace in figure["data"])
    table = json.loads((files / media["instances"]["path"]).read_text())
    assert {"split", "row", "id", "effect", "target", "age", "blood pressure", "sex"} <= set(table["columns"])
    columns, rows = instance_rows(example())
    assert table["data"] == json.loads(json.dumps(rows))
    assert len(columns) == len(rows[0])


def test_sentences_and_pictures_of_instances_are_shown() -> None:
    columns, rows = instance_rows(example(show=show_text))
    assert "a train sentence" in rows[0][columns.index("text")]
    buffer = io.BytesIO()
    Image.new("L", (4, 5)).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    columns, rows = instance_rows(example(show=lambda split, index: InstanceDisplay("cat", image=uri)))
    picture = rows[0][columns.index("image")]
    assert (picture._width, picture._height) == (4, 5)


def test_one_command_syncs_all_and_is_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="fimo"):
        log_run(example(), SimpleNamespace(mode="online", name="named", tags=None), tmp_path)
    assert "nobody is logged in" in caplog.text
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in caplog.text
    assert read_offline_run(tmp_path).name == "named"


def test_an_online_run_without_a_network_is_written_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # its process reads the environment when it starts
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("fimo.reporting.wandb.CONNECT_SECONDS", 2)
    log_run(example(), {"mode": "online"}, tmp_path)
    wandb.teardown()
    assert "writing offline" in caplog.text
    assert read_offline_run(tmp_path).summary["best_method/cosine"] == "follows"


def test_a_run_is_not_lost_when_its_logging_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise wandb.Error("no disk")

    monkeypatch.setattr(wandb, "init", fail)
    log_run(example(), None, tmp_path)
    assert "nothing was logged to it: no disk" in caplog.text


@pytest.mark.parametrize("settings", [{"enabled": False}, {"mode": "disabled"}])
def test_nothing_is_written_when_switched_off(settings: dict, tmp_path: Path) -> None:
    log_run(example(), settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"logger\.mode: expected one of offline, online, disabled"):
        log_run(example(), {"mode": "ofline"}, tmp_path)
