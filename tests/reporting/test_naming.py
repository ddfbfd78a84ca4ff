"""Runs side by side are named by what tells them apart."""

from __future__ import annotations

from pathlib import Path

from fimo.reporting import Results
from fimo.reporting.naming import differences, named_apart
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
