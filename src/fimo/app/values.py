"""Values of the configuration that can't be right, seen before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from fimo.app import wandb_artifacts
from fimo.app.amounts import check_amounts
from fimo.app.definitions import arguments
from fimo.engine.settings import LEAVE_OUT_RULES, OPTIMIZERS, RANGES, SCHEDULES, check_range
from fimo.errors import InputError, nearest
from fimo.extras import FIGURES, WANDB, available, require

CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": ("study", "audit"),
    "until": ("check", "further_training", "report"),
    "logger.wandb.mode": (None, "offline", "online", "disabled", "dryrun", "run"),  # the last two were W&B's
    "model.training": ("auto", "own", "loss"),
    "model.optimizer": OPTIMIZERS,
    "further_training.optimizer": OPTIMIZERS,
    "further_training.leave_out": LEAVE_OUT_RULES,
    "further_training.schedule": SCHEDULES,
    "trainer.keep": ("last", "best"),
    "trainer.accelerator": ("cpu", "gpu", "cuda", "mps", "auto"),
    "trainer.strategy": ("auto", "ddp", "ddp_spawn"),
    # the final model stays in float32; further_training.dtype is for the runs that are measured
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed", 32),
}

SMALLEST = {
    "model.seeds": 1,
    "threads": 1,
    "seed": 0,
    "evaluation.bootstrap": 0,
    "evaluation.shown": 1,
    "trainer.gradient_clip_val": 0,
}
"""By key; null is allowed where the schema allows it."""

FROM_SCRATCH = ("fimo.models.mlp.mlp", "fimo.models.resnet9.resnet9")
"""Networks that begin with random parameters, never with those of a pretrained model."""

NOT_ARGUMENTS = ("recommended", "validation_size")
"""Keys of ``dataset`` that are not its class's: the first is read by model and trainer."""

FILES = ("dataset.path", "dataset.prompts")


def check_values(config: DictConfig) -> None:
    """Refuse values out of range, unknown choices and files that are not there.

    Raises:
        InputError: naming the first key at fault.
    """
    for key in FILES:
        path = OmegaConf.select(config, key)
        if path is not None and not Path(str(path)).exists():
            raise InputError(key, f"no such file: {path}")
    for name in checkpoints(config):
        if name.startswith(wandb_artifacts.WANDB):
            wandb_artifacts.check_name(name)
            require("model.checkpoint", WANDB)
        elif not Path(name).exists():
            raise InputError("model.checkpoint", f"no such file: {name}")
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            names = ", ".join(str(a) for a in allowed if isinstance(a, str))
            raise InputError(key, f"expected one of {names} but got {value!r}")
    for key, least in SMALLEST.items():
        value = OmegaConf.select(config, key)
        if value is not None and not value >= least:
            raise InputError(key, f"expected at least {least} but got {value}")
    check_amounts(config)
    for name in ("momentum", "weight_decay"):
        check_range(f"model.{name}", config.model[name])
    for name in RANGES:
        value = config.further_training[name]
        check_range(f"further_training.{name}", tuple(value) if name == "betas" else value)
    seeds = config.further_training.seeds
    if isinstance(seeds, int) and seeds < 1:
        raise InputError("further_training.seeds", f"expected at least 1 seed but got {seeds}")
    _check_names(config)
    if not 0 < config.scale <= 1:
        raise InputError("scale", f"expected a share in (0, 1] but got {config.scale}")
    _check_files(config)
    if config.trainer.max_epochs == 0 and config.model.checkpoint is None:
        network = OmegaConf.select(config, "model.network._target_")
        if network in FROM_SCRATCH and not config.model.get("accept_poor", False):
            problem = (
                "0 leaves the network at its random initial parameters; give model.checkpoint, or at least 1"
            )
            raise InputError("trainer.max_epochs", problem)
    _check_final_models(config)
    if config.mode == "audit" and config.until == "further_training":
        raise InputError("until", "further_training is the gold standard of mode=study; an audit has none")
    if config.further_training.shard is not None and config.until != "further_training":
        raise InputError("further_training.shard", "is for runs with until=further_training")
    _check_devices(config.trainer.devices)
    _check_packages(config)


