from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch

from fimo.engine.protocol import Protocol
from fimo.evaluation.ceiling import noise_ceilings
from fimo.further_training import Sensitivity, further_train
from fimo.live.callbacks import LogsFurtherTraining, LogsTraining
from fimo.live.log import About, Log
from fimo.live.trainers_logger import TrainersLogger
from fimo.models.final_model import FinalModel
from fimo.models.lightning_module import FinalModelModule
from fimo.models.losses import mean_squared_error
from fimo.store.files import Store
from tests.cases import CASES
from tests.models.test_training import diabetes, module

UNITS = [0, 2, 3, 5, 7, 9]


def begun(folder: Path) -> Log:
    log = Log(folder)
    log.begin(About(folder, "a run"))
    return log


def points(log: Log) -> pd.DataFrame:
    log.end("finished")
    return pd.read_csv(Path(log.folder or "") / "metrics.csv")


def train(
    log: Log | None, *more: pl.Callback, of: FinalModelModule | None = None, logger: Any = False
) -> FinalModelModule:
    trained, data = of or module(), diabetes()
    callbacks = [*more, *([LogsTraining(log, data.test)] if log else [])]
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=logger, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(trained, data.train_dataloader())
    return trained


def test_the_epochs_losses_are_those_of_the_batches_and_of_the_model(tmp_path: Path) -> None:
    class Batches(pl.Callback):
        losses: list[tuple[int, float]] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, _: int) -> None:
            self.losses.append((len(batch), float(outputs["loss"])))

    log, batches = begun(tmp_path), Batches()
    trained = train(log, batches)
    found = points(log).set_index("final_model/epoch")
    each = len(batches.losses) // 3
    for epoch in range(3):
        chosen = batches.losses[epoch * each : (epoch + 1) * each]
        mean = sum(n * loss for n, loss in chosen) / sum(n for n, _ in chosen)
        assert found.loc[epoch + 1, "final_model/train_loss"] == pytest.approx(mean, rel=1e-5)
    held_out = FinalModel(trained.network, mean_squared_error, accept_poor=True).losses(diabetes().test)
    assert found.loc[3, "final_model/val_loss"] == pytest.approx(float(held_out.mean()), rel=1e-5)


def test_training_is_the_same_with_and_without_a_log(tmp_path: Path) -> None:
    def with_dropout() -> FinalModelModule:
        one = module()
        one.network = torch.nn.Sequential(torch.nn.Dropout(0.3), one.network)
        return one

    quiet, told = train(None, of=with_dropout()), train(begun(tmp_path), of=with_dropout())
    for name, value in quiet.network.state_dict().items():
        assert torch.equal(value, told.network.state_dict()[name]), name
    assert told.network.training is quiet.network.training


def test_what_a_module_or_a_callback_logs_reaches_the_log(tmp_path: Path) -> None:
    class Own(FinalModelModule):
        def on_train_epoch_end(self) -> None:
            self.log("own", float(self.current_epoch))

    log = begun(tmp_path)
    log.stage("final_model")
    own = Own(module().network, mean_squared_error, "regression", 1)
    train(log, pl.callbacks.LearningRateMonitor("step"), of=own, logger=TrainersLogger(log))
    found = points(log)
    assert found["final_model/own"].dropna().tolist() == [0.0, 1.0, 2.0]
    assert set(found["final_model/lr-SGD"].dropna()) == {0.1}
    assert "final_model/train/loss" not in found, "it is there by epoch"


def test_a_callback_that_fails_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, spoilt = begun(tmp_path), diabetes().test[:0]
    callback = LogsTraining(log, spoilt)  # the mean of nothing can't be measured
    trained, data = module(), diabetes()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(trained, data.train_dataloader())
    assert trainer.current_epoch == 2
    assert "LogsTraining logs no more" in caplog.text


def further(callback: pl.Callback | None, store: Path, seeds: int = 4) -> Sensitivity:
    case = CASES["mlp_regression"]()
    return further_train(
        case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=2, lr=0.01), seeds, UNITS,
        store=Store(store), chunk=3, trainer={"callbacks": [callback] if callback else []},
    )  # fmt: skip


def test_further_training_is_logged_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.live.callbacks.EVERY_SECONDS", 0.0)
    monkeypatch.setattr("fimo.live.callbacks.MOST_TIME", 1e9)
    monkeypatch.setattr("fimo.engine.driver.BLOCK_SECONDS", 1e-4)
    log = begun(tmp_path)
    log.stage("further_training")
    sensitivity = further(LogsFurtherTraining(log, "cosine"), tmp_path / "store")
    found = points(log)
    curve = found.dropna(subset="further_training/test_loss").set_index("further_training/step")
    assert curve.index.tolist() == sensitivity.step.tolist()
    assert sensitivity.full_losses is not None
    means = sensitivity.full_losses.mean(-1)  # [S, E]
    assert curve["further_training/test_loss"].tolist() == pytest.approx(means.mean(0).tolist())
    assert curve["further_training/test_loss_sd"].tolist() == pytest.approx(means.std(0).tolist())
    steps = found["further_training/replica_steps"].dropna().tolist()
    assert steps == sorted(steps)
    assert steps[-1] == 4 * (len(UNITS) + 1) * int(sensitivity.step[-1])
    assert found["further_training/time_left"].dropna().iloc[-1] == 0
    ceilings = found.dropna(subset="further_training/ceiling").set_index("further_training/seeds")
    assert ceilings.index[-1] == 4
    for seeds, value in ceilings["further_training/ceiling"].items():
        part = sensitivity.raw[: int(seeds), -1:]
        # the order of left-out instances differs, and so the random splits' rounding, but not the ceiling
        assert value == pytest.approx(float(noise_ceilings(part, "cosine").upper[-1, -1]), abs=1e-5)


def test_further_training_is_the_same_with_and_without_a_log(tmp_path: Path) -> None:
    log = begun(tmp_path)
    told = further(LogsFurtherTraining(log, "cosine"), tmp_path / "one")
    assert torch.equal(told.raw, further(None, tmp_path / "other").raw)


def test_runs_that_were_there_already_are_logged_too(tmp_path: Path) -> None:
    further(None, tmp_path / "store")
    log = begun(tmp_path)
    further(LogsFurtherTraining(log, "cosine"), tmp_path / "store")
    found = points(log)
    assert found["further_training/found_share"].dropna().tolist() == [1.0]
    assert found["further_training/test_loss"].notna().sum() == 2


def test_divergence_is_told_at_once(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    log = begun(tmp_path)
    log.alert = lambda title, text: told.append((title, text))  # type: ignore[method-assign]
    case = CASES["mlp_regression"]()
    further_train(
        case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=3, lr=1e30), 2, UNITS,
        trainer={"callbacks": [LogsFurtherTraining(log, "cosine")]},
    )  # fmt: skip
    assert [title for title, _ in told] == ["further training diverged"]


def test_processes_of_other_devices_log_nothing(tmp_path: Path) -> None:
    log = begun(tmp_path)
    for one in (LogsFurtherTraining(log, "cosine"), TrainersLogger(log)):
        assert pickle.loads(pickle.dumps(one)).live is None
    log.end("finished")
