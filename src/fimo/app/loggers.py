"""The loggers that a configuration names, and the log of a run that they share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from fimo.app.arguments import imported
from fimo.app.build import build
from fimo.app.config import plain
from fimo.app.run import Run
from fimo.app.wandb_artifacts import WANDB
from fimo.data.datamodule import InstancesModule
from fimo.errors import InputError
from fimo.live.log import About, Log
from fimo.live.outlet import Outlet
from fimo.reporting.flat import flat
from fimo.store.fingerprint import data_hash


@contextlib.contextmanager
def logged(config: DictConfig, run_dir: Path) -> Iterator[Log]:
    """Yield the log of a run, which ends as the body does.

    Raises:
        InputError: a logger can't be built.
    """
    log = Log(
        run_dir, [Outlet(f"logger.{name}", one) for name, one in build_loggers(config, run_dir).items()]
    )
    try:
        yield log
    except (KeyboardInterrupt, SystemExit):
        log.end("interrupted", "interrupted")
        raise
    except BaseException as error:
        log.end("failed", in_a_line(error))
        raise
    log.end("finished")


def build_loggers(config: DictConfig, run_dir: Path) -> dict[str, Logger]:
    """Build the loggers by name; a ``save_dir`` of null is the run's folder.

    Raises:
        InputError: one is no Lightning logger, or lacks a package.
    """
    found = {}
    for name, node in config.logger.items():
        key, arguments = f"logger.{name}", {}
        if not OmegaConf.is_dict(node) or "_target_" not in node:
            raise InputError(key, "expected a logger with a _target_")
        takes = inspect.signature(imported(node._target_, f"{key}._target_")).parameters
        if "save_dir" in takes and node.get("save_dir") is None and not node._target_.startswith("fimo."):
            arguments["save_dir"] = str(run_dir)
        try:
            logger = build(node, key, **arguments)
        except ModuleNotFoundError as error:
            raise InputError(key, str(error).splitlines()[0]) from error
        if not isinstance(logger, Logger):
            raise InputError(key, f"expected a Lightning logger but got {type(logger).__name__}")
        found[str(name)] = logger
    return found


def about(run: Run, config: DictConfig, folder: Path) -> About:
    """Return what loggers are told of a run when it begins."""
    names = list(run.methods)
    what = ", ".join(names) if len(names) <= 3 else f"{len(names)} methods"
    tags = [str(run.data.name), *(names if len(names) <= 3 else [])]
    settings: dict[str, Any] = flat({k: v for k, v in plain(config).items() if k != "logger"})
    checkpoint = str(config.model.checkpoint or "")
    return About(
        folder, f"{run.data.name}: {what}", settings, tags, partial(described, run.data),
        checkpoint.removeprefix(WANDB) if checkpoint.startswith(WANDB) else None,
    )  # fmt: skip


def described(data: InstancesModule) -> dict[str, Any]:
    """Return what a data set is, and hashes of its instances, without the instances."""
    return {
        "name": str(data.name),
        "task": data.task,
        "classes": list(map(str, data.class_names)),
        "train": {"instances": len(data.train), "hash": data_hash(data.train)},
        "test": {"instances": len(data.test), "hash": data_hash(data.test)},
    }


def in_a_line(error: BaseException) -> str:
    """Return an error's first line, with its kind where it is not one of bad input."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"
