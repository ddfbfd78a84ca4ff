"""Models of libraries as they are: Hugging Face's networks, and modules of Lightning."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fimo.errors import InputError, shortened
from fimo.models.adapted import Adapted
from fimo.models.loss_function import LossFunction

CRITERIA = {
    "CrossEntropyLoss": "cross_entropy",
    "MSELoss": "mse",
    "BCEWithLogitsLoss": "binary_cross_entropy",
}
"""torch's losses, by class, and what the same is called here."""


def is_hugging_face(network: object) -> bool:
    """Return whether a network is one of the transformers library, without importing it."""
    return _descends(network, "PreTrainedModel", "transformers")


def is_lightning(network: object) -> bool:
    """Return whether a network is a LightningModule, without importing Lightning."""
    return _descends(network, "LightningModule", "pytorch_lightning", "lightning")


def accepted(
    network: nn.Module, loss: LossFunction | str | None
) -> tuple[nn.Module, LossFunction | str | None]:
    """Return a network whose outputs are a tensor, and its loss where its head says which.

    - A Hugging Face network is wrapped: its outputs are its ``logits``.
    - A LightningModule is used through its ``forward``.
    - What ``DataParallel`` or ``DistributedDataParallel`` wraps is used without it.

    Raises:
        InputError: the loss isn't given, and can't be told from the network; or the network is one of
            TorchScript, or has no values yet, as lazy layers.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"holds one, {name}" if name else "is one"
            said = f"expected no ScriptModule but it {which}; pass the module that it was compiled from"
            raise InputError("model.network", said)
    if lazy := [name for name, p in network.named_parameters() if is_lazy(p)]:
        raise InputError("model.network", f"{shortened(lazy)} have no values yet: call it on a batch first")
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return accepted(network.module, loss)
    if is_hugging_face(network):
        arguments = {"return_dict": True}
        if type(network).__name__.endswith("ForCausalLM"):
            arguments["use_cache"] = False
        return Adapted(network, "logits", arguments), loss if loss is not None else _loss_of_head(network)
    if is_lightning(network) and loss is None:
        raise InputError("model.loss", _of_lightning(network))
    return network, loss


def _loss_of_head(network: nn.Module) -> str:
    name, config = type(network).__name__, getattr(network, "config", None)
    if name.endswith("ForSequenceClassification"):
        kind = getattr(config, "problem_type", None)
        if kind == "regression" or (kind is None and getattr(config, "num_labels", 2) == 1):
            return "mse"
        return "binary_cross_entropy" if kind == "multi_label_classification" else "cross_entropy"
    if name.endswith("ForImageClassification"):
        return "cross_entropy"
    if name.endswith("ForCausalLM"):
        raise InputError(
            "model.loss",
            f"{name} computes its own loss of shifted labels; pass loss='language_modelling' and targets "
            "[n, T] that are shifted already: targets[:, t] follows input t, -100 where none counts",
        )
    raise InputError("model.loss", f"can't be told from {name}; pass loss=(outputs.logits, targets) -> [n]")


def _of_lightning(network: nn.Module) -> str:
    said = (
        f"{type(network).__name__}.training_step gives one number for a batch, and what is needed is one for "
        "each instance: pass loss=(outputs of forward, targets) -> [n]"
    )
    for name, module in network.named_children():
        if known := CRITERIA.get(type(module).__name__):
            return f"{said}; with its {name}={type(module).__name__}() that is loss={known!r}"
    return said


def _descends(value: object, name: str, *packages: str) -> bool:
    return any(c.__name__ == name and c.__module__.split(".")[0] in packages for c in type(value).__mro__)
