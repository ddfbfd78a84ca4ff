"""Which stacked network runs a final model: the fastest that can."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.leave_out import Batch
from fimo.engine.linear import LinearNetwork
from fimo.engine.stacked import FunctionalNetwork, StackedNetwork
from fimo.models.attention import plain_attention
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.frozen import moved
from fimo.models.linear_layers import layers_on
from fimo.models.returned import CalledOnce, frozen_modules
from fimo.models.rounding import alike, tolerance_of
from fimo.models.train_mode import TrainMode
from fimo.models.vocabulary import vocabulary_of

log = logging.getLogger(__name__)

Engine = Literal["linear", "functional", "loop"]


def stack_network(
    final_model: FinalModel,
    replicas: int,
    evaluation_model: FinalModel,
    engine: Engine,
    mode: TrainMode,
    autocast: torch.dtype | None = None,
    once: Collection[str] = (),
    micro_batch_size: int | None = None,
    vocabulary: str | None = None,
) -> StackedNetwork:
    """Return the stacked network of an engine."""
    if engine == "linear":
        return LinearNetwork(final_model, replicas, evaluation_model)
    vectorise = engine == "functional"
    return FunctionalNetwork(
        final_model, replicas, evaluation_model, mode, vectorise, autocast, once, micro_batch_size, vocabulary
    )


def choose_engine(
    final_model: FinalModel, train: Instances, mode: TrainMode, autocast: torch.dtype | None = None
) -> Engine:
    """Return the fastest engine that can run a network: ``linear``, else ``functional``, else ``loop``.

    Whether ``torch.func`` can vectorise it, and gives what single runs do, is tried on two replicas and two
    instances.
    """
    if autocast is None and is_linear(final_model, train):
        return "linear"
    dtype, device = next(iter(final_model.parameters().values())).dtype, train.targets.device
    weight = torch.tensor([[1.0, 0.5], [0.25, 1.0]], dtype=dtype, device=device)
    index = torch.arange(2, device=device).clamp(max=len(train) - 1).expand(2, 2)
    other = moved(final_model.parameters())

    def tried(vectorise: bool) -> list[Tensor]:
        probe = FunctionalNetwork(final_model, 2, final_model, mode, vectorise, autocast)
        for name, value in other.items():
            probe.parameters[name][1] = value
        probe.differentiate(train, Batch(index, weight), 0)
        with torch.no_grad():
            return [*probe.gradients.values(), probe.outputs(probe.parameters, train[:2].inputs)]

    try:
        together = tried(vectorise=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("replicas run one by one: torch.func can't vectorise this network (%s)", reason)
        return "loop"
    if not alike(together, tried(vectorise=False), tolerance_of(dtype, device, autocast)):
        log.warning("replicas run one by one: torch.func gives other gradients or outputs than single runs")
        return "loop"
    return "functional"


@torch.no_grad()
def called_once(final_model: FinalModel, train: Instances, mode: TrainMode) -> tuple[str, ...]:
    """Return the frozen modules that a seed's replicas share in a step, where dropout makes steps differ.

    None where a step draws other random numbers than masks, or where a trial shows a difference: with other
    values of the trained parameters, in outputs or in the masks that are drawn next.
    """
    if not mode.only_masks or len(final_model.parameters()) == len(list(final_model.network.parameters())):
        return ()
    two, device = train[:2].inputs, train.targets.device
    parameters = moved(final_model.parameters())
    network = mode.set(duplicate(final_model.network))
    states: list[Tensor] = []
    try:
        with plain_attention():
            with mode.drawing(0, device):
                modules = frozen_modules(network, final_model.parameters(), two)
            if not modules:
                return ()
            with mode.drawing(0, device):
                once = CalledOnce(network, modules, two)
            with mode.drawing(1, device) as drawing:
                whole = functional_apply(network, parameters, two)
                states.append(drawing.generator.get_state())  # type: ignore[attr-defined]
            with mode.drawing(1, device) as drawing:
                rest = once.hand_over(once.call(two))
                parts = functional_apply(rest, parameters, two)
                states.append(drawing.generator.get_state())  # type: ignore[attr-defined]
    except Exception as error:  # code between modules that looks at them
        log.info("replicas don't share the frozen part (%s)", type(error).__name__)
        return ()
    return modules if torch.equal(whole, parts) and torch.equal(*states) else ()


def frozen_vocabulary(final_model: FinalModel, train: Instances, mode: TrainMode) -> str | None:
    """Return the name of a language model's frozen last layer, before which gradients and losses are made.

    None where there is none, or where a trial on two instances shows a difference.
    """
    name = vocabulary_of(final_model, train[:2])
    if name is None:
        return None
    dtype, device = next(iter(final_model.parameters().values())).dtype, train.targets.device
    index = torch.arange(2, device=device).clamp(max=len(train) - 1)[None]
    batch = Batch(index, torch.tensor([[1.0, 0.5]], dtype=dtype, device=device))
    found: list[list[Tensor]] = []
    for vocabulary in (None, name):
        probe = FunctionalNetwork(final_model, 1, final_model, mode, False, vocabulary=vocabulary)
        probe.differentiate(train, batch, 0)
        with torch.no_grad():
            found.append([*probe.gradients.values(), probe.test_losses(train[:2], loss=final_model.loss)])
    plain, parts = found
    return name if alike(parts, plain, tolerance_of(dtype, device)) else None


def is_linear(final_model: FinalModel, train: Instances) -> bool:
    """Return whether a network is one of linear layers, all trained, that the ``linear`` engine runs."""
    if len(final_model.parameters()) < len(list(final_model.network.parameters())):
        return False  # some are frozen
    inputs = train.inputs
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return False
    return layers_on(final_model, train) is not None
