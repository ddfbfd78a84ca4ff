"""From a checked configuration to the objects of a run; every mistake is an error here, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra.utils
import pytorch_lightning as pl
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fimo.app.arguments import check_arguments, imported
from fimo.app.definitions import arguments as argument_names
from fimo.app.values import NOT_ARGUMENTS
from fimo.app.wandb_artifacts import WANDB, downloaded
from fimo.data.datamodule import InstancesModule
from fimo.engine.optimizers import make_optimizer
from fimo.engine.protocol import Protocol
from fimo.errors import InputError, reason
from fimo.evaluation import METRICS
from fimo.methods.base import AttributionMethod
from fimo.models.checkpoint import load_checkpoint
from fimo.models.copied import with_dense_gradients
from fimo.models.final_model import FinalModel
from fimo.models.lightning_module import FinalModelModule
from fimo.models.loss_function import Loss, LossFunction
from fimo.models.losses import LOSSES, MEASUREMENTS
from fimo.models.own_training import check_named_loss, loss_of, trains_itself
from fimo.tasks.base import Judged, Task
from fimo.validation.admission import admit, tried

# Hydra 1.4 asks which targets may be called: the command line is the user's own, and so is what it names
UNCHECKED = getattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)
TRUSTED: dict[str, Any] = {} if UNCHECKED is None else {"_execution_whitelist_": UNCHECKED}

PROTOCOL_FIELDS = tuple(f.name for f in dataclasses.fields(Protocol))
LOSS_OF_TASK = {
    "regression": "mse",
    "classification": "cross_entropy",
    "language_modelling": "language_modelling",
}


def build(config: Any, key: str, **arguments: Any) -> Any:
    """Instantiate a node with a ``_target_``.

    Raises:
        InputError: what the constructor refused, or an argument that it does not have, naming ``key``.
    """
    check_arguments(config, key, arguments)
    try:
        return instantiate(config, **arguments, **TRUSTED)
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(key, reason(cause or error)) from error


def build_data(config: DictConfig) -> InstancesModule:
    """Build and load the data set."""
    node = {str(k): v for k, v in config.dataset.items() if k not in NOT_ARGUMENTS}
    own = {
        name: imported(node[name], f"dataset.{name}")
        for name in ("transform", "target_transform")
        if isinstance(node.get(name), str)
    }
    data = build(OmegaConf.create(node), "dataset", **own)
    if not isinstance(data, InstancesModule):
        raise InputError("dataset._target_", f"expected an InstancesModule but got {type(data).__name__}")
    if data.batch_size < 1:
        raise InputError("dataset.batch_size", f"expected at least 1 but got {data.batch_size}")
    data.setup()
    data.hold_out(config.dataset.get("validation_size") or 0, config.dataset.get("split_seed") or 0)
    return data


def build_module(config: DictConfig, data: InstancesModule) -> FinalModelModule:
    """Build the network with its loss; reads ``model.checkpoint`` where given.

    Arguments of the network called ``inputs``, ``outputs`` and ``classes`` that say ``auto`` become the data
    set's.
    """
    model = config.model
    known = {"inputs": "inputs", "outputs": "outputs", "classes": "class_names"}
    arguments = {name: getattr(data, k) for name, k in known.items() if model.network.get(name) == "auto"}
    if "classes" in arguments:
        arguments["classes"] = list(data.class_names)
    torch.manual_seed(config.seed)
    try:
        network = build(model.network, "model.network", **arguments)
    except InputError as error:
        others = [name for name, value in model.network.items() if value == "auto" and name not in arguments]
        if not others:
            raise
        problem = f"auto is known of arguments called inputs, outputs and classes only ({error.problem})"
        raise InputError(f"model.network.{others[0]}", problem) from error
    if not isinstance(network, nn.Module):
        raise InputError("model.network", f"expected a torch.nn.Module but got {type(network).__name__}")
    if model.checkpoint is not None:
        load_checkpoint(network, checkpoint_file(config))
    description = {"network": OmegaConf.to_container(model.network, resolve=True), **arguments}
    loss = build_loss(model.loss if model.loss != "auto" else LOSS_OF_TASK[data.task], "model.loss")
    itself = trained_by_itself(network, model.training)
    measurement = build_measurement(model.measurement)
    check_fit(network, loss, data, measurement)
    if itself and isinstance(network, pl.LightningModule):
        if model.loss == "auto":
            loss = loss_of(network, loss, LOSSES, data.train)
        else:
            check_named_loss(network, loss, data.train)
    return FinalModelModule(
        network,
        loss,
        data.task,
        data.outputs,
        make_optimizer(model.optimizer, model).torch_optimizer,
        model.lr,
        description,
        itself,
    )


def trained_by_itself(network: nn.Module, training: str) -> bool:
    """Return whether a network's own training step and optimizers train the final model.

    Raises:
        InputError: ``model.training=own``, and it has none.
    """
    able = trains_itself(network)
    if training == "own" and not able:
        needed = "a LightningModule (of pytorch_lightning) with training_step and configure_optimizers"
        raise InputError("model.training", f"own needs {needed} but {type(network).__name__} is none")
    return able and training != "loss"


def checkpoint_file(config: DictConfig) -> str:
    """Return the file of ``model.checkpoint``; an artifact of W&B's is fetched into the store's folder."""
    name = str(config.model.checkpoint)
    if name.startswith(WANDB):
        return str(downloaded(name, Path(config.store) / "artifacts"))
    return name


def check_fit(
    network: nn.Module,
    loss: LossFunction,
    data: InstancesModule,
    measurement: LossFunction | None = None,
) -> None:
    """Try a network and its loss on the data set, whose instances are converted to what the loss takes.

    Raises:
        InputError: naming ``model.network``, ``model.loss``, ``model.measurement`` or the ``dataset``: a
            network without parameters to train, inputs or targets that do not fit, too few outputs; see
            :func:`~fimo.validation.admission.admit`.
    """
    if not any(p.requires_grad for p in network.parameters()):
        raise InputError("model.network", "has no parameter that can be trained")
    loss = Loss.of(loss)
    if loss.targets == "classes" and data.task == "regression":
        raise InputError("model.loss", f"{loss.name} needs classes as targets, but this is {data.task}")
    model = FinalModel(with_dense_gradients(network), loss, measurement, accept_poor=True)  # not trained yet
    if data.task == "classification":
        outputs = tried(model, data.train[:1])
        if outputs.ndim != 2 or outputs.shape[1] < data.outputs:
            shape = tuple(outputs.shape[1:])
            raise InputError(
                "model.network",
                f"does not fit the data set {data.name}: outputs of shape {shape} for {data.outputs} classes",
            )
    if data.validation is not None:
        data.validation = admit(model, data.validation, data.test)[0]
    data.train, data.test = admit(model, data.train, data.test)


def build_loss(name: Any, key: str, known: Mapping[str, Loss] = LOSSES) -> Loss:
    """Return a per-instance loss by its configured name, dotted path, or ``_target_``."""
    if OmegaConf.is_config(name):
        return Loss.of(build(name, key))
    if name in known:
        return known[name]
    if "." in str(name):
        loss = imported(name, key)
        if isinstance(loss, type):
            hint = f"'{key}={{_target_: {name}, reduction: none}}' makes one"
            raise InputError(key, f"{name} is a class, not a function of outputs and targets; {hint}")
        return Loss.of(loss)
    raise InputError(key, f"expected one of {', '.join(known)} or a dotted path but got {name!r}")


def build_measurement(name: Any) -> Loss | None:
    """Return what is explained on test instances; None for the loss."""
    return None if name is None else build_loss(name, "model.measurement", MEASUREMENTS)


def build_final_model(module: FinalModelModule, config: DictConfig) -> FinalModel:
    """Freeze a module as the final model, with the configured measurement and trainable parameters."""
    return FinalModel(
        module.network,
        module.loss,
        build_measurement(config.model.measurement),
        tuple(config.model.trainable),
        config.model.accept_poor,
    )


AUDIT_FIELDS = ("top", "q", "verify", "minutes", "seeds", "controls", "certain_labels", "act")
"""Settings of an audit that are keys under ``audit``, with the same names."""


def build_protocol(config: DictConfig) -> Protocol:
    """Build the protocol of further training."""
    node = config.further_training
    values: dict[str, Any] = {name: node[name] for name in PROTOCOL_FIELDS}
    for name in ("epochs", "steps"):
        values[name] = scaled(values[name], config.scale)
    values["betas"] = tuple(values["betas"])
    return Protocol(**values)


def build_methods(config: DictConfig) -> dict[str, AttributionMethod]:
    """Build every configured method by name.

    Raises:
        InputError: naming ``methods.NAME``, or the setting below it that the method refused.
    """
    methods = {}
    for name, node in config.methods.items():
        try:
            method = build(node, f"methods.{name}")
        except InputError as error:
            known = {*node, *(argument_names(str(node.get("_target_"))) or ())}
            if error.key.partition(".")[0] not in known:
                raise
            raise InputError(f"methods.{name}.{error.key}", error.problem) from None
        if not isinstance(method, AttributionMethod):
            raise InputError(
                f"methods.{name}", f"expected an AttributionMethod but got {type(method).__name__}"
            )
        methods[str(name)] = method
    return methods


def build_tasks(config: DictConfig, run: Judged) -> dict[str, Task]:
    """Build every configured task by name, and check that it applies.

    Args:
        run: with an untrained final model.

    Raises:
        InputError: naming the key under ``evaluation.tasks`` at fault.
    """
    tasks = {}
    for name, node in (config.evaluation.tasks or {}).items():
        task = build(node, f"evaluation.tasks.{name}", _convert_="all")
        if not isinstance(task, Task):
            raise InputError(f"evaluation.tasks.{name}", f"expected a Task but got {type(task).__name__}")
        task.check(run)
        tasks[str(name)] = task
    return tasks


def check_evaluation(config: DictConfig, seeds: int) -> None:
    """Refuse unknown metrics and numbers of seeds that there are not.

    Raises:
        InputError: naming the key of ``evaluation`` at fault.
    """
    for metric in config.evaluation.metrics:
        if metric not in METRICS:
            raise InputError(
                "evaluation.metrics", f"expected some of {', '.join(METRICS)} but got {metric!r}"
            )
    if not config.evaluation.metrics:
        raise InputError("evaluation.metrics", f"expected some of {', '.join(METRICS)} but got none")
    for count in config.evaluation.seed_counts or []:
        if not 1 <= count <= seeds:
            raise InputError("evaluation.seed_counts", f"expected numbers from 1 to {seeds} but got {count}")
    if config.evaluation.bootstrap < 0:
        raise InputError("evaluation.bootstrap", f"expected at least 0 but got {config.evaluation.bootstrap}")


def scaled(number: Any, scale: float, least: int = 1) -> Any:
    """Return a number times ``scale``, rounded, at least ``least``; lists and None as they are."""
    if scale == 1 or not isinstance(number, int) or isinstance(number, bool):
        return number
    return max(min(least, number), round(number * scale))