def checkpoints(config: DictConfig) -> list[str]:
    """Return the final models that are given: none, one file, or several."""
    given = config.model.checkpoint
    if given is None:
        return []
    return list(map(str, given)) if OmegaConf.is_list(given) else [str(given)]


def _check_final_models(config: DictConfig) -> None:
    """Refuse several final models where there can be one only."""
    given, seeds = checkpoints(config), config.model.seeds
    if OmegaConf.is_list(config.model.checkpoint):
        if len(given) < 2 or len(set(given)) < len(given):
            raise InputError(
                "model.checkpoint", f"expected a file, or several different ones but got {given}"
            )
        if seeds not in (1, len(given)):
            raise InputError(
                "model.seeds", f"{len(given)} final models are given, none of {seeds} is trained"
            )
        key, one = "model.checkpoint", "one file"
    elif seeds > 1:
        key, one = "model.seeds", "model.seeds=1"
        if given:
            raise InputError(
                key, f"{seeds} final models are trained here, but model.checkpoint gives one ({one})"
            )
        if config.trainer.max_epochs == 0:
            problem = (
                "with trainer.max_epochs=0 nothing is trained, so final models would not differ by training"
            )
            raise InputError(key, problem)
    else:
        return
    if config.mode == "audit":
        raise InputError(key, f"an audit is of one final model ({one}); mode=study has several")
    if config.until == "check":
        raise InputError(key, f"until=check checks one final model ({one})")


def _check_names(config: DictConfig) -> None:
    """Refuse arguments that the package's own classes don't have; the rest is seen when they are called."""
    nodes = {"dataset": config.dataset, "model.network": config.model.network}
    nodes |= {f"methods.{name}": node for name, node in config.methods.items()}
    for key, node in nodes.items():
        target = str(node.get("_target_") or "") if OmegaConf.is_dict(node) else ""
        known = arguments(target) if target.startswith("fimo.") else None
        for name in map(str, node if known is not None else []):
            if known is not None and not name.startswith("_") and name not in (*known, *NOT_ARGUMENTS):
                raise InputError(f"{key}.{name}", f"unknown argument; {nearest(name, known)}")


def _check_packages(config: DictConfig) -> None:
    """Refuse a report or a logger whose packages are not installed, both in one line."""
    needed: dict[str, tuple[str, ...]] = {}
    without = []
    if config.report and config.until == "report" and not available(FIGURES):
        needed |= FIGURES
        without.append("report=false")
    wandb = config.logger.get("wandb") if config.until != "check" else None
    if wandb is not None and wandb.get("mode") != "disabled" and not available(WANDB):
        needed |= WANDB
        without.append("logger=none")
    require("report" if "figures" in needed else "logger", needed, f"or without: {' '.join(without)}")


def _check_files(config: DictConfig) -> None:
    """Refuse a folder where a file is expected, and a file where a folder is."""
    for checkpoint in checkpoints(config):
        if Path(checkpoint).is_dir():
            raise InputError("model.checkpoint", f"expected a file but {checkpoint} is a folder")
    if not config.store.strip():
        raise InputError("store", "expected a folder but got an empty name")
    store = Path(config.store)
    for place in (store, *store.parents):
        if place.exists():
            if not place.is_dir():
                raise InputError("store", f"expected a folder but {place} is a file")
            break


def _check_devices(value: Any) -> None:
    """Refuse what is neither a number of devices, nor a list of them, nor ``auto`` (or -1, all)."""
    if isinstance(value, ListConfig):
        good = len(value) > 0 and all(isinstance(v, int) and v >= 0 for v in value)
    elif isinstance(value, int) and not isinstance(value, bool):
        good = value == -1 or value >= 1
    else:
        good = value == "auto"
    if not good:
        found = list(value) if isinstance(value, ListConfig) else value
        raise InputError("trainer.devices", f"expected a number, a list of indices or auto but got {found!r}")
