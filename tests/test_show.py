"""``fimo show FOLDER`` prints what a finished run answered, quickly and from files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fimo.app.command import main as command
from fimo.app.jobs import JobRecord
from fimo.app.show import shown
from fimo.errors import InputError
from fimo.reporting.audit_answer import audit_answer
from fimo.reporting.plain_text import as_text
from fimo.reporting.study_answer import study_answer
from tests.reporting.audit_example import example_audit, example_run
from tests.reporting.example import example


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    example().save(folder, everything=True)
    study_answer(example()).save(folder)
    return folder


def body(text: str) -> str:
    """Return a text without its last paragraph, the files."""
    return text.rpartition("\n\n")[0]


def test_a_study_is_printed_as_it_was_answered_with_the_files_that_are_there(study: Path) -> None:
    text = shown(study, 100)
    assert body(text) == body(as_text(study_answer(example()), 100))
    assert str(study / "evaluation.csv") in text
    assert "report.html" not in text, "report=false"


def test_a_run_of_before_answers_were_kept_is_answered_anew(study: Path) -> None:
    text = shown(study, 100)
    (study / "answer.json").unlink()
    assert shown(study, 100) == text


def test_an_audit_is_printed_from_its_tables(tmp_path: Path) -> None:
    example_run().save(tmp_path / "run")
    assert body(shown(tmp_path / "run", 100)) == body(as_text(audit_answer(example_run()), 100))
    example_audit().save(tmp_path / "alone")
    assert "Measured: 108 of 300 training rows" in shown(tmp_path / "alone", 100)


def test_a_sweep_is_a_line_for_each_job(tmp_path: Path, study: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    study.rename(tmp_path / "0")
    JobRecord(0, ["seed=0", "model.lr=0.1"], done=True, objective=0.912).write(tmp_path / "0")
    (tmp_path / "1").mkdir()
    JobRecord(1, ["seed=0", "model.lr=9"], status="failed", error="all runs diverged").write(tmp_path / "1")
    lines = shown(tmp_path, 110).splitlines()
    assert lines[0].startswith("sweep of 2 jobs")
    assert lines[2].split()[:4] == ["#0", "model.lr=0.1", "done", "0.912"]
    assert "Clearly matter" in lines[2]
    assert lines[3].split()[:3] == ["#1", "model.lr=9", "failed"]
    assert lines[3].endswith("all runs diverged")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_a_finished_run_is_refused_in_one_line(
    tmp_path: Path, name: str, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no (such )?folder"):
        shown(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["fimo", "show", str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        command(Path("conf"))
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_showing_a_run_imports_no_torch(study: Path) -> None:
    code = (
        "import sys; sys.argv = ['fimo', 'show', sys.argv[1]]; from fimo.app.command import console\n"
        "try: console()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(study)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"
    assert json.loads((study / "answer.json").read_text())["question"] in done.stdout
