"""Progress of the final model's training: one bar over epochs, with the time left."""

from __future__ import annotations

import pytorch_lightning as pl
from tqdm import tqdm


class EpochProgress(pl.Callback):
    """One bar for the whole training: a bar per epoch says nothing where an epoch takes milliseconds."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_epochs,
            desc="final model",
            unit="epoch",
            mininterval=0.5,
            disable=not trainer.is_global_zero,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
