"""A run's folder never holds results of two configurations, and one run at a time writes into it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fimo.app.command import main
from fimo.app.run_folder import RESULTS, RunFolder, clear, results
from fimo.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = {
    "further_training": {"lr": 0.1, "chunk": "auto"}, "threads": 1, "methods": {"graddot": {"memory_mb": 1}},
}  # fmt: skip


def changed(**further: Any) -> dict[str, Any]:
    return {**CONFIG, **further}


def begun(folder: Path, config: dict[str, Any]) -> None:
    held = RunFolder(folder)
    try:
        held.begin(config)
    finally:
        held.end()


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The folder of a run that ended."""
    begun(tmp_path, CONFIG)
    (tmp_path / "evaluation.csv").touch()
    return tmp_path


def test_the_same_configuration_goes_on_in_its_folder(done: Path) -> None:
    begun(done, CONFIG)
    begun(done, changed(threads=2, further_training={"lr": 0.1, "chunk": 3}, logger={"mode": "online"}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(further_training={"lr": 0.2}), "further_training.lr: 0.1 there, 0.2 now"),
        (changed(methods={}), "methods.graddot.memory_mb: 1 there, None now"),
        (changed(seed=1), "seed: None there, 1 now"),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(
    done: Path, config: dict[str, Any], said: str
) -> None:
    (done / ".hydra").mkdir()
    (done / ".hydra" / "config.yaml").write_text("of the first run")
    held = RunFolder(done)
    (done / ".hydra" / "config.yaml").write_text("of the second, as Hydra writes it before it begins")
    with pytest.raises(InputError, match=r"hydra\.run\.dir: .* holds the results of another run") as refused:
        held.begin(config)
    held.end()
    assert said in str(refused.value)
    assert (done / ".hydra" / "config.yaml").read_text() == "of the first run"
    assert json.loads((done / "run.json").read_text())["config"]["further_training.lr"] == 0.1


def test_other_code_or_input_files_are_another_run(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = done / "data.csv"
    data.write_text("1")
    named = changed(dataset={"path": str(data)})
    clear(done)
    begun(done, named)
    (done / "evaluation.csv").touch()
    begun(done, named)
    data.write_text("12")
    with pytest.raises(InputError, match="with other input files or code"):
        begun(done, named)
    data.unlink()
    monkeypatch.setattr("fimo.store.fingerprint.code_identity", lambda: "edited")
    with pytest.raises(InputError, match="with other input files or code"):
        begun(done, named)


@pytest.mark.parametrize("pattern", RESULTS)
def test_results_without_a_record_are_left_alone(tmp_path: Path, pattern: str) -> None:
    (tmp_path / pattern.replace("*", "removal")).touch()
    with pytest.raises(InputError, match="which left no record"):
        begun(tmp_path, CONFIG)


def test_a_run_that_left_no_results_may_be_corrected_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    begun(tmp_path, CONFIG)
    begun(tmp_path, changed(seed=1))
    assert results(tmp_path) == []


def test_two_runs_at_the_same_time_are_refused(tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    with pytest.raises(InputError, match=r"hydra\.run\.dir: another run is writing into"):
        RunFolder(tmp_path)
    held.end()
    RunFolder(tmp_path).end()


def test_clearing_deletes_results_and_nothing_else(done: Path) -> None:
    (done / "scores").mkdir()
    (done / "scores" / "graddot.safetensors").touch()
    (done / "mine.txt").touch()
    clear(done)
    assert sorted(p.name for p in done.iterdir()) == ["mine.txt", "run.json"]


def test_the_command_line_refuses_it_and_shows_its_help_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def result(config: Any, folder: Path) -> float:
        (folder / "evaluation.csv").write_text(str(config.seed))
        return 0.0

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fimo", f"hydra.run.dir={tmp_path}/run", *arguments])
        try:
            main(ROOT / "conf")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    monkeypatch.setattr("fimo.app.experiment.run_experiment", result)
    assert run("seed=1") == 0
    assert run("seed=1", "threads=2") == 0
    assert run("seed=2") == 2
    assert "hydra.run.dir: " in (said := capsys.readouterr().err)
    assert "(seed: 1 there, 2 now)" in said
    assert (tmp_path / "run" / "evaluation.csv").read_text() == "1"
    assert "seed: 1" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text()
    held = RunFolder(tmp_path / "run")
    assert run("seed=1") == 2
    assert "another run is writing" in capsys.readouterr().err
    assert run("--cfg", "job") == 0
    held.end()
