"""The benchmark: gold standards that are made, resumed, read, checked, and by which methods are judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import fimo
from fimo.bench.command import main
from fimo.bench.gold_standard import GoldStandard, load
from fimo.bench.settings import chosen
from fimo.errors import InputError
from fimo.reporting.dashboard import main as dashboard

SMALL = ["--scale", "0.1", "--models", "2", "--threads", "1"]
SETTING = "diabetes/sgd"


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the content of a folder's files of tensors."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small gold standards of the diabetes data."""
    folder = tmp_path_factory.mktemp("bench")
    assert main(["make", "diabetes", *SMALL, "--folder", f"{folder}/made", "--store", f"{folder}/store"]) == 0
    return folder


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "made", tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def gold(place: Path) -> GoldStandard:
    return fimo.bench.load(SETTING, place / "made")


@pytest.mark.parametrize("setting", chosen([]), ids=lambda setting: setting.name)
def test_every_setting_composes_and_says_what_it_is(setting, tmp_path: Path, monkeypatch) -> None:
    for path in ("concrete/concrete.txt", "wine/wine_quality_red.txt", "adult/adult.csv"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    for folder in ("mnist", "sst2", "cifar10"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("FIMO_DATA", str(tmp_path))
    config = setting.config(3, tmp_path / "store")
    assert config.seed == 3
    assert config.further_training.optimizer == setting.name.rpartition("/")[2]
    assert setting.about
    assert (config.trainer.accelerator == "gpu") == ("GPU" in setting.about)


def test_data_that_are_not_here_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch, capsys, caplog
) -> None:
    monkeypatch.setenv("FIMO_DATA", str(tmp_path))
    with pytest.raises(
        InputError, match=f"nothing was made: dataset.path: no such file: {tmp_path}/concrete"
    ):
        main(["make", "concrete/sgd", "--folder", str(tmp_path), "--store", str(tmp_path)])
    assert "concrete/sgd is left out: dataset.path" in caplog.text


def test_a_gold_standard_is_that_of_further_training_called_by_hand(gold: GoldStandard) -> None:
    one = gold[1]
    network = torch.nn.Sequential(
        torch.nn.Linear(10, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(),
        torch.nn.Linear(128, 1),
    )  # fmt: skip
    values = iter([one.parameters[f"{k}.{part}"] for k in (1, 3, 5) for part in ("weight", "bias")])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(next(values))
    train, test = ((part.inputs, part.targets) for part in (one.train, one.test))
    protocol = fimo.Protocol(lr=0.01, batch_size=32, epochs=2, leave_out="mask")
    model = fimo.FinalModel(network, "mse")
    truth = fimo.further_train(model, train, test, protocol, seeds=2, left_out=one.left_out)
    assert torch.allclose(truth.sensitivity, one.sensitivity, rtol=1e-3, atol=1e-7)
    assert one.left_out.tolist() == [0, 79, 158, 238, 317]
    assert gold.sensitivity.shape == (2, 2, 45, 5)
    assert torch.equal(gold.sensitivity[1], one.sensitivity)


def test_a_network_predicts_as_the_card_says(gold: GoldStandard) -> None:
    for one, said in zip(gold, gold.card["final_models"], strict=True):
        loss = torch.nn.functional.mse_loss(one.network()(one.test.inputs), one.test.targets)
        assert float(loss.detach()) == pytest.approx(said["quality"]["test_loss"], rel=1e-5)


def test_a_card_says_what_was_made(gold: GoldStandard) -> None:
    card = gold.card
    assert (card["setting"], card["left_out"], card["seeds"], card["followed_seeds"]) == (
        SETTING,
        5,
        [0, 1],
        [2, 3],
    )
    assert card["cost"]["steps"] == 2 * 2 * 6 * 26  # final models, seeds, runs, steps
    assert card["versions"]["torch"] == torch.__version__
    assert len(card["files"]) == 5
    assert 0 < card["ceilings"]["cosine"]["lower"][-1] < card["ceilings"]["cosine"]["upper"][-1] <= 1
    text = (gold.folder / "README.md").read_text()
    assert "| left out | 5 training instances, by the rule `mask` |" in text
    assert card["files"]["data.safetensors"] in text


def test_what_is_there_is_not_made_again_and_nothing_else_is_put_beside_it(place: Path) -> None:
    made = place / "made"
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.*") if path.is_file()}
    common = ["--folder", str(made), "--store", f"{place}/store", "--threads", "1", "--models", "2"]
    assert main(["make", "diabetes", *common, "--scale", "0.1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.*") if path.is_file()} == before
    with pytest.raises(InputError, match=r"final_model_0 was made with scale=0.1, not 0.2; choose another"):
        main(["make", "diabetes", *common, "--scale", "0.2"])


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    folders = ["--folder", f"{tmp_path}/made", "--store", f"{tmp_path}/store"]
    command = [sys.executable, "-m", "fimo.bench", "make", SETTING, *SMALL, *folders]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob("store/further_training/*/*.safetensors")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "made" / SETTING / "card.json").exists()
    assert main(command[3:]) == 0
    assert tensors(tmp_path / "made" / SETTING) == tensors(place / "made" / SETTING)


def test_parts_make_the_same_bytes_and_the_last_one_writes_the_card(place: Path, tmp_path: Path) -> None:
    for k in (1, 0):
        folders = ["--folder", f"{tmp_path}/made", "--store", f"{tmp_path}/store{k}"]
        assert main(["make", SETTING, *SMALL, *folders, "--shard", f"{k}/2"]) == 0
        assert (tmp_path / "made" / SETTING / "card.json").exists() == (k == 0)
    assert tensors(tmp_path / "made" / SETTING) == tensors(place / "made" / SETTING)
    with pytest.raises(InputError, match="--shard: expected k/n with k from 0 to n - 1 but got '2/2'"):
        main(["make", SETTING, "--shard", "2/2", "--folder", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["make", "diabets/sgd"], "setting: there is no 'diabets/sgd'; did you mean diabetes/sgd"),
        (["verify"], "--folder: .* holds no gold standards; fimo bench make makes them"),
        (["table"], "--folder: .* holds no gold standards; fimo bench make makes them"),
        (["make", "--config-dir", "/nowhere"], "--config-dir: no such folder"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        main([*arguments, "--folder", str(tmp_path)])


def test_a_setting_that_is_not_made_is_said_to_be_so(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fimo bench make concrete/sgd makes it"):
        load("concrete/sgd", tmp_path)
    with pytest.raises(InputError, match="did you mean diabetes/sgd"):
        load("diabete/sgd", place / "made")


def test_a_setting_of_ones_own_is_a_file(tmp_path: Path, capsys) -> None:
    preset = tmp_path / "experiment" / "bench" / "tiny.yaml"
    preset.parent.mkdir(parents=True)
    lines = ["# @package _global_", "# Benchmark: mine", "defaults: [override /dataset: diabetes]"]
    lines += ["further_training: {seeds: 2, left_out: 3, epochs: 1}", "trainer: {max_epochs: auto}"]
    preset.write_text("\n".join(lines))
    common = ["--folder", f"{tmp_path}/made", "--config-dir", str(tmp_path)]
    making = ["make", "tiny/adam", *common, "--store", f"{tmp_path}/kept", "--models", "1"]
    assert main(making) == main(making) == 0
    assert load("tiny/adam", tmp_path / "made").card["about"] == "mine"
    assert ", 100 epochs" in (tmp_path / "made" / "tiny" / "adam" / "README.md").read_text()
    capsys.readouterr()
    assert main(["list", "tiny", *common]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [["tiny/sgd", "mine"], ["tiny/adam", "made", "mine"]]


def test_of_a_network_whose_first_layers_are_frozen_the_rest_is_kept(tmp_path: Path) -> None:
    preset = tmp_path / "experiment" / "bench" / "head.yaml"
    preset.parent.mkdir(parents=True)
    lines = ["# @package _global_", "# Benchmark: a head", "defaults: [override /dataset: diabetes]"]
    settings = "{seeds: 2, left_out: 3, epochs: 1, leave_out: mask}"
    preset.write_text("\n".join([*lines, "model: {trainable: ['5.*']}", f"further_training: {settings}"]))
    common = ["--folder", f"{tmp_path}/made", "--config-dir", str(tmp_path), "--threads", "1"]
    assert main(["make", "head/sgd", *common, "--store", f"{tmp_path}/store", "--models", "2"]) == 0
    assert main(["verify", "head/sgd", *common, "--from-source"]) == 0
    one = load("head/sgd", tmp_path / "made")[1]
    assert (one.about["model"]["parameters"], one.train.inputs.shape) == (129, (397, 128))
    head = torch.nn.Linear(128, 1)
    head.load_state_dict({name: one.parameters[f"5.{name}"] for name in ("weight", "bias")})
    assert torch.allclose(one.network()(one.test.inputs), head(one.test.inputs), atol=1e-5)
    train, test = ((part.inputs, part.targets) for part in (one.train, one.test))
    protocol = fimo.Protocol(lr=0.01, batch_size=32, epochs=1, leave_out="mask")
    model = fimo.FinalModel(head, "mse")
    truth = fimo.further_train(model, train, test, protocol, seeds=2, left_out=one.left_out)
    assert torch.allclose(truth.sensitivity, one.sensitivity, rtol=1e-3, atol=1e-7)


def verified(folder: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main(["verify", SETTING, "--folder", str(folder), "--threads", "1", *flags])
    return status, capsys.readouterr().out.splitlines()


def test_a_sample_that_is_made_again_is_the_same(place: Path, capsys) -> None:
    status, lines = verified(place / "made", "--final-models", "2", "--from-source", capsys=capsys)
    assert status == 0
    assert len(lines) == 8
    assert all(line.endswith(": same bytes") for line in lines)


def changed(path: Path, name: str, index: tuple[int, ...], factor: float) -> None:
    """Multiply one value of a file of tensors."""
    values = load_file(path)
    values[name][index] *= factor
    save_file(values, path, {"subtract_mean": "true"})


def test_a_changed_run_is_found_with_its_place(copy: Path, capsys) -> None:
    setting = copy / SETTING
    changed(setting / "final_model_0" / "sensitivity.safetensors", "raw", (1, 0, 7, 2), 1.5)
    status, lines = verified(copy, "--left-out", "5", "--final-models", "2", capsys=capsys)
    assert status == 1
    assert "1 files" not in lines[0]
    assert lines[0].endswith("DIFFERENT (final_model_0/sensitivity.safetensors was changed)")
    run = next(line for line in lines if "final_model_0, 2 seeds without 5 instances" in line)
    assert "DIFFERENT" in run
    assert "most at seed 1, step 13, test instance 7, left-out instance 158" in run
    assert any("final_model_1, 2 seeds" in line and line.endswith("same bytes") for line in lines)


def test_a_changed_parameter_is_found_from_the_source(copy: Path, capsys) -> None:
    changed(copy / SETTING / "final_model_0" / "model.safetensors", "5.weight", (0, 3), 2.0)
    status, lines = verified(copy, "--from-source", capsys=capsys)
    assert status == 1
    trained = next(line for line in lines if "trained again" in line)
    assert "DIFFERENT (5.weight: " in trained


def test_rounding_is_told_from_other_differences(copy: Path, capsys) -> None:
    setting = copy / SETTING
    path = setting / "final_model_0" / "sensitivity.safetensors"
    values = load_file(path)
    values["raw"] *= 1 + 1e-6
    save_file(values, path, {"subtract_mean": "true"})
    _, lines = verified(copy, "--final-models", "2", capsys=capsys)
    run = next(line for line in lines if "final_model_0, 2 seeds" in line)
    assert "rounding (" in run


def scored(folder: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["score", "--folder", str(folder), "--threads", "1", *flags])
    return status, "".join(capsys.readouterr())


def test_scores_are_judged_as_the_library_judges_them(copy: Path, capsys) -> None:
    status, said = scored(copy, SETTING, "--method", "graddot", capsys=capsys)
    assert status == 0
    assert said.startswith("diabetes/sgd, graddot: cosine ")
    results = pd.read_csv(copy / "results.csv")
    columns = "setting,method,metric,epoch,mean,sem_models,ceiling_lower,ceiling_upper,seconds,share_of_cost"
    assert ",".join(results.columns).startswith(columns)
    gold, means = load(SETTING, copy), []
    for one in gold:
        scores = fimo.attribute(one.final_model(), one.train, one.test, "graddot", one.left_out)
        means.append(fimo.evaluate({"graddot": scores}, one.truth).query("seeds == 2"))
    for row in results.itertuples():
        chosen = [t.query(f"metric == '{row.metric}' and step == {row.step}").iloc[0] for t in means]
        expected = pd.DataFrame(chosen)
        assert row.mean == pytest.approx(expected["mean"].mean(), abs=1e-5)
        assert row.sem_models == pytest.approx(abs(expected["mean"].diff().iloc[1]) / 2, abs=1e-5)
        assert row.ceiling_upper == pytest.approx(expected["ceiling"].mean(), abs=1e-4)
        assert row.ceiling_lower == pytest.approx(expected["ceiling_lower"].mean(), abs=1e-4)
    assert set(zip(results["metric"], results["step"], strict=True)) == {
        (metric, step) for metric in ("cosine", "spearman", "pearson") for step in (13, 26)
    }


OWN = '''
import fimo
import torch


class Inputs(fimo.AttributionMethod):
    """Inner products of inputs, times a number."""

    def __init__(self, times: float = 1.0) -> None:
        self.times = times

    def scores(self, problem):
        return self.times * problem.test.inputs @ problem.removed.inputs.T


class Nothing:
    pass
'''


def test_a_strangers_method_is_scored_in_one_command(copy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "of_a_stranger.py").write_text(OWN)
    command = [sys.executable, "-m", "fimo.bench", "score", "--folder", str(copy), "--threads", "1"]
    command += ["--method", "of_a_stranger.Inputs", "--set", "times=-2.0"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 2
    results = pd.read_csv(copy / "results.csv")
    assert set(results["method"]) == {"of_a_stranger.Inputs(times=-2.0)"}
    assert set(results["setting"]) == {"diabetes/sgd", "diabetes/adam"}
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"--method: of_a_stranger.Nothing is no subclass"):
        scored(copy, "--method", "of_a_stranger.Nothing", capsys=capsys)


def test_the_leader_board_orders_methods_and_its_page_says_what_they_did(copy: Path, capsys) -> None:
    assert (
        scored(copy, "--method", "random", "--method", "graddot", "--method", "exact", capsys=capsys)[0] == 0
    )
    page = copy / "docs" / "board.md"
    page.parent.mkdir()
    assert main(["table", "--folder", str(copy), "--page", str(page)]) == 0
    printed = capsys.readouterr().out.splitlines()
    results = pd.read_csv(copy / "results.csv").query("metric == 'cosine'")
    results["share"] = results["mean"] / results["ceiling_upper"]
    shares = results.groupby(["method", "setting"])["share"].mean().groupby("method").mean()
    expected = shares.sort_values(ascending=False)
    assert [line.split()[0] for line in printed[3:6]] == list(expected.index)
    assert [float(line.split()[4]) for line in printed[3:6]] == [round(x, 3) for x in expected]
    text = page.read_text()
    for name in ("diabetes/sgd", "diabetes/adam"):
        assert f"### {name}\n" in text
    last = results.query("setting == 'diabetes/sgd' and method == 'graddot' and step == 26").iloc[0]
    line = next(line for line in text.split("### diabetes/sgd")[1].splitlines() if "`graddot`" in line)
    assert f"| {last['mean']:.3f} ± {last['sem_models']:.3f} |" in line
    for image in ("board_agreement.png", "board_cost.png"):
        assert f"]({image})" in text
        assert (page.parent / image).stat().st_size > 1000
    assert "](board_results.csv)" in text
    beside = pd.read_csv(page.parent / "board_results.csv")
    order = ["setting", "method", "step"]
    pd.testing.assert_frame_equal(
        beside, results.drop(columns="share").sort_values(order, ignore_index=True), rtol=1e-3
    )


def test_loggers_get_what_they_get_of_a_study(copy: Path, capsys) -> None:
    scored(copy, "--method", "graddot", "--method", "random", capsys=capsys)
    places = []
    for _ in range(2):
        assert main(["table", SETTING, "--folder", str(copy), "--logger", "csv"]) == 0
        places.append(Path(capsys.readouterr().out.splitlines()[-1]))
    assert places[0] == places[1]
    points = pd.read_csv(places[0] / "metrics.csv").query("axis == 'further_training/step'")
    results = pd.read_csv(copy / "results.csv").query(f"setting == '{SETTING}'")
    assert len(points) == results["step"].nunique()
    for row in results.itertuples():
        point = points[points["further_training/step"] == row.step].iloc[0]
        assert point[f"agreement/{row.method}/{row.metric}"] == row.mean
        assert point[f"sem_models/{row.method}/{row.metric}"] == row.sem_models
        assert point[f"ceiling/{row.metric}"] == row.ceiling_upper
    summary = json.loads((places[0] / "summary.json").read_text())
    last = results.query("metric == 'cosine' and step == 26").set_index("method")["mean"]
    assert (summary["best_method/cosine"], summary["best/cosine"]) == (last.idxmax(), last.max())


def test_a_dashboard_draws_the_benchmarks_methods(copy: Path, capsys) -> None:
    pytest.importorskip("wandb_workspaces")
    scored(copy, "--method", "graddot", capsys=capsys)
    assert dashboard([str(copy), "--entity", "team", "--print"]) == 0
    printed = capsys.readouterr().out
    assert "agreement/graddot/cosine" in printed
    assert "ceiling/spearman" in printed


def test_results_of_an_earlier_gold_standard_are_left_out(copy: Path, capsys) -> None:
    scored(copy, "--method", "graddot", capsys=capsys)
    card = copy / SETTING / "card.json"
    card.write_text(card.read_text().replace('"data.safetensors": "', '"data.safetensors": "00'))
    assert main(["table", "--folder", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "over 1 settings" in printed
    assert printed.splitlines()[-1] == "judged by an earlier gold standard, left out: diabetes/sgd, graddot"


def test_other_protocols_judge_the_same_final_models(copy: Path, tmp_path: Path, capsys) -> None:
    for protocol, metrics in (
        ("lds", {"lds"}),
        ("retraining", {"retraining_cosine", "retraining_spearman", "retraining_pearson"}),
    ):
        flags = ["--method", "graddot", "--protocol", protocol, "--store", str(tmp_path / "store")]
        status, said = scored(copy, SETTING, *flags, capsys=capsys)
        assert status == 0
        assert said.startswith("diabetes/sgd, graddot: ")
        found = pd.read_csv(copy / "results.csv").query("metric in @metrics")
        assert set(found["metric"]) == metrics
        assert found["ceiling_upper"].between(0, 1).all()
        assert found["final_models"].eq(2).all()
    status, said = scored(copy, SETTING, "--method", "graddot", "--protocol", "mislabelled", capsys=capsys)
    assert status == 1
    assert "labels can only be flipped in classification" in said
    with pytest.raises(InputError, match="--protocol: expected one of lds, retraining, mislabelled"):
        scored(copy, SETTING, "--method", "graddot", "--protocol", "LDS", capsys=capsys)


def test_flipped_labels_are_found_by_every_final_model(tmp_path: Path, capsys) -> None:
    common = ["--folder", f"{tmp_path}/made", "--store", f"{tmp_path}/store", "--threads", "1"]
    assert main(["make", "breast_cancer/sgd", *common, "--models", "1", "--scale", "0.1"]) == 0
    assert main(["score", *common, "--method", "graddot", "--protocol", "mislabelled"]) == 0
    (found,) = pd.read_csv(tmp_path / "made" / "results.csv").to_dict("records")
    assert (found["metric"], found["method"]) == ("mislabelled", "graddot")
    assert 0.2 < found["mean"] <= 1  # a tenth is flipped
    for name in ("class_detection", "shortcut_detection", "randomised_model"):
        assert main(["score", *common, "--method", "graddot", "--protocol", name]) == 0
    results = pd.read_csv(tmp_path / "made" / "results.csv").set_index("metric")
    assert 0.5 < results.loc["class_detection", "chance"] < results.loc["class_detection", "mean"]
    assert 0 < results.loc["shortcut_detection", "chance"] < results.loc["shortcut_detection", "mean"] <= 1
    assert abs(results.loc["randomised_model", "mean"]) < 1
