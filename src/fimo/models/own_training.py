"""A LightningModule of the user's own that trains itself, and the loss of each instance that it trains by."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fimo.data.instances import Instances
from fimo.errors import InputError, reason
from fimo.models.copied import copied
from fimo.models.final_model import apply
from fimo.models.loss_function import Loss

log = logging.getLogger(__name__)

TRIED = (7, 16)
"""Training instances on which losses are compared, at once."""

CLOSE = 1e-4
"""Relative difference of two means of the same losses, in float32."""

INSTANCE_LOSS = "instance_loss"
"""A module's own method: ``instance_loss(outputs, targets) -> [n]``."""


def trains_itself(network: nn.Module) -> bool:
    """Return whether a network is a LightningModule with a training step and optimizers of its own."""
    return isinstance(network, pl.LightningModule) and all(
        is_overridden(name, network, pl.LightningModule) for name in ("training_step", "configure_optimizers")
    )


def pairs(loader: DataLoader[Instances]) -> DataLoader[Instances]:
    """Return a loader whose batches are pairs of inputs and targets, as LightningModules expect them."""
    loader.collate_fn = as_pair
    return loader


def as_pair(batch: Any) -> Any:
    """Return a batch as a pair ``(inputs, targets)``."""
    return (batch.inputs, batch.targets) if isinstance(batch, Instances) else batch


def loss_of(network: pl.LightningModule, default: Loss, others: Mapping[str, Loss], train: Instances) -> Loss:
    """Return the loss per instance whose mean a module's training step is, in eval mode.

    Its own ``instance_loss``, the task's, or another by name: the first that agrees.

    Args:
        default: of the task.
        others: by name.
        train: training instances.

    Raises:
        InputError: none agrees, or the step can't be tried alone.
    """
    key = "model.loss"
    ask = "name the loss of each instance, model.loss=MODULE.FUNCTION(outputs, targets) -> [n]"
    batches = [train[:n] for n in TRIED]
    try:
        wanted = [step_loss(network, batch) for batch in batches]
    except Exception as error:  # whatever a user's own step needs
        raise InputError(key, f"training_step can't be tried alone: {reason(error)}; {ask}") from error
    own = getattr(network, INSTANCE_LOSS, None)
    candidates = [Loss.of(own)] if own is not None else [default, *others.values()]
    for loss in candidates:
        if all(agrees(network, loss, b, w) for b, w in zip(batches, wanted, strict=True)):
            return loss
    shape = ", ".join(["n", *map(str, batches[0].targets.shape[1:])])
    which = f"no {INSTANCE_LOSS}" if own is not None else "no loss known here"
    raise InputError(
        key,
        f"training_step gives {wanted[0]:.6g} on the first {len(batches[0])} training instances, "
        f"the mean of {which} (targets are [{shape}]); {ask}",
    )


def agrees(network: nn.Module, loss: Loss, batch: Instances, wanted: float) -> bool:
    """Return whether the mean of a loss is what a module's step gave."""
    bare = copied(network).eval()
    try:
        with torch.no_grad():
            losses = loss(apply(bare, batch.inputs), batch.targets)
        found = float(losses.mean())
    except (RuntimeError, ValueError, IndexError, TypeError):  # it does not fit the targets
        return False
    return losses.shape == (len(batch),) and math.isclose(found, wanted, rel_tol=CLOSE, abs_tol=1e-7)


def step_loss(network: pl.LightningModule, batch: Instances) -> float:
    """Return what a copy's training step gives on a batch, in eval mode; what it logs is dropped."""
    bare = copied(network).eval()
    for name in ("log", "log_dict"):
        setattr(bare, name, lambda *_, **__: None)
    assert isinstance(bare, pl.LightningModule)
    with torch.no_grad(), _same_draws():
        found = bare.training_step(as_pair(batch), 0)
    loss = found["loss"] if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise TypeError("it returns no loss")
    return float(loss)


def check_named_loss(network: pl.LightningModule, loss: Loss, train: Instances) -> None:
    """Warn where a named loss is not what a module trains by, as far as that can be tried."""
    batch = train[: TRIED[0]]
    try:
        wanted = step_loss(network, batch)
    except Exception as error:
        log.info("training_step was not compared with model.loss: %s", reason(error))
        return
    if not agrees(network, loss, batch, wanted):
        log.warning(
            "model.loss is not what training_step takes the mean of: further training follows the first"
        )


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Leave the global random state as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
