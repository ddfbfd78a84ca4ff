"""What several final models' studies become: one run, its answer, its page."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest

from fimo.evaluation import Evaluation
from fimo.evaluation.several_models import over_models
from fimo.reporting import ModelsRun, Results, write_models_report
from fimo.reporting.models_answer import models_answer, probabilities, ranked
from fimo.reporting.models_report import models_figures
from fimo.reporting.models_run import only_means
from tests.evaluation.test_several_models import evaluations
from tests.reporting.example import example, example_tasks


def several(models: int = 3, **changes: object) -> ModelsRun:
    """A study of final models of seeds 4, 5, …, with tables of further evaluations."""
    results = {}
    for k, evaluation in enumerate(evaluations(models)):
        tasks = {name: table.assign(mean=table["mean"] + 0.1 * k) for name, table in example_tasks().items()}
        results[4 + k] = only_means(as_run(evaluation, tasks))
    first = next(iter(results.values()))
    found = ModelsRun.of(results, over_models(evaluations(models)), first.cost, {}, {})
    return dataclasses.replace(found, **changes)


def as_run(evaluation: Evaluation, tasks: dict[str, pd.DataFrame]) -> Results:
    made = example(tasks=tasks)
    stages = {"graddot": "good", "datainf": "poor"}
    cost = made.cost.assign(stage=made.cost["stage"].replace(stages))
    return dataclasses.replace(made, evaluation=evaluation.table, cost=cost)


def test_methods_are_ranked_with_the_probability_that_each_beats_the_next() -> None:
    run = several()
    table = ranked(run)
    assert list(table["method"]) == ["good", "poor"]
    beats = probabilities(run, "cosine")
    assert table["beats_next"].iloc[0] == beats["good", "poor"] == 1 - beats["poor", "good"]
    assert table["another"].iloc[0] < table["beats_next"].iloc[0]
    assert math.isnan(table["beats_next"].iloc[1])
    assert (table["lowest"] <= table["mean"]).all()
    assert (table["mean"] <= table["highest"]).all()


def test_a_method_that_followed_the_same_seeds_comes_after_all_others() -> None:
    run = several()
    table = run.combined.evaluation
    same = table.assign(followed_seeds=["same" if m == "good" else "none" for m in table["method"]])
    run = dataclasses.replace(run, combined=dataclasses.replace(run.combined, evaluation=same))
    assert list(ranked(run)["method"]) == ["poor", "good"]
    assert any("followed the measurement's own seeds" in said for said in models_answer(run).distrust)


def test_the_first_screen_says_what_more_of_would_help_most() -> None:
    run = several()
    most = {
        "part_models": "More final models (model.seeds=6)",
        "part_seeds": "More seeds of further training (further_training.seeds=12)",
        "part_tests": "More test instances",
    }
    for column, said in most.items():
        variance = run.variance.assign(**{c: float(c == column) + 0.25 for c in most})
        answer = models_answer(dataclasses.replace(run, variance=variance))
        assert answer.do[0].startswith(said)
        assert "71% from" in answer.others[0]


def test_a_single_rival_is_named_with_its_probability() -> None:
    run = several()
    sure = f"{probabilities(run, 'cosine')['good', 'poor']:.0%}"
    assert models_answer(run).verdict[1] == f"It beats poor with a probability of {sure}."


def test_methods_with_the_same_agreement_are_no_rivals() -> None:
    run = several()
    same = dataclasses.replace(run, pairs=run.pairs.assign(probability=0.5))
    assert models_answer(same).verdict[1] == "There is no other method to compare it with."


def test_further_evaluations_are_means_over_final_models() -> None:
    run = several()
    table = run.combined.tasks["mislabelled"].set_index("method")
    assert table.loc["graddot", "mean"] == pytest.approx(0.6 + 0.1)
    assert table.loc["graddot", "sem"] == pytest.approx(0.1 / 3**0.5)
    assert table.loc["graddot", "chance"] == pytest.approx(0.1)
    assert set(table["final_models"]) == {3}
    assert len(run.combined.tasks["removal"]) == len(example_tasks()["removal"])


def test_the_page_holds_every_figure_once_for_each_metric(tmp_path: Path) -> None:
    run = several()
    figures = models_figures(run)
    assert set(figures) == {"each", "beats", "parts"}
    assert all(set(by) == set(run.combined.metrics) for by in figures.values())
    heat = figures["beats"]["cosine"].data[0]
    assert heat.z[0][1] == pytest.approx(probabilities(run, "cosine")["good", "poor"])
    assert heat.z[0][0] is None
    dots = figures["each"]["cosine"].data[0]
    assert len(dots.x) == 3
    page = write_models_report(run, tmp_path / "report.html").read_text()
    assert "Which attribution method is best, over 3 final models?" in page
    assert 'href="final_models/5/report.html"' in page
