"""The Trainer's arguments and callbacks by configuration: to which stage each applies, what it sees."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file

from fimo.app.config import validated
from fimo.app.search_path import SearchPath
from fimo.app.trainer_arguments import trainers_arguments
from fimo.app.trainers import not_retraced, training_settings
from fimo.data.bundled import BundledData
from fimo.errors import InputError
from tests.in_process import commands

CONF = Path(__file__).parents[1] / "conf"
SMALL = [
    "trainer.max_epochs=20", "model.network.hidden=[4]", "model.accept_poor=true", "further_training.seeds=2",
    "further_training.left_out=3", "further_training.epochs=2", "report=false", "logger=none",
    "+method=graddot",
]  # fmt: skip
OWN = '''
import json
from pathlib import Path

import pytorch_lightning as pl


class FullRuns(pl.Callback):
    """Writes the test losses of the full runs, [S, E, J], as further training ends."""

    def __init__(self, path):
        self.path = Path(path)

    def on_train_end(self, trainer, pl_module):
        if not hasattr(pl_module, "job"):  # the final model's training
            self.path.with_suffix(".final").touch()
            return
        job = pl_module.job
        losses = [job.row(replica)["values"].tolist() for replica in job.full]
        self.path.write_text(json.dumps({"steps": list(job.points), "losses": losses}))
'''


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    return validated(config, SearchPath((CONF,)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    return commands(CONF, SMALL, tmp_path, monkeypatch, capsys)


def test_lightnings_arguments_are_known_without_importing_it() -> None:
    assert trainers_arguments() == tuple(inspect.signature(pl.Trainer).parameters)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+trainer.profilr=simple", "trainer.profilr: unknown key; did you mean profiler?"),
        ("+trainer.callbacks=[]", "trainer.callbacks: callbacks are a group: callbacks=[early_stopping"),
        ("+trainer.logger=true", "trainer.logger: loggers are a group"),
        ("+trainer.num_nodes=2", "trainer.num_nodes: a run is of one node"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run: trains on single batches"),
        ("+callbacks.mine.path=x", "callbacks.mine: expected a Lightning callback with a _target_"),
        (
            "callbacks=[early_stopping] callbacks.early_stopping.during=both",
            "callbacks.early_stopping.during: EarlyStopping is of one model's training",
        ),
        (
            "callbacks=[lr_monitor] callbacks.lr_monitor.during=always",
            "callbacks.lr_monitor.during: expected one of final_model, further_training, both",
        ),
    ],
)
def test_an_argument_or_callback_that_can_not_be_is_named(override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        composed(*override.split())
    assert said in str(caught.value)


def test_what_changes_a_training_is_part_of_the_final_models_key_and_nothing_else() -> None:
    plain = training_settings(composed())
    looking = composed(
        "callbacks=[lr_monitor,checkpoints]", "+trainer.profiler=simple", "+trainer.deterministic=true"
    )
    assert training_settings(looking) == plain
    assert not_retraced(looking) is None
    for changed in ("+trainer.accumulate_grad_batches=2", "+trainer.limit_train_batches=0.5"):
        config = composed(changed)
        name, _, value = changed.removeprefix("+trainer.").partition("=")
        assert training_settings(config) == plain | {name: float(value)}
        assert name in (not_retraced(config) or "")
    stopping = composed("callbacks=[early_stopping]", "callbacks.early_stopping.patience=3")
    assert training_settings(stopping)["callbacks"]["early_stopping"]["patience"] == 3
    assert "callbacks" in (not_retraced(stopping) or "")


def test_a_callback_of_ones_own_reads_the_full_runs_losses(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = tmp_path / "seen.json"
    folder = run(
        "own", "callbacks.seen._target_=mine.FullRuns", f"callbacks.seen.path={seen}",
        "callbacks.seen.during=both", "callbacks=[lr_monitor,checkpoints]",
        "callbacks.checkpoints.every_n_epochs=5", "trainer.profiler=simple", "trainer.deterministic=true",
    )  # fmt: skip
    try:
        assert isinstance(folder, Path), folder
        written, result = json.loads(seen.read_text()), load_file(folder / "sensitivity.safetensors")
        assert written["steps"] == result["step"].tolist()
        full = torch.tensor(written["losses"])
        assert torch.allclose(full, result["full_losses"].to(full.dtype), atol=1e-6)
        assert seen.with_suffix(".final").exists()
        assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 4
        profiles = sorted(file.name for file in folder.glob("*profile_*"))
        assert profiles == ["fit-profile_final_model.txt", "fit-profile_further_training.txt"]
        assert "lr-" in (folder / "metrics.csv").read_text().splitlines()[0]
    finally:
        del sys.modules["mine"]


def test_lightnings_own_error_is_one_line(run) -> None:
    assert "error: trainer.val_check_interval: " in str(run("bad", "trainer.val_check_interval=-1"))
    assert "error: trainer.profiler: " in str(run("bad", "trainer.profiler=slow"))


def test_early_stopping_ends_the_training_by_the_validation_part(run) -> None:
    stop = ["callbacks=[early_stopping]", "callbacks.early_stopping.min_delta=0.1"]
    stop += ["callbacks.early_stopping.patience=1"]
    said = run("none", *stop)
    assert str(said).startswith("error: callbacks.early_stopping.monitor: needs instances to choose an epoch")
    folder = run("some", *stop, "dataset.validation_size=0.2")
    assert isinstance(folder, Path), folder
    checkpoint = torch.load(folder / "final_model.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    metrics = (folder / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("final_model/epoch")
    epochs = [float(line.split(",")[column]) for line in metrics[1:] if line.split(",")[column]]
    assert 0 < max(epochs) < 20


def test_the_best_epoch_is_never_chosen_by_what_is_explained(run) -> None:
    best = ["trainer.keep=best", "trainer.max_epochs=3"]
    assert str(run("all", *best)).startswith("error: trainer.keep: needs instances to choose an epoch by")
    assert isinstance(run("others", *best, "further_training.test=[0,1,2]"), Path)
    assert isinstance(run("part", *best, "dataset.validation_size=40"), Path)


def test_the_validation_part_is_taken_from_the_training_part_with_its_names() -> None:
    data, whole = BundledData("diabetes"), BundledData("diabetes")
    data.setup()
    whole.setup()
    data.hold_out(0.1, seed=1)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (357, 40, 45)
    rows = {tuple(row) for row in data.train.inputs.tolist()} | {
        tuple(row) for row in data.validation.inputs.tolist()
    }
    assert rows == {tuple(row) for row in whole.train.inputs.tolist()}
    assert torch.equal(data.test.inputs, whole.test.inputs)
    by_row = {int(row): k for k, row in enumerate(whole.origin("train").row)}
    for index in (0, 17, 356):
        before = by_row[int(data.origin("train").row[index])]
        assert torch.equal(data.train.inputs[index], whole.train.inputs[before])
        assert data.named("train", index).row == whole.named("train", before).row
    with pytest.raises(InputError, match=r"dataset.validation_size: 357 of 357"):
        data.hold_out(357)
