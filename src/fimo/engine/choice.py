"""Which stacked network runs a final model: the fastest that can."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.leave_out import Batch
from fimo.engine.linear import LinearNetwork
from fimo.engine.stacked import FunctionalNetwork, StackedNetwork
from fimo.models.final_model import FinalModel
from fimo.models.linear_layers import layers_on
from fimo.models.train_mode import TrainMode

log = logging.getLogger(__name__)

Engine = Literal["linear", "functional", "loop"]


def stack_network(
    final_model: FinalModel,
    replicas: int,
    evaluation_model: FinalModel,
    engine: Engine,
    mode: TrainMode,
    autocast: torch.dtype | None = None,
) -> StackedNetwork:
    """Return the stacked network of an engine."""
    if engine == "linear":
        return LinearNetwork(final_model, replicas, evaluation_model)
    return FunctionalNetwork(final_model, replicas, evaluation_model, mode, engine == "functional", autocast)


def choose_engine(
    final_model: FinalModel, train: Instances, mode: TrainMode, autocast: torch.dtype | None = None
) -> Engine:
    """Return the fastest engine that can run a network: ``linear``, else ``functional``, else ``loop``.

    Whether ``torch.func`` can vectorise it is tried on two replicas and two instances.
    """
    if autocast is None and _is_linear(final_model, train):
        return "linear"
    dtype, device = next(iter(final_model.parameters().values())).dtype, train.targets.device
    weight = torch.ones(2, 2, dtype=dtype, device=device)
    index = torch.arange(2, device=device).clamp(max=len(train) - 1).expand(2, 2)
    probe = FunctionalNetwork(final_model, 2, final_model, mode, autocast=autocast)
    try:
        probe.differentiate(train, Batch(index, weight), 0)
        probe.outputs(probe.parameters, train[:2].inputs)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("replicas run one by one: torch.func can't vectorise this network (%s)", reason)
        return "loop"
    return "functional"


def _is_linear(final_model: FinalModel, train: Instances) -> bool:
    if len(final_model.parameters()) < len(list(final_model.network.parameters())):
        return False  # some are frozen
    inputs = train.inputs
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return False
    return layers_on(final_model, train) is not None
