"""Whether a network's backward pass calls parts of its forward pass again: it is tried.

Such calls (``torch.utils.checkpoint``) come when a transform of ``torch.func``, or parameters that were put
in the place of the network's own, are gone: they end in an error deep inside, or are of other parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from fimo.data.instances import Inputs
from fimo.models.copied import duplicate
from fimo.models.final_model import FinalModel, apply
from fimo.models.train_mode import TrainMode, seeded

PROBLEM = (
    "calls parts of its forward pass again in the backward pass (torch.utils.checkpoint, or other hooks of "
    "saved tensors), which replicas and gradients of single instances can't follow; switch that off in the "
    "network: it saves memory and changes no value"
)


def recomputes(final_model: FinalModel, inputs: Inputs) -> bool:
    """Return whether a forward pass, in eval or in train mode, leaves parts to be computed again.

    Args:
        inputs: of a few instances; a network that fails on them is left to other checks.
    """
    evaluated = duplicate(final_model.network)
    return _recomputes(evaluated, inputs) or _recomputes(TrainMode().set(evaluated), inputs)


def _recomputes(network: nn.Module, inputs: Inputs) -> bool:
    """Try a network in its present mode; its parameters are made to require gradients."""
    floating = [p.requires_grad_() for p in network.parameters() if p.is_floating_point()]
    device = next((p.device for p in floating), torch.device("cpu"))
    try:
        with torch.enable_grad(), seeded(0, device), disable_saved_tensors_hooks(PROBLEM):
            outputs = apply(network, _free(inputs))
    except Exception as error:  # whatever a network raises
        return PROBLEM in str(error)
    return isinstance(outputs, Tensor) and "CheckpointFunctionBackward" in _operations(outputs)


def _free(inputs: Inputs) -> Inputs:
    def free(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor

    return {name: free(t) for name, t in inputs.items()} if isinstance(inputs, dict) else free(inputs)


def _operations(outputs: Tensor) -> set[str]:
    """Return the names of the operations that a tensor was computed by."""
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}
