"""The whole path, reduced: from the command line to every file of the contract."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fimo.app.experiment import refuse_poor
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.evaluation import evaluate
from fimo.further_training import Sensitivity
from fimo.further_training.sensitivity import check_finite
from fimo.models.final_model import FinalModel

ROOT = Path(__file__).parents[1]
SMALL = [
    "trainer.max_epochs=15",
    "further_training.epochs=2",
    "further_training.seeds=3",
    "further_training.left_out=5",
    "further_training.test=4",
    "trainer.enable_progress_bar=false",
    "model.network.hidden=[16]",
]


def run(*arguments: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "src.run", f"store={folder}/store", *SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default")
    run(f"hydra.run.dir={folder}/run", folder=folder)
    return folder


def test_every_file_of_the_contract_is_there(default_run: Path) -> None:
    folder = default_run / "run"
    methods = {p.stem for p in (ROOT / "conf" / "method").glob("*.yaml")}
    scores = {p.stem for p in (folder / "scores").glob("*.safetensors")}
    assert {"graddot", "gradcos", "tracin", "datainf", "exact", "random"} <= scores <= methods
    for name in (".hydra/config.yaml", "final_model.ckpt", "report.html"):
        assert (folder / name).stat().st_size > 0
    found = load_file(folder / "sensitivity.safetensors")
    shapes = {name: tuple(found[name].shape) for name in ("sensitivity", "raw", "step", "epoch", "left_out")}
    assert shapes == {
        "sensitivity": (2, 4, 5), "raw": (3, 2, 4, 5), "step": (2,), "epoch": (2,), "left_out": (5,),
    }  # fmt: skip
    assert found["seeds"].tolist() == [0, 1, 2]
    assert found["step"].tolist() == [13, 26]
    assert found["epoch"].tolist() == [1, 2]
    assert found["left_out"].tolist() == [0, 79, 158, 238, 317]
    assert found["sensitivity"].dtype == found["raw"].dtype == torch.float32
    for name in scores:
        stored = load_file(folder / "scores" / f"{name}.safetensors")
        assert tuple(stored["scores"].shape) in ((4, 5), (2, 4, 5))
        assert stored["left_out"].tolist() == found["left_out"].tolist()
        assert torch.isfinite(stored["scores"]).all()
    response = load_file(folder / "scores" / "response.safetensors")
    assert response["followed_seeds"].tolist() == [3, 4, 5], "none that the gold standard's noise is of"
    assert "followed_seeds" not in load_file(folder / "scores" / "exact.safetensors")


def test_the_sensitivity_is_the_mean_of_raw_changes_minus_its_mean_over_left_out(default_run: Path) -> None:
    found = load_file(default_run / "run" / "sensitivity.safetensors")
    mean = found["raw"].double().mean(0)
    torch.testing.assert_close(
        found["sensitivity"].double(), mean - mean.mean(-1, keepdim=True), rtol=1e-4, atol=1e-9
    )


def test_the_tables_have_the_contracts_columns(default_run: Path) -> None:
    evaluation = pd.read_csv(default_run / "run" / "evaluation.csv")
    assert list(evaluation) == [
        "method",
        "access",
        "metric",
        "step",
        "epoch",
        "seeds",
        "mean",
        "sem",
        "ceiling",
        "ceiling_lower",
        "followed_seeds",
        "final_models",
        "sem_models",
    ]
    assert set(evaluation["metric"]) == {"cosine", "spearman", "pearson"}
    assert set(evaluation["epoch"]) == {1, 2}
    assert evaluation["seeds"].max() == 3
    relation = evaluation.drop_duplicates("method").set_index("method")["followed_seeds"]
    follows = {"response", "calibrated", "best", "unrolled", "source", "mirrored", "sketched", "daunce"}
    assert {name for name, how in relation.items() if how == "other"} == follows & set(relation.index)
    assert set(relation[[name for name in relation.index if name not in follows]]) == {"none"}
    cost = pd.read_csv(default_run / "run" / "cost.csv")
    assert list(cost) == ["stage", "seconds", "peak_memory_mb", "gradient_evaluations", "reused"]
    assert list(cost["stage"])[:2] == ["final_model", "further_training"]
    assert list(cost["stage"])[-2:] == ["evaluation", "report"]
    full = 2 * 397  # gradients of a full run; shift drops one instance in each epoch
    assert cost.set_index("stage").loc["further_training", "gradient_evaluations"] == pytest.approx(
        3 * 6 * full, rel=0.01
    )


def test_python_s_evaluate_gives_the_numbers_of_the_command_line(default_run: Path) -> None:
    folder = default_run / "run"
    table = pd.read_csv(folder / "evaluation.csv")
    access = dict(zip(table["method"], table["access"], strict=True))
    names = ["response", "unrolled", "exact", "graddot"]
    stored = {name: load_file(folder / "scores" / f"{name}.safetensors") for name in names}
    found = evaluate(
        {name: (access[name], tensors["scores"]) for name, tensors in stored.items()},
        Sensitivity.load(folder / "sensitivity.safetensors"),
        followed={n: t["followed_seeds"].tolist() for n, t in stored.items() if "followed_seeds" in t},
    )
    keys = ["method", "metric", "step", "seeds"]
    expected = table[table["method"].isin(names)].sort_values(keys).reset_index(drop=True)
    whole = found["seeds"] == 3  # of fewer seeds, subsets are drawn, in the order in which metrics come
    pd.testing.assert_frame_equal(
        found[whole].sort_values(keys).reset_index(drop=True),
        expected[expected["seeds"] == 3].reset_index(drop=True),
        rtol=1e-5, check_dtype=False,
    )  # fmt: skip


def test_following_the_same_seeds_is_marked_and_what_a_reader_must_know_ends_the_log(
    default_run: Path,
) -> None:
    folder = default_run / "same"
    done = run(
        "+method=[response,graddot]", "further_training.followed_seeds=same", "further_training.seeds=1",
        "logger=none", "report=false", f"hydra.run.dir={folder}", folder=default_run,
    )  # fmt: skip
    table = pd.read_csv(folder / "evaluation.csv").drop_duplicates("method").set_index("method")
    assert table["followed_seeds"].to_dict() == {"response": "same", "graddot": "none"}
    response = load_file(folder / "scores" / "response.safetensors")
    assert (
        response["followed_seeds"].tolist() == load_file(folder / "sensitivity.safetensors")["seeds"].tolist()
    )
    (note,) = json.loads((folder / "report.json").read_text())["warnings"]
    assert "one seed" in note
    assert note in " ".join((done.stdout + done.stderr)[-1500:].split())


def test_the_report_shows_rows_methods_and_the_ceiling_offline(default_run: Path) -> None:
    page = (default_run / "run" / "report.html").read_text()
    for wanted in ("diabetes", "graddot", "datainf", "ceiling", "bmi", "progression"):
        assert wanted in page
    outside = re.findall(r"""(?:src|href)=["'](https?://[^"']+)""", page)
    assert [a for a in outside if a.endswith((".js", ".css"))] == []


def test_a_rerun_reuses_everything_and_gives_the_same_bytes(default_run: Path) -> None:
    done = run(f"hydra.run.dir={default_run}/again", "report=false", "logger=none", folder=default_run)
    said = done.stdout + done.stderr
    assert f"results: {default_run}/again\n" in said
    assert "report.html" not in said, "which is not written"
    assert "final model: loss " in said
    cost = pd.read_csv(default_run / "again" / "cost.csv").set_index("stage")
    assert (cost.loc[["final_model", "further_training", "graddot"], "reused"] == 1).all()
    first = pd.read_csv(default_run / "run" / "cost.csv").set_index("stage")
    # what it cost to make; the first run also counted writing it, which takes its time on a busy disk
    assert 0 < cost.loc["graddot", "seconds"] <= first.loc["graddot", "seconds"] * 1.05
    for name in ("sensitivity.safetensors", "scores/datainf.safetensors", "evaluation.csv"):
        assert (default_run / "again" / name).read_bytes() == (default_run / "run" / name).read_bytes()


def test_the_written_checkpoint_starts_another_run_with_the_same_model(default_run: Path) -> None:
    checkpoint = default_run / "run" / "final_model.ckpt"
    run(
        f"hydra.run.dir={default_run}/own", f"model.checkpoint={checkpoint}", "+method=graddot",
        "report=false", "logger=none", folder=default_run,
    )  # fmt: skip
    for name in ("sensitivity.safetensors", "scores/graddot.safetensors"):
        assert (default_run / "own" / name).read_bytes() == (default_run / "run" / name).read_bytes()


def test_a_sweep_over_methods_makes_a_job_each_and_one_gold_standard(default_run: Path) -> None:
    sweep = default_run / "sweep"
    run("-m", "+method=tracin,datainf", f"hydra.sweep.dir={sweep}", "report=false", folder=default_run)
    found = [sorted(p.stem for p in (sweep / job / "scores").glob("*")) for job in ("0", "1")]
    assert found == [["tracin"], ["datainf"]]
    costs = [pd.read_csv(sweep / job / "cost.csv").set_index("stage") for job in ("0", "1")]
    assert all(cost.loc["further_training", "reused"] == 1 for cost in costs)


def test_a_method_that_fails_on_this_model_does_not_take_the_others_with_it(default_run: Path) -> None:
    folder = default_run / "failing"
    done = run(
        "+method=graddot", "+methods.broken._target_=tests.diverging.Diverging", "logger=none",
        "+methods.mistaken._target_=tests.diverging.Mistaken",
        "+evaluation.tasks.judging._target_=tests.diverging.MistakenTask",
        "report=false", f"hydra.run.dir={folder}", folder=default_run,
    )  # fmt: skip
    assert "broken failed: grew a hundredfold" in done.stdout + done.stderr
    skipped = json.loads((folder / "report.json").read_text())["skipped"]
    assert skipped["broken"] == "failed: grew a hundredfold"
    assert "failed: KeyError" in skipped["judging"]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "mistaken failed" in line]
    assert len(lines) == 1, lines
    assert "failed: IndexError: Dimension out of range" in lines[0]
    assert "in some library" in (folder / "failures" / "mistaken.txt").read_text()
    assert set(pd.read_csv(folder / "evaluation.csv")["method"]) == {"graddot"}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("Mistaken", "methods.mine: IndexError: Dimension out of range"),
        ("Unwritable", "No space left on device"),
    ],
)
def test_a_run_of_one_method_that_fails_ends_in_one_line(tmp_path: Path, method: str, said: str) -> None:
    done = run(
        f"+methods.mine._target_=tests.diverging.{method}", "logger=none", f"hydra.run.dir={tmp_path}/run",
        folder=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert [said in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert "Traceback" not in done.stdout + done.stderr


def test_classification_and_adam_run_on_a_table_of_ones_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    lines = [f"{a:.4f};{b:.4f};{c:.4f};{'good' if a + b > 0 else 'bad'}" for a, b, c in x.tolist()]
    (tmp_path / "mine.csv").write_text("one;two;three;quality\n" + "\n".join(lines))
    run(
        "dataset=csv", f"dataset.path={tmp_path}/mine.csv", "dataset.target=quality",
        "dataset.task=classification", "further_training=adam", "further_training.leave_out=mask",
        "+method=[graddot,exact]", "logger=none", f"hydra.run.dir={tmp_path}/run", folder=tmp_path,
    )  # fmt: skip
    shapes = {
        name: tuple(load_file(tmp_path / "run" / "scores" / f"{name}.safetensors")["scores"].shape)
        for name in ("graddot", "exact")
    }
    assert shapes == {"graddot": (4, 5), "exact": (2, 4, 5)}  # exact is matched to the amount of training


def test_further_training_that_diverges_is_said() -> None:
    sensitivity = torch.ones(2, 3, 4)
    check_finite(sensitivity)
    sensitivity[0] = torch.nan
    check_finite(sensitivity)  # a warning
    sensitivity[1] = torch.inf
    with pytest.raises(InputError, match="all runs diverged"):
        check_finite(sensitivity)


def own_huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.huber_loss(outputs, targets, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize("loss", ["mse", own_huber])
def test_a_run_refuses_a_model_worse_than_a_constant_also_under_a_loss_of_ones_own(loss: Any) -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    model = FinalModel(nn.Linear(3, 1), loss)
    for targets, refused in ((x[:, :1] + 50, True), (model.outputs(Instances(x, x)), False)):
        whole = Instances(x, targets)
        data: Any = SimpleNamespace(train=whole[:40], test=whole[40:])
        if refused:
            with pytest.raises(
                InputError, match=r"worse than constant .* model.accept_poor=true explains it"
            ):
                refuse_poor(model, data)
        else:
            refuse_poor(model, data)
