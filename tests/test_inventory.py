"""``fimo store`` lists what is kept, and prunes what it is told to and nobody is using."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from fimo.app.command import main as command
from fimo.errors import InputError
from fimo.store import VERSION
from fimo.store.files import Store
from fimo.store.inventory import entries, main

DAY = 86400


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a model used today, scores of 10 and 40 days ago, and one of an older version."""
    root, made = tmp_path / "store", Store(tmp_path / "store")
    for kind, about, size, days in [
        ("final_model", "Mlp, 397 training instances", 3000, 0),
        ("scores", "ekfac, 45 x 50 scores", 2000, 10),
        ("scores", "graddot, 45 x 50 scores", 1_000_000, 40),
    ]:
        folder = made.folder(kind, {"about": about}, about)
        (folder / "lock").touch()
        (folder / "result.safetensors").write_bytes(bytes(size))
        for path in folder.iterdir():
            os.utime(path, (0, time.time() - days * DAY))
    old = root / "scores" / "0123456789"
    old.mkdir()
    (old / "key.json").write_text(json.dumps({"version": 1, "loss": "mse"}))
    (root / "further_training" / "ab").mkdir(parents=True)
    return root


def left(store: Path) -> list[str]:
    return sorted(entry.about.partition(",")[0] for entry in entries(store))


EVERYTHING = ["(no description)", "(no description)", "Mlp", "ekfac", "graddot"]


def test_results_are_listed_by_kind_with_size_age_and_what_they_are(store: Path, capsys) -> None:
    assert main(["--store", str(store)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{store}: 1.0 MB in 5 results")
    assert "final models: 3.2 kB in 1" in printed or "final models: 3.1 kB in 1" in printed
    assert "scores: 1.0 MB in 3" in printed
    line = next(line for line in printed.splitlines() if "graddot" in line)
    assert line.split()[1:5] == ["1.0", "MB", "40", "d"]
    assert "graddot, 45 x 50 scores" in line
    assert printed.count("[not read any more]") == 2
    assert left(store) == EVERYTHING


@pytest.mark.parametrize(
    ("flags", "stays"),
    [
        ("--older-than 30d", ["(no description)", "(no description)", "Mlp", "ekfac"]),
        ("--older-than 1w --kind scores", ["(no description)", "(no description)", "Mlp"]),
        ("--kind final_model", ["(no description)", "(no description)", "ekfac", "graddot"]),
        ("--keep-mb 0.9", ["(no description)", "(no description)", "Mlp", "ekfac"]),
        ("--keep-mb 2", EVERYTHING),
        ("--old-version", ["(no description)", "Mlp", "ekfac", "graddot"]),
        ("--unreadable", ["(no description)", "Mlp", "ekfac", "graddot"]),
        ("--old-version --unreadable", ["Mlp", "ekfac", "graddot"]),
        ("--all", []),
    ],
)
def test_what_is_chosen_is_deleted_once_it_is_confirmed(
    store: Path, flags: str, stays: list[str], capsys
) -> None:
    # what was never used is older than anything
    command = ["prune", "--store", str(store), *flags.split()]
    old = store / "scores" / "0123456789"
    for path in (*store.glob("further_training/*"), old / "key.json"):
        os.utime(path, (0, time.time()))
    assert main(command) == 0
    assert "nothing was deleted; --yes deletes these" in capsys.readouterr().out
    assert left(store) == EVERYTHING
    assert main([*command, "--yes"]) == 0
    assert f"deleted {len(EVERYTHING) - len(stays)} results" in capsys.readouterr().out
    assert left(store) == stays


@pytest.mark.parametrize("name", ["lock", ".lock", "runs-12.lock", ".planning.lock"])
def test_what_a_process_holds_locked_is_never_deleted(store: Path, name: str, capsys) -> None:
    held = next(store.glob("scores/*/result.safetensors")).parent
    with FileLock(held / name):
        assert main(["prune", "--all", "--yes", "--store", str(store)]) == 0
    assert f"in use, kept: {held}" in capsys.readouterr().out
    assert [entry.folder for entry in entries(store)] == [held]
    assert (held / "result.safetensors").exists()


def test_a_result_that_is_used_again_counts_as_used_now(store: Path) -> None:
    about = "graddot, 45 x 50 scores"
    before = next(entry for entry in entries(store) if entry.about == about)
    assert Store(store).folder("scores", {"about": about}, about) == before.folder
    after = next(entry for entry in entries(store) if entry.about == about)
    assert time.time() - after.used < DAY < time.time() - before.used


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune"], "prune: say what: --older-than"),
        (
            ["prune", "--older-than", "30"],
            "--older-than: expected a time such as 12h, 30d or 4w but got '30'",
        ),
        (["--store", "/nowhere"], "--store: no such folder: /nowhere; --store FOLDER names"),
    ],
)
def test_a_mistake_is_one_line(store: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        main(["--store", str(store), *arguments] if "--store" not in arguments else arguments)


def test_the_command_line_and_a_module_run_it(store: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for arguments, status in ([], 0), (["prune"], 2):
        monkeypatch.setattr(sys, "argv", ["fimo", "store", "--store", str(store), *arguments])
        with pytest.raises(SystemExit) as ended:
            command(Path("conf"))
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert "in 5 results" in printed.out
    assert printed.err.startswith("error: prune: say what")


def test_results_of_an_older_version_are_never_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Store(tmp_path).folder("scores", {"a": 1})
    monkeypatch.setattr("fimo.store.files.VERSION", VERSION + 1)
    assert Store(tmp_path).folder("scores", {"a": 1}) != folder
