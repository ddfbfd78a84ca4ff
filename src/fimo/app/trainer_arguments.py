"""Which arguments of the Lightning Trainer there are, and which stages of a run each applies to.

Importing this module must stay cheap: Lightning's arguments are read from its source.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fimo.errors import InputError, nearest
from fimo.extras import installed

FINAL_MODEL, FURTHER_TRAINING, BOTH = "final_model", "further_training", "both"

DURING = (FINAL_MODEL, FURTHER_TRAINING, BOTH)
"""Allowed values of a callback's ``during``."""

OF_BOTH = (
    "accelerator", "devices", "strategy", "enable_progress_bar", "profiler", "deterministic", "benchmark",
    "detect_anomaly", "log_every_n_steps", "default_root_dir",
)  # fmt: skip
"""Arguments that apply to further training too; all others are of the final model's training."""

WITHOUT_EFFECT = (
    *OF_BOTH, "enable_model_summary", "enable_checkpointing", "num_sanity_val_steps", "limit_test_batches",
    "limit_predict_batches", "model_registry", "enable_autolog_hparams", "use_distributed_sampler",
    "sync_batchnorm", "num_nodes",
)  # fmt: skip
"""Arguments that a final model does not depend on, so that the store shares it among them."""

ELSEWHERE = {
    "callbacks": "callbacks are a group: callbacks=[early_stopping,lr_monitor], callbacks.NAME._target_=...",
    "logger": "loggers are a group: logger=[wandb,tensorboard]",
    "num_nodes": "a run is of one node; start a process on each, on one store",
    "barebones": "leaves out what a run is made of; enable_progress_bar=false and logger=none make it quiet",
    "fast_dev_run": "trains on single batches; trainer.max_epochs=1 with scale=0.1 tries a run quickly",
    "inference_mode": "does not apply: nothing is predicted by the Trainer",
}
"""Arguments that Lightning has and a run doesn't, with what to do instead."""

OBSERVERS = (
    "DeviceStatsMonitor",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "RichModelSummary",
)
"""Lightning's callbacks that a final model does not depend on."""

OF_THE_FINAL_MODEL = (
    "BackboneFinetuning", "BaseFinetuning", "BatchSizeFinder", "EarlyStopping", "EMAWeightAveraging",
    "GradientAccumulationScheduler", "LearningRateFinder", "LearningRateMonitor", "ModelCheckpoint",
    "ModelPruning", "StochasticWeightAveraging", "WeightAveraging",
)  # fmt: skip
"""Lightning's callbacks that change or need a training of one model: not of the replicas."""


@functools.cache
def trainers_arguments() -> tuple[str, ...]:
    """Return the names of all arguments of ``pytorch_lightning.Trainer``, without importing it."""
    spec = importlib.util.find_spec("pytorch_lightning")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "trainer.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            for inside in node.body:
                if isinstance(inside, ast.FunctionDef) and inside.name == "__init__":
                    given = [*inside.args.args, *inside.args.kwonlyargs]
                    return tuple(argument.arg for argument in given if argument.arg != "self")
    raise AssertionError("Lightning's Trainer has no __init__")


def check_trainer(trainer: DictConfig, own: tuple[str, ...]) -> None:
    """Refuse arguments of ``trainer`` that there are not, or that are given elsewhere.

    Args:
        own: keys that are not Lightning's.

    Raises:
        InputError: naming the first.
    """
    known = [name for name in trainers_arguments() if name not in ELSEWHERE]
    for name in map(str, trainer):
        if name in ELSEWHERE:
            raise InputError(f"trainer.{name}", ELSEWHERE[name])
        if name not in own and name not in known:
            raise InputError(f"trainer.{name}", f"unknown key; {nearest(name, sorted({*own, *known}))}")


def check_callbacks(callbacks: DictConfig, accelerator: str) -> None:
    """Refuse a callback without a class, or of a stage that it can't be of.

    Args:
        accelerator: of the Trainer.

    Raises:
        InputError: naming its key.
    """
    for name, node in callbacks.items():
        key = f"callbacks.{name!s}"
        if not OmegaConf.is_dict(node) or "_target_" not in node:
            raise InputError(key, "expected a Lightning callback with a _target_")
        during = node.get("during", FINAL_MODEL)
        if during not in DURING:
            raise InputError(f"{key}.during", f"expected one of {', '.join(DURING)} but got {during!r}")
        kind = str(node._target_).rpartition(".")[2]
        of_cpu = kind == "DeviceStatsMonitor" and (accelerator == "cpu" or node.get("cpu_stats"))
        if of_cpu and not installed("psutil"):
            raise InputError(key, "needs psutil on the CPU, not installed here: pip install psutil")
        if during != FINAL_MODEL and of_lightning(node) and kind in OF_THE_FINAL_MODEL:
            raise InputError(
                f"{key}.during", f"{kind} is of one model's training, but all runs of further training are "
                "advanced together and to their end; during=final_model",
            )  # fmt: skip


def of_lightning(node: Any) -> bool:
    """Return whether a node's class is Lightning's own."""
    return str(node._target_).split(".")[0] in ("pytorch_lightning", "lightning", "fimo")


def changes_the_final_model(node: Any) -> bool:
    """Return whether a final model may depend on a callback: all of the user's own count."""
    observes = of_lightning(node) and str(node._target_).rpartition(".")[2] in OBSERVERS
    return node.get("during", FINAL_MODEL) != FURTHER_TRAINING and not observes
