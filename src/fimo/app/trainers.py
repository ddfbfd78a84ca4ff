"""The Trainers of a run: of the final model's training, and of further training; their callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from fimo.app.arguments import imported
from fimo.app.build import build
from fimo.app.config import Trainer as TrainerSettings
from fimo.app.trainer_arguments import (
    BOTH,
    FINAL_MODEL,
    FURTHER_TRAINING,
    OF_BOTH,
    WITHOUT_EFFECT,
    changes_the_final_model,
    of_lightning,
)
from fimo.errors import InputError, reason
from fimo.models.keep_best import KeepBest
from fimo.models.progress import EpochProgress

PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}

OWN = ("keep",)
"""Keys of ``trainer`` that are not Lightning's."""

TRAINING = ("max_epochs", "precision", "gradient_clip_val")
"""Keys of ``trainer`` that a final model always depends on."""


def build_trainer(
    config: DictConfig,
    more: Sequence[pl.Callback] = (),
    logger: Logger | None = None,
    folder: Path | None = None,
) -> pl.Trainer:
    """Build the Trainer of the final model's training, on the first of the devices.

    The others serve further training: on several, a final model's batches would be larger.

    Args:
        more: callbacks besides those configured.
        logger: for what modules and callbacks log.
        folder: of the run; None where nothing is written beside it, and the configured callbacks that only
            look are left out.
    """
    settings = _settings(config, FINAL_MODEL, folder)
    devices = settings["devices"]
    if devices not in (1, "1"):
        settings |= {"devices": devices[:1] if isinstance(devices, list) else 1, "strategy": "auto"}
    callbacks: list[pl.Callback] = [EpochProgress()] if config.trainer.enable_progress_bar else []
    if config.trainer.keep == "best":
        callbacks.append(KeepBest())
    callbacks += build_callbacks(config, FINAL_MODEL, folder)
    defaults = {
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
    }
    try:
        return pl.Trainer(
            **{**defaults, **settings, "enable_progress_bar": False},
            callbacks=[*callbacks, *more],
            logger=logger or False,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:  # such as no GPU
        added = [str(name) for name in config.trainer if name not in TrainerSettings.__dataclass_fields__]
        at_fault = next((f"trainer.{name}" for name in added if name in str(error)), "trainer")
        where = "" if at_fault != "trainer" else f"accelerator={settings['accelerator']}: "
        said = reason(error).removeprefix("MisconfigurationException: ")
        raise InputError(at_fault, f"{where}{said}") from error


def further_training_settings(config: DictConfig, folder: Path | None = None) -> dict[str, Any]:
    """Return the arguments of further training's Trainer: those of ``trainer`` that apply, and callbacks."""
    settings = {k: v for k, v in _settings(config, FURTHER_TRAINING, folder).items() if k in OF_BOTH}
    return settings | {"callbacks": build_callbacks(config, FURTHER_TRAINING, folder)}


def build_callbacks(config: DictConfig, stage: str, folder: Path | None) -> list[pl.Callback]:
    """Build the callbacks of a stage; a ``dirpath`` of null is the run folder's ``checkpoints``.

    Args:
        stage: ``final_model`` or ``further_training``.
        folder: of the run; None: only those that what is trained depends on.

    Raises:
        InputError: one is no Lightning callback.
    """
    found = []
    for name, node in config.callbacks.items():
        if node.get("during", FINAL_MODEL) not in (stage, BOTH):
            continue
        if folder is None and not (stage == FINAL_MODEL and changes_the_final_model(node)):
            continue
        key, arguments = f"callbacks.{name}", {}
        takes = inspect.signature(imported(node._target_, f"{key}._target_")).parameters
        if "dirpath" in takes and node.get("dirpath") is None and folder is not None:
            arguments["dirpath"] = str(folder / "checkpoints")
        try:
            callback = build(_without(node, "during"), key, **arguments)
        except (MisconfigurationException, ModuleNotFoundError) as error:
            raise InputError(key, str(error).splitlines()[0]) from error
        if not isinstance(callback, pl.Callback):
            raise InputError(key, f"expected a Lightning callback but got {type(callback).__name__}")
        found.append(callback)
    return found


def training_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings that the final model's training depends on."""
    more = {
        str(name): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in config.trainer.items()
        if name not in (*TRAINING, *OWN, *WITHOUT_EFFECT)
    }
    callbacks = {
        str(name): OmegaConf.to_container(node, resolve=True)
        for name, node in config.callbacks.items()
        if changes_the_final_model(node)
    }
    return {
        **{name: config.model[name] for name in ("optimizer", "lr", "momentum", "weight_decay")},
        **{name: config.trainer[name] for name in TRAINING},
        **more,
        **({"callbacks": callbacks} if callbacks else {}),
    }


def training_code(config: DictConfig) -> dict[str, Any]:
    """Return the user's own classes that the final model's training depends on, by key."""
    nodes = {f"callbacks.{name}": n for name, n in config.callbacks.items() if changes_the_final_model(n)}
    nodes |= {
        f"trainer.{n}": v for n, v in config.trainer.items() if OmegaConf.is_dict(v) and "_target_" in v
    }
    own = {key: node for key, node in nodes.items() if not of_lightning(node)}
    return {key: imported(node._target_, f"{key}._target_") for key, node in own.items()}


def not_retraced(config: DictConfig) -> str | None:
    """Return what of the final model's training the engine would not do from scratch, or None."""
    known = ("optimizer", "lr", "momentum", "weight_decay", *TRAINING)
    more = [name for name in training_settings(config) if name not in known]
    if config.trainer.keep == "best":
        return "trainer.keep=best chooses an epoch, which training from scratch does not"
    if more:
        name = "callbacks" if "callbacks" in more else f"trainer.{more[0]}"
        return f"{name} belongs to the final model's training, which training from scratch would leave out"
    return None


def _settings(config: DictConfig, stage: str, folder: Path | None) -> dict[str, Any]:
    """Return ``trainer`` as arguments, objects built; without a folder, without a profiler."""
    settings: dict[str, Any] = {}
    for name, value in config.trainer.items():
        if name in OWN:
            continue
        if OmegaConf.is_dict(value) and "_target_" in value:
            settings[str(name)] = build(value, f"trainer.{name}")
        else:
            settings[str(name)] = (
                OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            )
    profiler = settings.pop("profiler", None)
    if folder is not None:
        settings.setdefault("default_root_dir", str(folder))
        if isinstance(profiler, str) and profiler in PROFILERS:
            profiler = PROFILERS[profiler](dirpath=str(folder), filename=f"profile_{stage}")
        settings["profiler"] = profiler
    return settings


def _without(node: DictConfig, name: str) -> DictConfig:
    return OmegaConf.create({str(k): v for k, v in node.items() if k != name})
