"""Several runs in one report: a sweep over optimizers, a sweep over methods."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from fimo.errors import InputError
from fimo.reporting import Results, write_report
from fimo.reporting.interactive import by_method_figure
from fimo.reporting.overlay import load_runs, run_folders, sweep_report
from tests.reporting.example import example


def only(run: Results, *methods: str) -> Results:
    """Return a run of some of its methods, as a job of a sweep over methods leaves it."""

    def kept(table: pd.DataFrame | None, column: str = "method", more: tuple[str, ...] = ()) -> pd.DataFrame:
        assert table is not None
        return table[table[column].isin([*methods, *more])]

    return dataclasses.replace(
        run,
        name=f"diabetes: {', '.join(methods)}",
        scores={m: run.scores[m] for m in methods},
        evaluation=kept(run.evaluation),
        bootstrap=kept(run.bootstrap),
        slopes=kept(run.slopes),
        cost=kept(run.cost, "stage", ("final_model", "further_training", "evaluation", "report")),
        config={**run.config, "methods": dict.fromkeys(methods)},
        tasks={},
    )


def sweep(folder: Path, *jobs: Results) -> Path:
    folder.mkdir()
    (folder / "sweep.json").write_text("{}")
    for k, job in enumerate(jobs):
        job.save(folder / str(k), everything=True)
    return folder


def with_optimizer(optimizer: str) -> Results:
    run = example("diabetes: 4 methods")
    further = {**run.config["further_training"], "optimizer": optimizer}
    return dataclasses.replace(run, config={**run.config, "further_training": further})


def test_a_sweep_over_optimizers_ends_in_one_report_that_names_them(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", with_optimizer("sgd"), with_optimizer("adam"))
    assert [run.name for run in load_runs([folder])] == ["sgd", "adam"]
    report = sweep_report(folder)
    assert report == folder / "report.html"
    text = report.read_text()
    assert "2 runs side by side" in text
    assert "<code>further_training.optimizer</code> (sgd, adam)" in text


def test_runs_that_differ_in_lists_and_empty_settings_are_drawn_side_by_side(tmp_path: Path) -> None:
    lists = [
        dataclasses.replace(run, config={**run.config, "evaluation": {"tasks": tasks}})
        for run, tasks in ((with_optimizer("sgd"), ["removal"]), (with_optimizer("sgd"), {}))
    ]
    text = sweep_report(sweep(tmp_path / "sweep", *lists)).read_text()  # type: ignore[union-attr]
    assert "<code>evaluation.tasks</code> ([&#39;removal&#39;], {})" in text


def test_a_sweep_over_methods_is_one_run_with_all_of_them(tmp_path: Path) -> None:
    whole = example("diabetes: 4 methods", tasks={})
    parts = [only(whole, "follows"), only(whole, "datainf", "random"), only(whole, "graddot")]
    (run,) = load_runs([sweep(tmp_path / "sweep", *parts)])
    assert run.name == "diabetes: 4 methods"
    order = ["method", "metric", "step", "seeds"]
    pd.testing.assert_frame_equal(
        run.evaluation.sort_values(order, ignore_index=True),
        whole.evaluation.sort_values(order, ignore_index=True),
    )
    assert set(run.cost["stage"]) == set(whole.cost["stage"])
    assert not run.cost["stage"].duplicated().any()
    assert set(run.scores) == set(whole.scores)


def test_runs_of_other_seeds_are_not_put_together(tmp_path: Path) -> None:
    parts = [only(example(), "graddot"), only(example(seeds=3), "datainf")]
    runs = load_runs([sweep(tmp_path / "sweep", *parts)])
    assert [run.name for run in runs] == ["diabetes: graddot", "diabetes: datainf"]


def test_a_sweep_stands_for_its_finished_jobs_in_their_order(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep")
    with pytest.raises(InputError, match="no job of this sweep has finished"):
        run_folders(folder)
    assert sweep_report(folder) is None
    for job in ("10", "2", "0"):
        example().save(folder / job, everything=True)
    (folder / "2" / "cost.csv").unlink()
    assert [path.name for path in run_folders(folder)] == ["0", "10"]
    assert run_folders(folder / "10") == [folder / "10"]


def test_more_runs_than_a_reader_can_take_in_get_no_report_of_their_own(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", *(with_optimizer(f"o{k}") for k in range(7)))
    assert sweep_report(folder) is None
    assert not (folder / "report.html").exists()


def test_a_panel_for_each_method_lays_runs_over_one_another() -> None:
    lion = dataclasses.replace(only(example(noise=2.0), "graddot", "random"), name="lion")
    runs = [example("sgd"), example("adam", noise=3.0), lion]
    figure = by_method_figure(runs, "spearman")
    having = {"graddot": runs, "datainf": runs[:2], "follows": runs[:2]}
    panels = [note.text for note in figure.layout.annotations]
    assert sorted(panels) == sorted(having), "no baselines"
    colors: dict[str, set[str]] = {}
    named = []
    for k, method in enumerate(panels):
        here = [t for t in figure.data if t.xaxis == ("x" if k == 0 else f"x{k + 1}")]
        lines = {t.name: t for t in here if t.hoverinfo != "skip"}
        assert {name for name in lines if not name.startswith("ceiling")} == {r.name for r in having[method]}
        for run in having[method]:
            rows = run.evaluation.query("metric == 'spearman' and method == @method and seeds == @run.seeds")
            line, ceiling = lines[run.name], lines[f"ceiling, {run.name}"]
            assert list(line.y) == rows["mean"].tolist()
            assert list(line.x) == list(ceiling.x) == rows["epoch"].tolist()
            assert list(ceiling.y) == rows["ceiling"].tolist()
            assert line.line.color == ceiling.line.color
            assert line.legendgroup == ceiling.legendgroup, "hidden together"
            colors.setdefault(run.name, set()).add(line.line.color)
            named += [run.name] * line.showlegend
    assert named == ["sgd", "adam", "lion"], "each once"
    assert len({color for (color,) in colors.values()}) == 3


def test_without_a_common_method_there_are_no_panels_of_methods(tmp_path: Path) -> None:
    runs = [only(example(), "graddot", "random"), only(example(noise=3.0), "datainf", "random")]
    assert not by_method_figure(runs, "cosine").data
    assert "run by run" not in write_report(runs, tmp_path / "report.html").read_text("utf-8")
