"""Whether a loss counts outputs of positions at which a Hugging Face network's attention sees no token.

These are a causal model's positions before an instance's first token, where padding is on the left. What
attention gives there differs between kernels: FinalModel computes in the plain one, which has all
derivatives, so that such outputs would be those of another network than the user's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.data.instances import IGNORED, Instances
from fimo.errors import InputError
from fimo.models.adapted import Adapted
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss

TRIED = 4
"""Instances on which a loss of the user's own is tried."""


def check_seen(model: FinalModel, loss: Loss, instances: Instances, outputs: Tensor, key: str) -> None:
    """Refuse instances with outputs that count, and that are others than those of the user's own network.

    Args:
        outputs: of some instances.
        key: of the instances.
    """
    network = model.network
    if not isinstance(network, Adapted) or network.replaced_attention is None:
        return
    mask = instances.inputs.get("attention_mask") if isinstance(instances.inputs, dict) else None
    if mask is None or mask.ndim != 2:
        return
    unseen = _unseen(network, mask != 0)
    by_position = outputs.ndim > 2 and outputs.shape[1] == mask.shape[1]
    if by_position:
        if instances.targets.shape == mask.shape:
            unseen = unseen & (instances.targets != IGNORED)
        rows = unseen.any(1)
        if loss.targets != "tokens":
            rows = _weighed(loss, instances, outputs, unseen, rows.nonzero()[:TRIED, 0])
    else:
        rows = (mask == 0).all(1)
    if not rows.any():
        return
    row = int(rows.nonzero()[0, 0])
    where = f" at position {int(unseen[row].nonzero()[0, 0])}" if by_position else ""
    remedy = "set the target to -100 or pad on the right" if by_position else "leave it out"
    raise InputError(
        key,
        f"instance {row} has a loss{where}, but by its attention_mask attention sees no token there: the "
        f"network's {network.replaced_attention} attention then differs from the plain one that is computed "
        f"with; {remedy}, or load the network with attn_implementation='eager'",
    )


def _unseen(network: Adapted, mask: Tensor) -> Tensor:
    """Return at which positions ``[n, T]`` no token of a mask ``[n, T]`` is seen."""
    config = getattr(network.network, "config", None)
    causal = any(getattr(module, "is_causal", False) for module in network.modules())
    if not causal or getattr(config, "is_encoder_decoder", False):
        return ~mask.any(1, keepdim=True).expand_as(mask)
    seen = mask.cumsum(1)
    if window := getattr(config, "sliding_window", None):
        seen = seen - torch.nn.functional.pad(seen, (window, 0))[:, : seen.shape[1]]
    return seen == 0


def _weighed(loss: Loss, instances: Instances, outputs: Tensor, unseen: Tensor, rows: Tensor) -> Tensor:
    """Return which instances ``[n]`` of some have a loss that depends on outputs at ``unseen`` positions."""
    found = torch.zeros(len(unseen), dtype=torch.bool, device=unseen.device)
    if not len(rows):
        return found
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(rows), *outputs.shape[1:], generator=generator).to(outputs)
    with torch.enable_grad():
        total = loss(values.requires_grad_(), instances.targets[rows]).sum()
        (gradient,) = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
    found[rows] = (gradient.flatten(2).ne(0).any(2) & unseen[rows]).any(1)
    return found
