"""The layer of a language model whose outputs are the logits of all tokens, by far its largest tensors.

Where it isn't trained, what is needed of them is made a few tokens at a time from what enters the layer
(:class:`~fimo.models.class_losses.LanguageModelling`), and the network is run as far as there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.models.class_losses import LanguageModelling
from fimo.models.final_model import FinalModel, apply


class NotReachedError(Exception):
    """A layer was not called."""


class _Reached(Exception):  # noqa: N818, as nothing is wrong
    """Ends a forward pass with what enters a layer."""

    def __init__(self, entering: Tensor) -> None:
        super().__init__()
        self.entering = entering


def entering(layer: nn.Module, call: Callable[[], object]) -> Tensor:
    """Return what enters a layer in a call of its network, which ends there.

    Raises:
        NotReachedError: the layer was not called.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            raise _Reached(args[0])

    handle = layer.register_forward_pre_hook(hook)
    try:
        call()
    except _Reached as reached:
        return reached.entering
    finally:
        handle.remove()
    raise NotReachedError(type(layer).__name__)


def vocabulary_of(final_model: FinalModel, probe: Instances) -> str | None:
    """Return the name of the frozen linear layer whose outputs are a language model's; None for none.

    Args:
        probe: some instances.
    """
    if not isinstance(final_model.loss, LanguageModelling):
        return None
    network, trained = final_model.network, final_model.parameters().keys()
    moved = {id(p) for name, p in network.named_parameters() if name in trained}
    linear = {
        module: name
        for name, module in network.named_modules()
        if type(module) is nn.Linear and not module._forward_hooks and "forward" not in vars(module)
    }
    calls: list[tuple[nn.Module, bool, Tensor, int]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tokens = len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 3
        calls.append((module, tokens, output, output._version))

    handles = [module.register_forward_hook(hook) for module in linear]
    try:
        with torch.no_grad():
            outputs = apply(network, probe.inputs)
    finally:
        for handle in handles:
            handle.remove()
    # the very tensor, unchanged: what clamps logits may leave those of some instances as they are
    made = [(m, tokens) for m, tokens, y, version in calls if y is outputs and y._version == version]
    if len(made) != 1 or not made[0][1] or sum(m is made[0][0] for m, *_ in calls) != 1:
        return None
    layer = made[0][0]
    assert isinstance(layer, nn.Linear)
    return None if any(id(p) in moved for p in layer.parameters()) else linear[layer]
