"""The final model: trained by the Trainer and cached, or the user's own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock
from lightning_fabric.utilities.exceptions import MisconfigurationException

from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule
from fimo.data.instances import Instances
from fimo.errors import InputError, reason
from fimo.models.final_model import FinalModel
from fimo.models.keep_best import KeepBest
from fimo.models.lightning_module import FinalModelModule
from fimo.models.own_training import pairs
from fimo.store.description import describe
from fimo.store.files import Store, could_not_write, read_tensors, write_tensors
from fimo.store.fingerprint import Key, kept, training_key

log = logging.getLogger(__name__)

EVERY_TRAINERS = (pl.callbacks.ProgressBar, pl.callbacks.ModelSummary)


@dataclass(frozen=True)
class Quality:
    """How good a model is, so that a bad one is seen.

    Args:
        train_loss, test_loss: means over instances.
        baseline_loss: test loss of the best constant prediction made from the training targets (their mean,
            or the class frequencies).
        train_accuracy, test_accuracy: shares; None for regression.
    """

    train_loss: float
    test_loss: float
    baseline_loss: float
    train_accuracy: float | None = None
    test_accuracy: float | None = None

    def __str__(self) -> str:
        text = f"loss {self.train_loss:.4g} on training and {self.test_loss:.4g} on test instances"
        text += f" (the best constant's: {self.baseline_loss:.4g})"
        if self.train_accuracy is None or self.test_accuracy is None:
            return text
        return f"{text}, accuracy {self.train_accuracy:.3f} and {self.test_accuracy:.3f}"


def train_final_model(
    module: FinalModelModule,
    data: InstancesModule,
    trainer: pl.Trainer,
    store: Store,
    settings: Mapping[str, Any],
    seed: int,
    cost: Cost,
    code: Mapping[str, Any] | None = None,
) -> None:
    """Train a module in place, or read its parameters from the store.

    Args:
        settings: of the configuration that the result depends on.
        seed: of the data order.
        cost: gets the gradient evaluations and what was reused.
        code: classes and functions of the user's own that the result depends on, by name.

    Raises:
        InputError: the best epoch is kept, and there are no instances to choose it by.
    """
    if keeps_best(trainer) and data.validation is None:
        raise InputError("trainer.keep", "best needs a validation part, by which the epoch is chosen")

    def key() -> Key:
        best_on = data.validation
        everything = {**settings, "seed": seed, "batch_size": data.batch_size}
        everything |= {"keep": "best"} if keeps_best(trainer) else {}
        everything |= {"training": "own"} if module.trains_itself else {}
        everything |= {name: describe(value, name) for name, value in (code or {}).items()}
        batches = type(data).train_dataloader
        return training_key(module.network, module.loss.definition, everything, data.train, batches, best_on)

    cost.gradient_evaluations = len(data.train) * (trainer.max_epochs or 0)
    # several jobs of a sweep want the same model
    with kept(store, "final_model", key) as folder, FileLock(folder / "lock"):
        path = folder / "model.safetensors"
        if path.exists():
            module.network.load_state_dict(read_tensors(path))
            cost.recall(folder)
            unused = [type(one).__name__ for one in trainer.callbacks if observes(one)]  # type: ignore[attr-defined]
            if unused:
                log.warning(
                    "the final model is in the store, so it isn't trained: %s unused", ", ".join(unused)
                )
            return
        torch.manual_seed(seed)
        batches = data.train_dataloader()
        judged = None if data.validation is None else data.val_dataloader()
        if module.trains_itself:
            batches, judged = pairs(batches), None if judged is None else pairs(judged)
        try:
            trainer.fit(module.trained, train_dataloaders=batches, val_dataloaders=judged)
        except MisconfigurationException as error:  # such as a callback that this training does not suit
            raise InputError("trainer", reason(error)) from error
        except RuntimeError as error:
            if "Early stopping conditioned on metric" not in str(error):
                raise
            raise InputError("callbacks", f"{error}; dataset.validation_size=0.1 makes val_loss") from error
        if trainer.interrupted:
            raise KeyboardInterrupt
        write_tensors(path, copy.deepcopy(module.network).cpu().state_dict())
        cost.keep(folder)


def observes(callback: pl.Callback) -> bool:
    """Return whether a callback is neither the package's own nor one that every Trainer has."""
    package = type(callback).__module__.split(".")[0]
    return package != "fimo" and not isinstance(callback, EVERY_TRAINERS)


def keeps_best(trainer: pl.Trainer) -> bool:
    """Return whether a Trainer keeps its best epoch rather than its last."""
    return any(isinstance(callback, KeepBest) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def save_checkpoint(module: FinalModelModule, trainer: pl.Trainer, path: Path) -> None:
    """Write a Lightning checkpoint that ``model.checkpoint`` reads back."""
    trainer.strategy.connect(module)
    try:
        trainer.save_checkpoint(path, weights_only=True)
    except OSError as error:  # which names a temporary file
        raise could_not_write(path, error) from error


def quality(final_model: FinalModel, data: InstancesModule) -> Quality:
    """Measure a model on its training and test instances, in eval mode."""

    def measure(instances: Instances) -> tuple[float, float | None]:
        if data.task != "classification":
            return float(final_model.losses(instances).double().mean()), None
        outputs = final_model.outputs(instances)
        right = outputs.argmax(-1) == instances.targets
        return float(final_model.loss(outputs, instances.targets).double().mean()), float(
            right.double().mean()
        )

    (train_loss, train_accuracy), (test_loss, test_accuracy) = measure(data.train), measure(data.test)
    return Quality(train_loss, test_loss, constant_loss(final_model, data), train_accuracy, test_accuracy)


def constant_loss(final_model: FinalModel, data: InstancesModule) -> float:
    """Return the mean test loss of the best constant prediction made from the training targets."""
    targets = data.train.targets
    if data.task == "regression":
        constant = targets.mean(0)
    else:
        known = targets[targets >= 0]  # sequences mark positions without a target by a negative number
        share = torch.bincount(known, minlength=data.outputs).double() + 1e-12
        constant = (share / share.sum()).log().float()
    losses = []
    for batch in data.test.batches(256):
        positions = batch.targets.shape[: batch.targets.ndim - (data.task == "regression")]
        outputs = constant.expand(*positions, *constant.shape)
        losses.append(final_model.loss(outputs, batch.targets).double())
    return float(torch.cat(losses).mean())
