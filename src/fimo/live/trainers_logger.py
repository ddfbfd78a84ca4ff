"""The Lightning logger that a run's Trainers have: it hands on what modules and callbacks log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import Logger

from fimo.live.log import Log

SAID = ("epoch", "train/loss", "val_loss", "val_accuracy")
"""What the run logs itself, by epoch."""


class TrainersLogger(Logger):
    """Hands on ``self.log`` and callbacks' ``log_metrics`` under the name of the run's stage.

    Args:
        live: the run's log; None in processes of other devices, which log nothing.
    """

    def __init__(self, live: Log) -> None:
        super().__init__()
        self.live: Log | None = live

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None}

    @property
    def name(self) -> str:
        """Of the run."""
        return "fimo"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics against the Trainer's steps, ``STAGE/trainer_step``."""
        if self.live is None:
            return
        stage = self.live.stage_name
        values = {f"{stage}/{name}": float(v) for name, v in metrics.items() if name not in SAID}
        if values:
            self.live.log(values, f"{stage}/trainer_step", step or 0)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: loggers are given the run's configuration."""
