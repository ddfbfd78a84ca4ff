"""Progress of the final model's training: one bar, with the time left; lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import pytorch_lightning as pl
from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
"""Between lines where there is no terminal."""


class Lines:
    """Says how far something is in a line every half minute, as a log file can hold it.

    Args:
        name: of what is done.
        unit: of its steps.
        clock: seconds.
    """

    def __init__(self, name: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.unit, self.clock = name, unit, clock
        self.began = self.said = clock()

    def at(self, done: float, total: float) -> None:
        """Say how far it is, if half a minute has passed."""
        now = self.clock()
        if now - self.said < EVERY_SECONDS or not total:
            return
        self.said = now
        left = (now - self.began) * (total - done) / done if done else 0.0
        rest = f", {_time(left)} left" if done else ""
        log.info("%s: %d of %d %s (%.0f %%)%s", self.name, done, total, self.unit, 100 * done / total, rest)


def on_terminal() -> bool:
    """Return whether progress is shown on a terminal, where a bar can be drawn over."""
    return sys.stderr.isatty()


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


class EpochProgress(pl.Callback):
    """One bar for the whole training: a bar per epoch says nothing where an epoch takes milliseconds."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.lines = Lines("final model", "epochs")
        self.bar = tqdm(
            total=trainer.max_epochs,
            desc="final model",
            unit="epoch",
            mininterval=0.5,
            disable=not (trainer.is_global_zero and on_terminal()),
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.is_global_zero and self.bar.disable:
            batches = max(1, int(trainer.num_training_batches))
            share = (trainer.fit_loop.epoch_loop.batch_idx + 1) / batches
            self.lines.at(trainer.current_epoch + share, trainer.max_epochs or 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
