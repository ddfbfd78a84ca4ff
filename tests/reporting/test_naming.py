"""Runs side by side are named by what tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from fimo.errors import InputError
from fimo.reporting import Results
from fimo.reporting.naming import differences, named_apart
from fimo.reporting.results import run_folders
from tests.reporting.example import example


def run(name: str = "concrete: 20 methods", **further: object) -> Results:
    config = {"dataset": {"name": "concrete"}, "store": name, "further_training": {"lr": 0.03, **further}}
    return example(name, config=config)


def names(*runs: Results) -> list[str]:
    return [named.name for named in named_apart(runs, [Path(f"sweep/{k}") for k in range(len(runs))])]


def test_the_optimizer_alone_names_runs_that_it_tells_apart() -> None:
    sgd, adam = run(optimizer="sgd"), run(optimizer="adam", lr=1e-4)
    assert names(sgd, adam) == ["sgd", "adam"]
    assert differences([sgd, adam]) == {
        "further_training.optimizer": ["sgd", "adam"],
        "further_training.lr": [0.03, 1e-4],
    }


def test_as_many_settings_are_named_as_are_needed() -> None:
    runs = [run(optimizer="sgd"), run(optimizer="adam", lr=1e-4), run(optimizer="adam", lr=1e-3)]
    assert names(*runs) == ["sgd, lr 0.03", "adam, lr 0.0001", "adam, lr 0.001"]


def test_where_settings_don_t_tell_runs_apart_their_names_or_folders_do() -> None:
    assert names(run(), run()) == ["concrete: 20 methods, 0", "concrete: 20 methods, 1"]
    assert names(run("one"), run("two")) == ["one", "two"]
    assert names(run("alone")) == ["alone"]


def test_a_sweep_stands_for_its_finished_jobs_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="no job of this sweep has finished"):
        run_folders(tmp_path)
    for job in ("10", "2", "0"):
        run().save(tmp_path / job, everything=True)
    (tmp_path / "2" / "cost.csv").unlink()
    assert [folder.name for folder in run_folders(tmp_path)] == ["0", "10"]
    assert run_folders(tmp_path / "10") == [tmp_path / "10"]
