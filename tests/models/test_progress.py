"""Progress where there is no terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from pytorch_lightning import Trainer

from fimo.models.lightning_module import FinalModelModule
from fimo.models.losses import mean_squared_error
from fimo.models.mlp import mlp
from fimo.models.progress import EpochProgress, Lines
from tests.models.test_training import diabetes


def test_a_line_every_half_minute_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    with caplog.at_level(logging.INFO, "fimo"):
        lines = Lines("further training", "replica-steps", clock=lambda: now[0])
        for second in range(0, 121, 10):
            now[0] = float(second)
            lines.at(done=10 * second, total=12_000)
    assert len(caplog.messages) == 4
    assert caplog.messages[0] == "further training: 300 of 12000 replica-steps (2 %), 19 min 30 s left"
    assert caplog.messages[-1] == "further training: 1200 of 12000 replica-steps (10 %), 18 min 0 s left"


def test_no_bar_is_drawn_into_a_file(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr("fimo.models.progress.EVERY_SECONDS", 0.0)
    torch.manual_seed(0)
    module = FinalModelModule(mlp(10, 1, (4,)), mean_squared_error, "regression", 1, lr=0.01)
    trainer = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EpochProgress()],
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "fimo"):
        trainer.fit(module, diabetes().train_dataloader())
    assert "\r" not in written.getvalue()
    assert "final model: 2 of 2 epochs (100 %), 0 min 0 s left" in caplog.messages
