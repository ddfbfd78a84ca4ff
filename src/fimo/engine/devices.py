"""Where runs are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def trainer_device(trainer: Mapping[str, Any] | None) -> torch.device:
    """Return the device on which a Trainer of these arguments would run."""
    if trainer is None or trainer.get("accelerator", "cpu") == "cpu":
        return torch.device("cpu")
    from fimo.engine.driver import make_trainer  # Lightning takes seconds to import

    return make_trainer(trainer).strategy.root_device
