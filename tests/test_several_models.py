"""``model.seeds``: several final models studied as one result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import fimo
from fimo.app import experiment
from fimo.app.command import main
from fimo.app.config import validated
from fimo.app.show import shown
from fimo.errors import InputError
from fimo.reporting import ModelsRun
from fimo.reporting.__main__ import main as rebuild
from fimo.reporting.measured_rows import measured_rows
from tests.in_process import commands
from tests.test_config import PLACES, composed
from tests.test_experiment import SMALL

CONF = Path(__file__).parents[1] / "conf"
OTHER = CONF / "config.yaml"
METHODS = ["graddot", "random", "response"]
CHOSEN = [*SMALL, f"+method=[{','.join(METHODS)}]", "logger=none", "evaluation.bootstrap=5"]


def run(place: Path, name: str, *arguments: str) -> Path:
    """Run a command line in ``place/NAME``, with a store that they share."""
    folder = place / name
    with pytest.MonkeyPatch.context() as patch:
        places = [f"hydra.run.dir={folder}", f"store={place}/store"]
        patch.setattr(sys, "argv", ["src.run", *CHOSEN, *places, *arguments])
        main(CONF)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("several")
    run(found, "three", "model.seeds=3", "seed=5")
    return found


def test_each_final_model_has_the_files_of_a_run_of_its_seed_alone_byte_for_byte(place: Path) -> None:
    alone, one = run(place, "alone", "seed=6", "report=false"), place / "three" / "final_models" / "6"
    files = sorted(str(p.relative_to(alone)) for p in alone.rglob("*") if p.is_file())
    compared = [
        f for f in files
        if f.split(".")[-1] in ("csv", "safetensors") and f not in ("cost.csv", "metrics.csv")
    ]  # fmt: skip
    assert {"evaluation.csv", "effects.csv", "sensitivity.safetensors", "scores/response.safetensors"} <= set(
        compared
    )
    for file in compared:
        assert (one / file).read_bytes() == (alone / file).read_bytes(), file
    for file in (".hydra/config.yaml", "final_model.ckpt", "cost.csv", "report.html", "answer.json"):
        assert (one / file).stat().st_size > 0, file
    assert fimo.load_run(one).config["seed"] == 6
    models = {
        seed: torch.load(place / "three" / "final_models" / seed / "final_model.ckpt", weights_only=False)
        for seed in ("5", "6", "7")
    }
    first = [next(iter(m["state_dict"].values())) for m in models.values()]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_the_evaluation_at_the_top_is_over_final_models(place: Path) -> None:
    folder = place / "three"
    table = pd.read_csv(folder / "evaluation.csv")
    each = [pd.read_csv(folder / "final_models" / str(seed) / "evaluation.csv") for seed in (5, 6, 7)]
    means = pd.concat([t["mean"] for t in each], axis=1)
    pd.testing.assert_series_equal(table["mean"], means.mean(axis=1), check_names=False)
    pd.testing.assert_series_equal(table["sem_models"], means.sem(axis=1), check_names=False)
    assert set(table["final_models"]) == {3}
    assert all(set(t["final_models"]) == {1} for t in each)
    pairs = pd.read_csv(folder / "evaluation_pairs.csv")
    assert len(pairs) == 3 * 3 * 2, "pairs of methods, metrics, evaluation points"
    assert pairs["probability"].between(0.5, 1).all()
    variance = pd.read_csv(folder / "evaluation_variance.csv")
    assert set(variance["method"]) == set(METHODS)
    assert variance["part_seeds"].notna().all()
    cost = pd.read_csv(folder / "cost.csv").set_index("stage")
    assert list(cost.index) == ["final_model", "further_training", *METHODS, "evaluation", "report"]
    seconds = [
        pd.read_csv(folder / "final_models" / str(seed) / "cost.csv").set_index("stage")["seconds"]
        for seed in (5, 6, 7)
    ]
    for stage in ("final_model", "further_training", "response"):
        assert cost.loc[stage, "seconds"] == pytest.approx(sum(s[stage] for s in seconds), abs=1e-3)


def test_the_answer_says_which_method_is_best_over_final_models(place: Path) -> None:
    said = shown(place / "three", width=200)
    assert said.startswith("Which attribution method is best, over 3 final models?")
    assert "trained with seeds 5, 6 and 7" in said
    table = pd.read_csv(place / "three" / "evaluation.csv")
    last = table[(table.metric == "cosine") & (table.epoch == 2) & (table.seeds == 3)]
    best = last.sort_values("mean").iloc[-1]
    assert f"{best['method']} agrees best with the measured effects: cosine {best['mean']:.2f}" in said
    assert f"± {best['sem_models']:.2f} over 3 final models" in said
    assert "The variance of" in said
    assert "3 final models are few" in said


def test_a_folder_is_read_back_and_its_report_made_again(place: Path, tmp_path: Path) -> None:
    folder = place / "three"
    found = ModelsRun.load(folder)
    assert list(found.models) == [5, 6, 7]
    assert found.seeds == 3
    rows = measured_rows(found.combined)
    effects = [
        fimo.load_run(folder / "final_models" / str(seed)).sensitivity.sensitivity[-1].double().mean(0)
        for seed in (5, 6, 7)
    ]
    expected = torch.stack(effects)
    torch.testing.assert_close(torch.tensor(rows["effect"]), expected.mean(0))
    torch.testing.assert_close(torch.tensor(rows["error"]), expected.std(0) / 3**0.5)
    assert rebuild([str(folder), "--output", str(tmp_path / "again.html")]) == 0
    again, before = (p.read_text() for p in (tmp_path / "again.html", folder / "report.html"))
    for page in (again, before):
        assert "Which attribution method is best, over 3 final models?" in page
        assert 'href="final_models/6/report.html"' in page
    with pytest.raises(InputError, match=r"holds several final models: load one, as .*/final_models/"):
        fimo.load_run(folder)


def test_points_of_each_final_model_are_logged_under_its_name_and_the_mean_under_none(place: Path) -> None:
    rows = pd.read_csv(place / "three" / "metrics.csv")
    for seed in (5, 6, 7):
        assert rows[f"final_models/{seed}/final_model/train_loss"].notna().any()
    mean = rows["agreement/graddot/cosine"].dropna().iloc[-1]
    each = [rows[f"final_models/{seed}/agreement/graddot/cosine"].dropna().iloc[-1] for seed in (5, 6, 7)]
    assert mean == pytest.approx(sum(each) / 3, rel=1e-4)
    assert rows["sem_models/graddot/cosine"].notna().any()
    summary = json.loads((place / "three" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["final_models"] == 3
    assert summary["last/graddot/cosine"] == pytest.approx(mean)


def test_a_killed_run_goes_on_with_the_final_model_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def killed(*arguments: object) -> None:
        begun.append(arguments)
        if len(begun) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_effects", killed)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, "run", "model.seeds=3", "report=false")
    assert ended.value.code == 130
    folder = run(tmp_path, "run", "model.seeds=3", "report=false")
    reused = [
        pd.read_csv(folder / "final_models" / str(seed) / "cost.csv").set_index("stage")["reused"]
        for seed in range(3)
    ]
    for stage in ("final_model", "further_training"):
        assert [float(r[stage]) for r in reused] == [1, 1, 0]
    assert (folder / "answer.json").exists()


def test_an_error_names_its_final_model_and_one_seed_leaves_its_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = commands(CONF, CHOSEN, tmp_path, monkeypatch, capsys)
    said = line("diverges", "model.seeds=2", "model.lr=1e9", "report=false")
    assert isinstance(said, str)
    assert said.endswith("(final model 1 of 2, seed=0)")
    assert said.startswith("error: model: ")
    one = line("one", "report=false")
    assert isinstance(one, Path)
    assert not (one / "final_models").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.seeds=0"], "model.seeds: expected at least 1 but got 0"),
        (["model.seeds=2", f"model.checkpoint={__file__}"], "model.seeds: 2 final models are trained here"),
        ([f"model.checkpoint=[{__file__}]"], "model.checkpoint: expected a file, or several different ones"),
        ([f"model.checkpoint=[{__file__},{__file__}]"], "model.checkpoint: expected a file, or several"),
        ([f"model.checkpoint=[{__file__},{CONF}]"], "model.checkpoint: expected a file but"),
        ([f"model.checkpoint=[{__file__},nothing.pt]"], "model.checkpoint: no such file: nothing.pt"),
        (
            [f"model.checkpoint=[{__file__},{OTHER}]", "model.seeds=3"],
            "model.seeds: 2 final models are given",
        ),
        ([f"model.checkpoint=[{__file__},{OTHER}]", "mode=audit"], "model.checkpoint: an audit is of one"),
        (["model.seeds=2", "mode=audit"], "model.seeds: an audit is of one final model"),
        (["model.seeds=2", "until=check"], "model.seeds: until=check checks one final model"),
        (
            ["model.seeds=2", "trainer.max_epochs=0", "model.accept_poor=true"],
            "model.seeds: with trainer.max_epochs=0",
        ),
    ],
)
def test_what_can_be_of_one_final_model_only_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        validated(composed(*overrides), PLACES)
    assert str(refused.value).startswith(said)


def test_several_checkpoints_are_as_many_final_models(place: Path) -> None:
    files = [place / "three" / "final_models" / seed / "final_model.ckpt" for seed in ("7", "5")]
    folder = run(place, "given", f"model.checkpoint=[{','.join(map(str, files))}]", "report=false")
    for name, seed in (("0", "7"), ("1", "5")):
        trained, given = place / "three" / "final_models" / seed, folder / "final_models" / name
        for file in ("sensitivity.safetensors", "scores/response.safetensors"):
            assert (given / file).read_bytes() == (trained / file).read_bytes()
    assert set(pd.read_csv(folder / "evaluation.csv")["final_models"]) == {2}
    about = shown(folder, width=10_000).splitlines()[1]
    assert f"{files[0]} and {files[1]}" in about


def test_further_training_alone_is_made_for_each_final_model(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", "model.seeds=2", "until=further_training")
    for seed in range(2):
        assert (folder / "final_models" / str(seed) / "sensitivity.safetensors").exists()
    assert not (folder / "evaluation.csv").exists()
    assert list(pd.read_csv(folder / "cost.csv")["stage"]) == ["final_model", "further_training"]
