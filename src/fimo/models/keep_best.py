"""Keeping the best epoch of the final model's training instead of the last one."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from fimo.errors import InputError
from fimo.models.lightning_module import FinalModelModule


class KeepBest(pl.Callback):
    """After training, gives the network the parameters of its best epoch on the validation instances.

    Best is the highest ``val_accuracy``, or the lowest ``val_loss`` where there is none; of equal ones the
    first.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.epoch = -1
        self.state: dict[str, Tensor] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = trainer.callback_metrics
        if not {"val_accuracy", "val_loss"} & set(found):
            raise InputError(
                "trainer.keep", "best needs a validation_step that logs val_loss or val_accuracy"
            )
        score = float(found["val_accuracy"]) if "val_accuracy" in found else -float(found["val_loss"])
        if self.best is None or score > self.best:
            self.best, self.epoch = score, trainer.current_epoch
            self.state = {k: v.detach().clone() for k, v in network_of(pl_module).state_dict().items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.state:
            network_of(pl_module).load_state_dict(self.state)


def network_of(module: pl.LightningModule) -> nn.Module:
    """Return the network that a module trains: itself, where it is the user's own."""
    return module.network if isinstance(module, FinalModelModule) else module
