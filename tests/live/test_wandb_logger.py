from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fimo.errors import InputError
from fimo.live.log import About, Log
from fimo.live.outlet import Outlet
from fimo.live.wandb import WandbLogger, run_id
from tests.live.offline_run import read_offline_run


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("API_KEY", "MODE", "DIR", "PROJECT", "RUN_GROUP", "RUN_ID", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{key}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def begun(folder: Path, **settings: object) -> Log:
    settings = {"system_metrics": False, "console": False, **settings}
    log = Log(folder, [Outlet("logger.wandb", WandbLogger(**settings))])
    log.begin(About(folder, "named", {"a.b": 1}, ["diabetes"]))
    return log


def test_a_rerun_goes_on_in_the_same_run_without_doubled_history(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.log({"loss": 2.0}, "epoch", 1)
    first.end("interrupted", "interrupted")
    again = begun(tmp_path)
    again.log({"loss": 2.0}, "epoch", 1)
    again.log({"loss": 1.0}, "epoch", 2)
    again.end("finished")
    before, after = read_offline_run(tmp_path, 0), read_offline_run(tmp_path, 1)
    assert before.id == after.id == (tmp_path / "wandb_id").read_text().strip()
    assert [(row["_step"], row["epoch"], row["loss"]) for row in [*before.history, *after.history]] == [
        (0, 1, 2.0),
        (1, 2, 1.0),
    ]
    assert (before.exit_code, after.exit_code) == (255, 0)
    assert (before.summary["state"], after.summary["state"]) == ("interrupted", "finished")
    assert before.metrics["loss"] == "epoch"
    assert before.config["a.b"] == 1


def test_a_failed_run_says_why_in_summary_console_and_alert(tmp_path: Path) -> None:
    log = begun(tmp_path, alerts=True)
    log.stage("further_training")
    log.end("failed", "further_training.lr: all runs diverged")
    run = read_offline_run(tmp_path)
    assert run.exit_code == 1
    assert run.summary["error"] == "further_training.lr: all runs diverged"
    assert "error: further_training.lr: all runs diverged" in run.console
    assert run.alerts == ["failed: named: further_training.lr: all runs diverged"]


def test_an_offline_run_alerts_nobody_unless_asked_to(tmp_path: Path) -> None:
    log = begun(tmp_path)
    log.end("failed", "no")
    assert not read_offline_run(tmp_path).alerts


def test_an_online_run_without_a_login_is_written_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fimo"):
        begun(tmp_path, mode="online").end("finished")
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
    monkeypatch.setattr("fimo.live.wandb.CONNECT_SECONDS", 2)
    log = begun(tmp_path, mode="online")
    log.log({"loss": 2.0}, "epoch", 1)
    log.end("finished")
    wandb.teardown()
    assert "writing offline" in caplog.text
    assert read_offline_run(tmp_path).history[0]["loss"] == 2.0


def test_a_run_goes_on_where_w_and_b_can_not_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise wandb.Error("no disk")

    monkeypatch.setattr(wandb, "init", fail)
    log = begun(tmp_path)
    log.log({"loss": 2.0}, "epoch", 1)
    log.end("finished")
    assert "logger.wandb failed and is switched off: no disk" in caplog.text
    assert "2.0" in (tmp_path / "metrics.csv").read_text()


def test_nothing_of_w_and_b_is_written_when_it_is_disabled(tmp_path: Path) -> None:
    begun(tmp_path, mode="disabled").end("finished")
    assert not list(tmp_path.glob("wandb*"))


@pytest.mark.parametrize(("said", "meant"), [("dryrun", "offline"), ("run", "online"), (None, "offline")])
def test_w_and_bs_words_for_modes_are_known(said: str | None, meant: str) -> None:
    assert WandbLogger(mode=said).mode == meant


def test_a_job_of_w_and_bs_agent_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert WandbLogger().mode == "online"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"logger\.wandb\.mode: expected one of offline, online, disabled"):
        WandbLogger(mode="ofline")


def test_an_id_that_the_environment_gives_is_not_that_of_every_job_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    jobs = [tmp_path / name for name in ("0", "1")]
    for job in jobs:
        job.mkdir()
    assert run_id(tmp_path) == "given"
    assert len({run_id(job, one_of_many=True) for job in jobs} | {"given"}) == 3
