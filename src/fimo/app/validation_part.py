"""By which instances a final model's epoch is chosen: never by those that are then explained."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from fimo.app.trainer_arguments import changes_the_final_model
from fimo.data.datamodule import InstancesModule
from fimo.errors import InputError


def with_validation_part(data: InstancesModule, explained: Sequence[int], config: DictConfig) -> None:
    """Give a data set the instances by which the final model's epoch is chosen, where one is.

    They are the validation part (``dataset.validation_size``); without one, the test instances that are
    not explained (``further_training.test`` chooses some); in an audit all are.

    Args:
        data: is given :attr:`~fimo.data.datamodule.InstancesModule.validation`.
        explained: test instances.

    Raises:
        InputError: there are none.
    """
    key = chooses(config)
    if key is None or data.validation is not None or config.model.checkpoint is not None:
        return
    taken = set(range(len(data.test)) if config.mode == "audit" else explained)
    others = [j for j in range(len(data.test)) if j not in taken]
    if not others:
        raise InputError(
            key, "needs instances to choose an epoch by, and all test instances are explained; "
            "dataset.validation_size=0.1 holds out a tenth of the training part",
        )  # fmt: skip
    data.validation = data.test[others]


def chooses(config: DictConfig) -> str | None:
    """Return the key that chooses the final model's last epoch by instances, or None."""
    if config.trainer.keep == "best":
        return "trainer.keep"
    for name, node in config.callbacks.items():
        monitored = str(node.get("monitor") or "").startswith("val")
        if monitored and changes_the_final_model(node):
            return f"callbacks.{name}.monitor"
    return None
