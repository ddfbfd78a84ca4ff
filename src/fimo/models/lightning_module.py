"""The final model's training as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fimo.data.datamodule import Task
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.final_model import apply
from fimo.models.loss_function import Loss, LossFunction

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


class FinalModelModule(pl.LightningModule):
    """A network trained on the mean of its per-instance loss.

    Args:
        network: maps a batch of inputs to outputs.
        loss: per-instance loss.
        task: accuracy is recorded for a classification.
        outputs: classes.
        optimizer: makes the optimizer of ``(parameters, lr)``.
        lr: learning rate.
        description: what built the network, kept in the checkpoint; plain containers only, so that it
            loads without executing code.
        trains_itself: the network is a LightningModule that is trained by its own step and optimizers.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: LossFunction,
        task: Task,
        outputs: int,
        optimizer: MakeOptimizer = torch.optim.SGD,
        lr: float = 0.1,
        description: dict[str, Any] | None = None,
        trains_itself: bool = False,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise InputError("model.lr", f"expected a positive number but got {lr}")
        self.save_hyperparameters({"description": description or {}})
        self.network, self.loss = network, Loss.of(loss)
        self.trains_itself = trains_itself
        self.make_optimizer, self.lr = optimizer, lr
        self.accuracy = MulticlassAccuracy(outputs, average="micro") if task == "classification" else None
        self.mean_loss = MeanMetric()

    @property
    def trained(self) -> pl.LightningModule:
        """What the Trainer is given: this module, or the network where it trains itself."""
        return self.network if self.trains_itself and isinstance(self.network, pl.LightningModule) else self

    def forward(self, inputs: Any) -> Tensor:
        return apply(self.network, inputs)

    def training_step(self, batch: Instances, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch.inputs), batch.targets).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Instances, batch_idx: int) -> None:
        outputs = self(batch.inputs)
        self.mean_loss.update(self.loss(outputs, batch.targets))
        self.log("val_loss", self.mean_loss, on_step=False, on_epoch=True, batch_size=len(batch))
        if self.accuracy is not None:
            self.accuracy.update(outputs, batch.targets)
            self.log("val_accuracy", self.accuracy, on_step=False, on_epoch=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        moved = [p for p in self.network.parameters() if p.requires_grad]
        return self.make_optimizer(moved, self.lr)
