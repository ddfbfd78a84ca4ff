from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fimo.reporting import __main__ as command
from fimo.reporting.static import FIGURES, agreement_figure, sorted_figure, write_figures
from tests.reporting.example import example, example_tasks


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


def test_single_test_instances_are_sorted_by_sensitivity() -> None:
    figure = sorted_figure([example()])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == sorted(heights, reverse=True)
    assert len(heights) == 30


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


def test_a_folder_of_no_run_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: sensitivity.safetensors is missing")
    assert error.count("\n") == 1


def test_the_command_s_figures_are_those_there_are() -> None:
    assert set(command.FIGURES) == set(FIGURES)
