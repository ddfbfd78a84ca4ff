"""The process around a run: what libraries print, which versions they have, the Trainer's settings."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import warnings

import fimo
from fimo.store.fingerprint import PACKAGES

SHOWN = (*PACKAGES, "hydra-core", "torchmetrics")
"""Packages whose versions are told: those of any result, and what composes and judges a run."""


def quiet_libraries() -> None:
    """Silence notices that say nothing about the run (Lightning's hardware lines, data-loader hints)."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*is deprecated, use `isinstance.*",
        ".*log_every_n_steps.*",
        ".*validation_step. but have no.*",
    ):
        warnings.filterwarnings("ignore", message)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    # this package's own may not be installed: a checkout on the path of modules
    ours = {"python": platform.python_version(), "fimo": fimo.__version__}
    return ours | {p: importlib.metadata.version(p) for p in SHOWN}
