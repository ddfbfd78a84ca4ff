"""A whole run, small, and what its loggers were told when."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.live.offline_run import OfflineRun, read_offline_run

ROOT = Path(__file__).parents[2]
SMALL = [
    "trainer.max_epochs=15", "further_training.epochs=2", "further_training.seeds=3",
    "further_training.left_out=5", "further_training.test=4", "trainer.enable_progress_bar=false",
    "model.network.hidden=[16]", "evaluation.bootstrap=0", "threads=1",
]  # fmt: skip


def run(
    folder: Path, *arguments: str, method: str = "+method=[graddot,random]"
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_PROJECT": "from the environment", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "src.run", f"store={folder}/../store", f"hydra.run.dir={folder}", *SMALL]
    return subprocess.run(
        [*command, method, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "run"
    ended = run(folder, "logger=[wandb,csv]")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def logged(done: Path) -> OfflineRun:
    return read_offline_run(done)


def test_every_stage_is_seen_in_order(logged: OfflineRun) -> None:
    rows = [row for row in logged.history if "stage" in row]
    assert [row["stage"] for row in rows] == [1, 2, 3, 4, 5]
    training = [row for row in logged.history if "final_model/train_loss" in row]
    assert [row["final_model/epoch"] for row in training] == list(range(1, 16))
    assert "final_model/val_loss" in training[-1]
    assert rows[0]["_step"] < training[0]["_step"] < training[-1]["_step"] < rows[1]["_step"]


def test_the_losses_that_are_logged_are_those_that_are_reported(done: Path, logged: OfflineRun) -> None:
    reported = json.loads((done / "report.json").read_text())["final_model"]
    last = [row for row in logged.history if "final_model/val_loss" in row][-1]
    assert last["final_model/val_loss"] == pytest.approx(reported["test_loss"], rel=1e-5)
    points = [row for row in logged.history if "further_training/test_loss" in row]
    evaluation = pd.read_csv(done / "evaluation.csv")
    assert [row["further_training/step"] for row in points] == sorted(evaluation["step"].unique())
    assert points[0]["further_training/test_loss"] == pytest.approx(reported["test_loss"], rel=0.5)


def test_agreement_is_logged_before_the_evaluation_and_is_its(done: Path, logged: OfflineRun) -> None:
    evaluation = pd.read_csv(done / "evaluation.csv")
    of_all = evaluation[evaluation["seeds"] == 3].set_index(["method", "metric", "step"])["mean"]
    judging = next(row["_step"] for row in logged.history if row.get("stage") == 4)
    seen = 0
    for row in logged.history:
        for key, value in row.items():
            if key.startswith("agreement/"):
                _, method, metric = key.split("/")
                assert value == pytest.approx(of_all[method, metric, row["further_training/step"]], abs=1e-6)
                assert row["_step"] < judging
                seen += 1
    assert seen == len(of_all)


def test_artifacts_name_what_they_were_made_from(done: Path, logged: OfflineRun) -> None:
    by_name = {a.name: a for a in logged.artifacts if a.type != "run_table"}
    assert list(by_name) == ["dataset", "final_model", "sensitivity", "scores", "report"]
    assert by_name["dataset"].use_after_commit
    digests = {name: artifact.digest for name, artifact in by_name.items()}
    for name, inputs in {
        "final_model": ["dataset"],
        "sensitivity": ["dataset", "final_model"],
        "scores": ["dataset", "final_model"],
        "report": ["dataset", "final_model", "sensitivity", "scores"],
    }.items():
        made_from = json.loads(by_name[name].metadata)["made_from"]
        assert made_from == {one: digests[one] for one in inputs}
    kept = {entry.path: entry.local_path for entry in by_name["sensitivity"].manifest.contents}
    assert Path(kept["sensitivity.safetensors"]) == done / "sensitivity.safetensors"
    assert {entry.path for entry in by_name["scores"].manifest.contents} == {
        "graddot.safetensors", "random.safetensors"
    }  # fmt: skip


def test_the_environment_wins_over_defaults_and_what_is_printed_is_kept(logged: OfflineRun) -> None:
    assert logged.project == "from the environment"
    assert "INFO final model" in logged.console
    assert logged.summary["state"] == "finished"
    assert logged.exit_code == 0


def test_another_logger_has_the_same_points(done: Path) -> None:
    own, csv = pd.read_csv(done / "metrics.csv"), pd.read_csv(done / "csv" / "metrics.csv")
    for name in ("final_model/train_loss", "further_training/test_loss", "agreement/graddot/cosine"):
        assert own[name].dropna().tolist() == pytest.approx(csv[name].dropna().tolist())


def test_a_rerun_goes_on_in_the_same_run_and_adds_nothing_but_what_is_new(done: Path) -> None:
    before = (done / "metrics.csv").read_text()
    hashes = [hashlib.md5((done / "final_model.ckpt").read_bytes()).hexdigest()]
    ended = run(done, "logger.mode=offline")
    assert ended.returncode == 0, ended.stderr
    hashes.append(hashlib.md5((done / "final_model.ckpt").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1], "an artifact is told from its versions by content"
    first, second = (read_offline_run(done, which) for which in (0, 1))
    assert first.id == second.id
    again = {key for row in second.history for key in row if not key.startswith("_")}
    assert not {
        key for key in again if key.startswith(("final_model/", "agreement/", "further_training/test"))
    }
    assert (done / "metrics.csv").read_text().startswith(before)


def test_a_failing_run_says_so(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "further_training.lr=1e30", "logger.wandb.alerts=true")
    assert ended.returncode == 2
    found = read_offline_run(tmp_path / "run")
    assert found.exit_code == 1
    assert found.summary["state"] == "failed"
    assert found.summary["error"] in ended.stderr
    assert any("diverged" in alert for alert in found.alerts)


def test_an_audit_is_followed_and_its_rows_are_shown(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", "dataset=breast_cancer", "report=false", method="mode=audit")
    assert ended.returncode == 0, ended.stderr
    found = read_offline_run(tmp_path / "run")
    rows = pd.read_csv(tmp_path / "run" / "rows.csv")
    assert found.summary["audit/n"] == len(rows)
    assert found.summary["state"] == "finished"
    assert any("further_training/replica_steps" in row for row in found.history)
    table = next(row["rows"] for row in found.history if "rows" in row)
    assert table["nrows"] == len(rows)
    assert {"dataset", "final_model", "audit"} <= {artifact.name for artifact in found.artifacts}
