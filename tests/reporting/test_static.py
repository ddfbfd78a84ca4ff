from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fimo.evaluation import assess
from fimo.reporting import Results
from fimo.reporting import __main__ as command
from fimo.reporting.curves import agreement_table
from fimo.reporting.findings import all_methods, highlighted
from fimo.reporting.panels import thinned
from fimo.reporting.static import FIGURES, agreement_figure, sorted_figure, write_figures
from fimo.reporting.style import OTHER
from tests.evaluation.synthetic import synthetic
from tests.reporting.audit_example import example_run
from tests.reporting.example import example, example_tasks


def follow(points: int) -> Results:
    """Return results with an evaluation point per epoch."""
    sensitivity, signal = synthetic(points=points)
    scores = {"graddot": ("FiMO", signal[0])}
    table = assess(scores, sensitivity, resamples=0).table
    return dataclasses.replace(
        example(), sensitivity=sensitivity, scores={"graddot": signal[0]}, evaluation=table, distance=None
    )


def many_methods() -> Results:
    """Return results with twelve methods."""
    run = example()
    table = run.evaluation
    worse = [
        table[table["method"] == "datainf"].assign(method=f"m{k}", mean=lambda t, k=k: t["mean"] - 0.02 * k)
        for k in range(8)
    ]
    known = run.scores["datainf"]
    scores = {f"m{k}": dataclasses.replace(known, values=known.values.roll(k + 1, -1)) for k in range(8)}
    return dataclasses.replace(run, evaluation=pd.concat([table, *worse]), scores={**run.scores, **scores})


def test_every_figure_of_the_paper_is_a_vector_and_a_picture(tmp_path: Path) -> None:
    run = example(retraining=example(seeds=2).sensitivity, tasks=example_tasks())
    files = write_figures(run, tmp_path, dpi=60)
    assert {path.name for path in files} == {f"{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")}
    for path in files:
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF")
        else:
            picture = Image.open(path)
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(2**24)) > 20, "something is drawn"


def test_a_figure_without_data_is_left_out(tmp_path: Path) -> None:
    files = write_figures(
        example(distance=None), tmp_path, ["distance", "retraining", "removal", "datamodeling", "mislabelled"]
    )
    assert files == []


def test_bands_and_lines_are_the_table_s() -> None:
    run = example()
    axes = agreement_figure([run]).axes[0]
    table = run.evaluation
    rows = table[(table.method == "graddot") & (table.metric == "cosine") & (table.seeds == 6)]
    line = next(line for line in axes.lines if line.get_label() == "graddot")
    assert list(line.get_ydata()) == pytest.approx(rows["mean"].tolist())
    assert list(line.get_xdata()) == rows["epoch"].tolist()


def test_of_many_methods_a_handful_is_coloured_and_the_others_are_named_together() -> None:
    run = many_methods()
    figure = agreement_figure([run, run])
    assert figure is not None
    shown = highlighted([run])
    assert len(shown) == 8
    assert {"graddot", "random"} <= set(shown)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    colours = [lines[method].get_color() for method in shown]
    assert len(set(colours)) == 8
    assert all(
        (line.get_color() == OTHER) == (name not in [*shown, "noise ceiling"]) for name, line in lines.items()
    )
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries[0] == "noise ceiling"
    assert entries[1:9] == shown, "the best first"
    assert entries[9].replace("\n", " ") == "others: " + ", ".join(
        m for m in all_methods([run]) if m not in shown
    )


def test_of_methods_with_the_same_scores_one_is_coloured_and_graddot_stands_for_its_own() -> None:
    run = many_methods()
    twin = run.evaluation[run.evaluation["method"] == "graddot"].assign(method="tracin")
    scores = {"tracin": run.scores["graddot"], **run.scores}
    run = dataclasses.replace(run, evaluation=pd.concat([twin, run.evaluation]), scores=scores)
    assert "graddot" in highlighted([run])
    assert "tracin" not in highlighted([run])


def test_amounts_of_further_training_over_two_decades_are_drawn_on_a_logarithmic_axis() -> None:
    few, many = (agreement_figure([follow(points)]) for points in (5, 120))
    assert few is not None
    assert many is not None
    assert few.axes[0].get_xscale() == "linear"
    assert many.axes[0].get_xscale() == "log"
    assert [t.get_text() for t in many.axes[0].get_xticklabels()] == ["1", "2", "5", "10", "20", "50", "100"]


def test_interactive_curves_are_thinned_evenly_on_their_axis_and_keep_both_ends() -> None:
    run = follow(500)
    rows = agreement_table(run, "cosine")
    rows = rows[rows["method"] == "graddot"]
    kept = thinned(rows)
    assert 60 < len(kept) <= 100
    assert kept["epoch"].tolist()[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert kept["epoch"].iloc[-1] == 500
    assert kept["epoch"].diff().dropna().min() >= 1, "none twice"
    merged = kept.merge(rows, on=["epoch", "mean", "sem"])
    assert len(merged) == len(kept), "kept points are the table's own"
    assert len(thinned(rows.head(100))) == 100


def test_single_test_instances_are_sorted_by_sensitivity() -> None:
    figure = sorted_figure([example()])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == sorted(heights, reverse=True)
    assert len(heights) == 30


def test_scores_beside_them_are_the_method_s_in_that_order_and_each_run_has_its_row() -> None:
    runs = [example("sgd"), example("adam", noise=2.0)]
    figure = sorted_figure(runs)
    assert figure is not None
    assert len(figure.axes) == 8
    for run, axes in zip(runs, (figure.axes[0], figure.axes[4]), strict=True):
        assert axes.get_title().startswith(f"{run.name}, test instance")
        order = run.sensitivity.sensitivity[-1, 0].argsort(descending=True)
        dots = next(line for line in axes.lines if line.get_label() == "graddot, scaled").get_ydata()
        scores = run.scores["graddot"].values[0][order]
        factor = run.sensitivity.sensitivity[-1, 0].double().norm() / scores.double().norm()
        assert list(dots) == pytest.approx((scores.double() * factor).tolist(), rel=1e-5)


def test_the_command_rebuilds_a_report_overlays_runs_and_draws_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("a", "sgd"), ("b", "sgd")):
        example(name).save(tmp_path / folder, everything=True)
    assert command.main([str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").exists()
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert command.main([*both, "--output", str(tmp_path / "both.html")]) == 0
    assert "sgd, a" in (tmp_path / "both.html").read_text(), "equal names are told apart"
    assert command.main([both[0], "--figures", "cost", "--folder", str(tmp_path / "f")]) == 0
    assert {p.name for p in (tmp_path / "f").iterdir()} == {"cost.pdf", "cost.png"}
    assert str(tmp_path / "f" / "cost.pdf") in capsys.readouterr().out


def test_the_command_rebuilds_an_audits_page_and_says_that_it_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example_run().save(tmp_path)
    assert command.main([str(tmp_path)]) == 0
    assert "H00" in (tmp_path / "report.html").read_text()
    assert command.main([str(tmp_path), "--figures"]) == 2
    assert "holds an audit" in capsys.readouterr().err


def test_a_folder_of_no_run_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: sensitivity.safetensors is missing")
    assert error.count("\n") == 1


def test_the_command_s_figures_are_those_there_are() -> None:
    assert set(command.FIGURES) == set(FIGURES)
