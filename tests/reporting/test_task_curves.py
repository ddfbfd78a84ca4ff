"""A task of one's own that says as what its table is drawn: in every report and figure, reloaded or not."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pandas as pd
import pytest

from fimo.app.summary import with_findings
from fimo.reporting import Results, write_figures, write_report
from fimo.reporting.dashboard import one_value
from fimo.reporting.interactive import all_figures
from fimo.reporting.task_curves import Curve
from fimo.reporting.wandb import summary
from fimo.tasks import Judged, Task
from tests.reporting.example import example, example_tasks

CURVE = Curve(
    "noise", "noise of the inputs", "agreement", "Agreement where the inputs of the test are noisy."
)


class Noisy(Task):
    """A user's own."""

    curve = CURVE

    def __call__(self, run: Judged) -> pd.DataFrame:
        return table()


def table() -> pd.DataFrame:
    rows = [
        (m, step, n, 0.9 - n * step, 0.01)
        for m in ("graddot", "random")
        for step in (1, 2)
        for n in (0.1, 0.2)
    ]
    return pd.DataFrame(rows, columns=["method", "step", "noise", "mean", "sem"])


def found(folder: Path, name: str = "cost") -> Results:
    """Results with the task, which may be called as a figure of the report is."""
    plain = dataclasses.replace(example(), tasks={})
    return with_findings(plain, {name: table()}, folder, {name: Noisy()})


def test_it_is_drawn_in_page_and_figures_with_the_rows_of_the_last_point(tmp_path: Path) -> None:
    for run in (found(tmp_path), _reloaded(tmp_path)):
        assert run.curve("cost") == CURVE
        (figure,) = all_figures([run])["task-cost"].values()
        lines = {trace.name: list(trace.y) for trace in figure.data if trace.mode and "lines" in trace.mode}
        assert lines["graddot"] == [0.7, 0.5]  # of step 2
        assert figure.layout.xaxis.title.text == CURVE.x_title
        assert "task-cost" in [path.stem for path in write_figures(run, tmp_path / "figures")]
        page = write_report(run, tmp_path / "report.html").read_text()
        assert page.count(CURVE.caption) == 1
        assert 'data-figure="task-cost"' in page
        assert summary(run)["cost/graddot/0.2"] == 0.5


def _reloaded(folder: Path) -> Results:
    found(folder).save(folder / "run", everything=True)
    return Results.load(folder / "run")


def test_runs_side_by_side_share_it_and_runs_without_it_have_none(tmp_path: Path) -> None:
    with_it, without = found(tmp_path), dataclasses.replace(example("other"), tasks={})
    assert "task-cost" in all_figures([with_it, without])
    assert "task-cost" not in all_figures([without])


def test_a_dashboard_takes_tasks_with_one_number_for_each_method(tmp_path: Path) -> None:
    run = example(tasks=example_tasks())
    assert [task for task in run.tasks if one_value(run, task)] == ["datamodeling", "mislabelled"]
    assert not one_value(found(tmp_path), "cost")


def test_a_table_without_the_columns_is_written_and_a_warning_says_what_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = dataclasses.replace(example(), tasks={})
    with caplog.at_level(logging.WARNING):
        run = with_findings(plain, {"mine": table().drop(columns="sem")}, tmp_path, {"mine": Noisy()})
    assert "mine is not drawn: its table has no column sem" in caplog.text
    assert not run.tasks
    assert len(pd.read_csv(tmp_path / "evaluation_mine.csv")) == 8
