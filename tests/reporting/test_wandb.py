from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from fimo.live.agreement import STEP
from fimo.live.log import About, Log
from fimo.live.outlet import Outlet
from fimo.live.wandb import WandbLogger
from fimo.reporting import InstanceDisplay
from fimo.reporting.results import Results
from fimo.reporting.wandb import instance_rows, method_rows, tell
from tests.live.offline_run import OfflineRun, read_offline_run
from tests.reporting.example import example, show_text


def told(results: Results, folder: Path, **settings: object) -> None:
    """Log results to W&B as a run does."""
    log = Log(folder, [Outlet("logger.wandb", WandbLogger(console=False, system_metrics=False, **settings))])
    config = {"further_training.lr": 0.01, "dataset.name": "diabetes"}
    log.begin(About(folder, results.name, config, ["diabetes"]))
    (folder / "report.html").write_text("<h1>A report</h1>")
    tell(log, results, folder / "report.html")
    log.end("finished")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineRun, Path]:
    """Two jobs of a sweep in one process; the first is read back."""
    sweep = tmp_path_factory.mktemp("sweep")
    for job, name in enumerate(["first", "second"]):
        folder = sweep / str(job)
        (folder / ".hydra").mkdir(parents=True)
        hydra = {"mode": "MULTIRUN", "sweep": {"dir": "${now:%H}"}, "overrides": {"task": [f"seed={job}"]}}
        (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": hydra}))
        told(example(name), folder, project="tests", tags=["quick"])
    return read_offline_run(sweep / "0"), sweep


def test_jobs_of_a_sweep_in_one_process_are_runs_of_their_own_in_one_group(
    logged: tuple[OfflineRun, Path],
) -> None:
    first, sweep = logged
    second = read_offline_run(sweep / "1")
    assert (first.name, second.name) == ("first", "second")
    assert first.group == second.group == sweep.name
    assert first.exit_code == second.exit_code == 0
    assert len(first.history) == len(second.history)


def test_config_is_flat(logged: tuple[OfflineRun, Path]) -> None:
    config = logged[0].config
    assert config["further_training.lr"] == 0.01
    assert config["dataset.name"] == "diabetes"
    assert logged[0].project == "tests"
    assert logged[0].tags == ["quick", "diabetes"]


def test_agreement_is_logged_against_the_amount_of_further_training(logged: tuple[OfflineRun, Path]) -> None:
    run = logged[0]
    points = [h for h in run.history if "agreement/graddot/cosine" in h]
    assert [h[STEP] for h in points] == [8, 16, 24, 32]
    table = example().evaluation
    rows = table[(table.method == "graddot") & (table.metric == "cosine") & (table.seeds == 6)]
    assert [h["agreement/graddot/cosine"] for h in points] == pytest.approx(rows["mean"].tolist())
    assert [h["ceiling/cosine"] for h in points] == pytest.approx(rows["ceiling"].tolist())
    assert [h["ceiling_lower/cosine"] for h in points] == pytest.approx(rows["ceiling_lower"].tolist())
    assert run.metrics["agreement/graddot/cosine"] == STEP


def test_summary_holds_what_a_sweep_is_sorted_by_and_no_more(logged: tuple[OfflineRun, Path]) -> None:
    summary = logged[0].summary
    last = example().evaluation
    last = last[(last.step == 32) & (last.seeds == 6) & (last.metric == "cosine")].set_index("method")
    assert summary["last/graddot/cosine"] == pytest.approx(last.loc["graddot", "mean"])
    assert summary["last_ceiling/cosine"] == pytest.approx(last.loc["graddot", "ceiling"])
    assert summary["last_ceiling_lower/cosine"] == pytest.approx(last.loc["graddot", "ceiling_lower"])
    assert summary["best_method/cosine"] == "follows"
    assert summary["cost/further_training/seconds"] == 95
    assert summary["cost/methods/seconds"] == pytest.approx(8.741)
    assert summary["final_model/test_loss"] == 0.5
    assert summary["state"] == "finished"
    assert not any(key.startswith(("agreement/", "sem/", "last/graddot/spearman")) for key in summary)


def test_what_w_and_b_draws_unasked_is_no_more_than_a_dozen_panels(logged: tuple[OfflineRun, Path]) -> None:
    run = logged[0]
    keys = {key for row in run.history for key in row if not key.startswith("_")}
    assert {"agreement/graddot/cosine", "methods", "instances", "report"} <= keys
    assert len(keys - run.hidden) <= 12
    assert {"methods", "instances", "report", "figures/agreement/cosine"} <= keys - run.hidden


def test_every_method_is_a_row_with_all_metrics_and_its_cost() -> None:
    columns, rows = method_rows(example())
    by_method = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert set(by_method) == {"graddot", "datainf", "follows", "random"}
    table = example().evaluation
    last = table[(table.step == 32) & (table.seeds == 6) & (table.method == "datainf")].set_index("metric")
    for metric in ("cosine", "spearman", "pearson"):
        assert by_method["datainf"][metric] == pytest.approx(last.loc[metric, "mean"])
    assert by_method["datainf"]["seconds"] == 0.7
    assert by_method["follows"]["followed_seeds"] == "unknown"


def test_figures_stay_interactive_and_instances_are_a_table(logged: tuple[OfflineRun, Path]) -> None:
    run, sweep = logged
    media = next(h for h in run.history if "instances" in h)
    assert media["figures/agreement/cosine"]["_type"] == "plotly-file"
    (files,) = (sweep / "0").glob("wandb/offline-run-*/files")
    figure = json.loads((files / media["figures/agreement/cosine"]["path"]).read_text())
    assert any(trace.get("name") == "noise ceiling" for trace in figure["data"])
    assert (files / media["report"]["path"]).read_text() == "<h1>A report</h1>"
    table = json.loads((files / media["instances"]["path"]).read_text())
    assert {"split", "row", "id", "effect", "target", "age", "blood pressure", "sex"} <= set(table["columns"])
    columns, rows = instance_rows(example())
    assert table["data"] == json.loads(json.dumps(rows))
    assert len(columns) == len(rows[0])


def test_sentences_and_pictures_of_instances_are_shown() -> None:
    columns, rows = instance_rows(example(show=show_text))
    assert "a train sentence" in rows[0][columns.index("text")]
    buffer = io.BytesIO()
    Image.new("L", (4, 5)).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    columns, rows = instance_rows(example(show=lambda split, index: InstanceDisplay("cat", image=uri)))
    picture = rows[0][columns.index("image")]()
    assert (picture._width, picture._height) == (4, 5)
