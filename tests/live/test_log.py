from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fimo.live.log import About, Log
from fimo.live.outlet import Outlet


class Plain:
    """What every Lightning logger has."""

    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []
        self.status = ""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.points.append((metrics, step))

    def finalize(self, status: str) -> None:
        self.status = status


class Failing(Plain):
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise OSError("no space left on device")


def begun(folder: Path, *loggers: Any) -> Log:
    log = Log(folder, [Outlet(f"logger.{k}", logger) for k, logger in enumerate(loggers)])
    log.begin(About(folder, "a run"))
    return log


def test_points_reach_every_logger_and_the_file_whatever_others_do(tmp_path: Path) -> None:
    log = begun(tmp_path, Failing(), plain := Plain())
    for epoch in (1, 2):
        log.log({"loss": 1 / epoch, "undefined": math.nan}, "epoch", epoch)
    log.log({"seconds": 3.0})
    log.end("finished")
    assert plain.points == [
        ({"loss": 1.0, "epoch": 1}, 1),
        ({"loss": 0.5, "epoch": 2}, 2),
        ({"seconds": 3.0}, 2),
    ]
    assert plain.status == "success"
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["row"].tolist() == [0, 1, 2]
    assert table["axis"].fillna("").tolist() == ["epoch", "epoch", ""]
    assert table["loss"].tolist()[:2] == [1.0, 0.5]
    assert table["seconds"].tolist()[2] == 3.0


def test_a_run_that_goes_on_logs_only_what_lies_beyond(tmp_path: Path) -> None:
    first = begun(tmp_path, Plain())
    first.stage("final_model")
    first.log({"loss": 2.0}, "epoch", 1)
    first.log({"seconds": 3.0})
    first.log({"loss": 1.0}, "epoch", 2)
    first.end("interrupted")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,17.5,ep")  # a killed process's last row
    again = begun(tmp_path, plain := Plain())
    again.stage("final_model")
    for epoch, loss in ((1, 2.0), (2, 1.0), (3, 0.5)):
        again.log({"loss": loss}, "epoch", epoch)
    again.log({"accuracy": 0.25}, "epoch", 2)
    again.log({"seconds": 4.0})
    again.stage("further_training")
    again.end("finished")
    assert [point for point, _ in plain.points] == [
        {"loss": 0.5, "epoch": 3}, {"accuracy": 0.25, "epoch": 2}, {"stage": 2},
    ]  # fmt: skip
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["row"].tolist() == list(range(7))
    assert table["loss"].dropna().tolist() == [2.0, 1.0, 0.5]


def test_a_log_without_a_folder_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = Log(None, [Outlet("logger.x", plain := Plain())])
    log.begin(About(tmp_path, "a run"))
    log.stage("final_model")
    log.log({"loss": 1.0}, "epoch", 1)
    log.ended("final_model", 1.0)
    log.end("finished")
    assert not plain.points
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = begun(tmp_path / "missing", plain := Plain())
    log.log({"loss": 1.0}, "epoch", 1)
    log.end("failed", "all runs diverged")
    assert len(plain.points) == 1
    assert plain.status == "failed"
    assert "metrics.csv failed and is switched off" in caplog.text


def test_a_file_that_can_not_be_read_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.csv").write_text("row,time,axis\nzero,then,epoch\n")
    log = begun(tmp_path)
    log.log({"loss": 1.0}, "epoch", 1)
    log.end("finished")
    assert "metrics.csv can't be read" in caplog.text
    assert "zero" in (tmp_path / "unreadable_metrics.csv").read_text()
    assert pd.read_csv(tmp_path / "metrics.csv")["loss"].tolist() == [1.0]
