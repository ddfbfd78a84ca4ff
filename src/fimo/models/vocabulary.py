"""The layer of a language model whose outputs are the logits of all tokens, by far its largest tensors.

Where it isn't trained, what is needed of them is made a few tokens at a time from what enters the layer
(:class:`~fimo.models.class_losses.LanguageModelling`), and the network is run as far as there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fimo.data.instances import Instances
from fimo.models.class_losses import LanguageModelling
from fimo.models.final_model import FinalModel, apply
from fimo.models.watched_layers import LOOKS


class NotReachedError(Exception):
    """A layer was not called, or its outputs are not the network's as they are."""


class _Untouched(TorchFunctionMode):
    """Watches that nothing is done with a tensor.

    Args:
        tensor: that stands for a layer's outputs.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in LOOKS:
            tree_map_only(Tensor, self._refuse, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _refuse(self, tensor: Tensor) -> None:
        if tensor is self.tensor:
            raise NotReachedError("something is done with the layer's outputs")


def entering(layer: nn.Linear, call: Callable[[], object]) -> Tensor:
    """Return what enters a layer in a call of its network, whose outputs are the layer's.

    The layer is not computed. Something without memory stands for its outputs, and the network has to return
    that as it is: what clamps logits, or looks at them, may leave those of other instances as they are.

    Raises:
        NotReachedError: the layer was not called once, or something else is returned.
    """
    thread, stack = threading.get_ident(), contextlib.ExitStack()
    passed: list[tuple[Tensor, Tensor]] = []  # what enters, and what stands for the outputs

    def stand_in(x: Tensor) -> Tensor:
        if threading.get_ident() != thread:
            return type(layer).forward(layer, x)
        if passed:
            raise NotReachedError("the layer is called twice")
        passed.append((x, x.new_zeros(()).expand(*x.shape[:-1], layer.out_features)))
        stack.enter_context(_Untouched(passed[0][1]))
        return passed[0][1]

    layer.forward = stand_in  # type: ignore[method-assign,assignment]
    try:
        with stack:
            outputs = call()
    finally:
        del layer.forward
    if not passed or outputs is not passed[0][1]:
        raise NotReachedError(f"{type(layer).__name__}'s outputs are not the network's")
    return passed[0][0]


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
    called: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, *_: called.append(module)) for m in linear]
    try:
        with torch.no_grad():
            apply(network, probe.inputs)
    finally:
        for handle in handles:
            handle.remove()
    last = called[-1] if called else None
    if not isinstance(last, nn.Linear) or any(id(p) in moved for p in last.parameters()):
        return None
    try:
        with torch.no_grad():
            x = entering(last, lambda: apply(network, probe.inputs))
    except NotReachedError:
        return None
    return linear[last] if x.ndim == 3 else None
