"""What a further-training result depends on, as a key of the store."""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any

from torch import nn

from fimo.data.instances import Instances
from fimo.further_training.protocol import Protocol
from fimo.models.final_model import FinalModel
from fimo.models.losses import LOSSES, Loss, loss_name
from fimo.store import content_hash


def describe(
    final_model: FinalModel, train: Instances, test: Instances, protocol: Protocol
) -> dict[str, Any]:
    """Return the description of a job: data, checkpoint, network, losses and protocol."""
    return {**describe_problem(final_model, train, test), "protocol": protocol.key()}


def describe_problem(final_model: FinalModel, train: Instances, test: Instances) -> dict[str, Any]:
    """Return the description of data, checkpoint, network and losses.

    Networks and losses of the user's own are described by their source, so that editing them is a new key.
    """
    return {
        "state": content_hash(final_model.state()),
        "network": describe_network(final_model.network),
        "trainable": sorted(final_model.parameters()),
        "loss": describe_loss(final_model.loss),
        "measurement": describe_loss(final_model.measurement or final_model.loss),
        "train": content_hash(train.tensors()),
        "test": content_hash(test.tensors()),
    }


def describe_network(network: nn.Module) -> str:
    """Return a hash of a network's structure, and of its modules' source where it is not torch's own."""
    digest = hashlib.sha256(repr(network).encode())
    for kind in sorted(
        {type(m) for m in network.modules()}, key=lambda t: f"{t.__module__}.{t.__qualname__}"
    ):
        digest.update(f"{kind.__module__}.{kind.__qualname__};".encode())
        if not kind.__module__.startswith("torch."):
            digest.update(_source(kind).encode())
    return digest.hexdigest()[:24]


def describe_loss(loss: Loss) -> str:
    """Return the name of a loss, with a hash of its code and arguments if it is the user's own."""
    if any(loss is known for known in LOSSES.values()):
        return loss_name(loss)
    digest = hashlib.sha256(_source(loss).encode()).hexdigest()[:24]
    return f"{loss_name(loss)}:{digest}"


def _source(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        return f"{_source(thing.func)}{thing.args!r}{sorted(thing.keywords.items())!r}"
    closure = getattr(thing, "__closure__", None) or ()
    cells = [repr(cell.cell_contents) for cell in closure] + [repr(getattr(thing, "__defaults__", None))]
    code = getattr(thing, "__code__", None)
    if code is not None:  # two functions on one line have the same source
        cells.append(
            f"{code.co_code!r}{code.co_names!r}{[c for c in code.co_consts if not inspect.iscode(c)]!r}"
        )
    try:
        return inspect.getsource(thing) + "".join(cells)
    except (OSError, TypeError):
        return "".join(cells) if code is not None else repr(thing)
