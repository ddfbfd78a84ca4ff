"""``trainer.max_epochs`` and ``further_training.epochs`` that are chosen by the size of the data."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig, OmegaConf

from fimo.errors import InputError

if TYPE_CHECKING:  # values are checked before torch is imported
    from fimo.data.datamodule import InstancesModule

log = logging.getLogger(__name__)

AUTO = "auto"


class Amount(NamedTuple):
    """How many epochs there are.

    Args:
        epochs: of a data set of usual size.
        steps: optimizer steps, beyond which there are fewer epochs, though one at least.
        least: that may be asked for.
    """

    epochs: int
    steps: int
    least: int


AMOUNTS = {
    "trainer.max_epochs": Amount(100, 20_000, 0),
    "further_training.epochs": Amount(20, 10_000, 1),
}


def check_amounts(config: DictConfig) -> None:
    """Refuse what is no number of epochs.

    Raises:
        InputError: naming the key.
    """
    for key, amount in AMOUNTS.items():
        value = OmegaConf.select(config, key)
        if value == AUTO or (value is None and key == "further_training.epochs"):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(key, f"expected a whole number or {AUTO} but got {value!r}")
        if value < amount.least:
            raise InputError(key, f"expected at least {amount.least} but got {value}")


def settle_amounts(config: DictConfig, data: InstancesModule) -> None:
    """Put numbers of epochs where ``auto`` was asked for, now that the training set's size is known.

    So 900 rows are further trained on for 20 epochs, and 50,000 for 6: an audit of them takes minutes
    instead of an hour. What was asked for as ``further_training.steps`` needs no epochs.
    """
    instances, further = len(data.train), config.further_training
    sizes = {"trainer.max_epochs": data.batch_size, "further_training.epochs": further.batch_size}
    for key, amount in AMOUNTS.items():
        if OmegaConf.select(config, key) != AUTO:
            continue
        epochs: int | None = None
        if key != "further_training.epochs" or further.steps is None:
            epochs = min(amount.epochs, max(1, amount.steps // math.ceil(instances / max(1, sizes[key]))))
            if epochs < amount.epochs:
                log.info("%s=%d, of %d training instances (%s)", key, epochs, instances, AUTO)
        OmegaConf.update(config, key, epochs)
