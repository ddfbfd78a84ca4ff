"""Copies of a user's network that all derivatives can be taken of."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from fimo.errors import InputError, reason
from fimo.models.attention import vectorised_masks

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


def copied(network: nn.Module) -> nn.Module:
    """Return a copy of a network that computes the same (to rounding), with derivatives of every order.

    - Gradients of embeddings are dense: the same numbers, which can be stacked and multiplied.
    - A LightningModule's Trainer stays behind.
    - Hugging Face's gradient checkpointing is switched off: the same numbers, in more memory.
    - Hooks of modules' backward passes stay behind: gradients are those of the loss.
    - Hugging Face's attention masks can be vectorised, see :func:`~fimo.models.attention.vectorised_masks`.
    - GPT-2's activation is torch's one operation for it instead of eight.
    - Hard sigmoid and bags of embeddings, whose derivatives torch can't differentiate, are written out.
    - PReLU is written out: ``vmap`` over instances and vectors of its derivative mixes these up.
    - Weight normalisation is written out: torch's fused operation has no forward derivative, and its second
      derivatives take the norm as constant, which makes them wrong (a Hessian that is not symmetric).
    """
    trainers = {id(t): None for m in network.modules() if (t := vars(m).get("_trainer")) is not None}
    try:
        found = duplicate(network, trainers)
    except Exception as error:  # whatever a user's module holds
        raise InputError("model.network", f"can't be copied: {reason(error)}") from error
    vectorised_masks()
    for module in without_checkpointing(with_dense_gradients(found)).modules():
        if module._backward_hooks or module._backward_pre_hooks:
            log.warning("%s: hooks of its backward pass are left out", type(module).__name__)
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
            module._is_full_backward_hook = None
        if type(module) is parametrizations._WeightNorm:
            module.__class__ = _PlainWeightNorm
        if type(module) is nn.PReLU:
            module.__class__ = _PlainPReLU
        if type(module) is nn.Hardsigmoid:
            module.__class__ = _PlainHardsigmoid
        if type(module) is nn.EmbeddingBag:
            module.__class__ = _PlainEmbeddingBag
        if (
            type(module).__name__ == "NewGELUActivation"
            and type(module).__module__ == "transformers.activations"
        ):
            module.__class__, module.approximate = nn.GELU, "tanh"  # type: ignore[assignment]
        for hook in module._forward_pre_hooks.values():
            if type(hook) is WeightNorm:
                hook.__class__ = _PlainWeightNormHook
    return found


def duplicate(network: Network, memo: Mapping[int, Any] | None = None) -> Network:
    """Return a deep copy of a network.

    Tensors that hooks of modules have computed from parameters (pruning, ``torch.nn.utils.weight_norm``), and
    will compute again, are copied by value, which Python's copy refuses.

    Args:
        memo: copies by the ids of what they are copies of.
    """
    computed: dict[int, Any] = {}
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and (module._forward_pre_hooks or not value.is_leaf):
                computed[id(value)] = _by_value(value)
    return copy.deepcopy(network, computed | dict(memo or {}))


def _by_value(value: Tensor) -> Tensor:
    try:
        return value.detach().clone()
    except RuntimeError:  # of replicas that are gone
        return torch.empty(0)


def with_dense_gradients(network: nn.Module) -> nn.Module:
    """Switch off sparse gradients of embeddings, in place: the same numbers, in the form that others have."""
    for module in network.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    return network


def without_checkpointing(network: nn.Module) -> nn.Module:
    """Switch off Hugging Face's gradient checkpointing, in place: as if it had never been switched on.

    With it, the backward pass calls layers again, when ``torch.func``'s replicas or parameters are gone.
    """
    for module in network.modules():
        own = vars(module)
        if own.get("gradient_checkpointing") is True:
            if getattr(type(module), "gradient_checkpointing", None) is False:
                del own["gradient_checkpointing"]
            else:
                own["gradient_checkpointing"] = False
        own.pop("_gradient_checkpointing_func", None)
        # inputs of the first layer were made to require a gradient, which torch.func refuses
        if own.get("_require_grads_hooks") or own.get("_require_grads_hook") is not None:
            module.disable_input_require_grads()  # type: ignore[operator]
        for name in ("_require_grads_hooks", "_require_grads_hook"):
            own.pop(name, None)
    return network


def _normalised(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _PlainPReLU(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        slope = self.weight if x.ndim < 2 else self.weight.view(-1, *[1] * (x.ndim - 2))  # of the second axis
        return torch.where(x > 0, x, slope * x)


class _PlainHardsigmoid(nn.Hardsigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.hardtanh(input / 6 + 0.5, 0.0, 1.0)


class _PlainEmbeddingBag(nn.EmbeddingBag):
    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if input.ndim != 2 or self.max_norm is not None:
            return super().forward(input, offsets, per_sample_weights)
        rows = nn.functional.embedding(input, self.weight, self.padding_idx)  # [n, T, D]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[..., None]
        if self.padding_idx is None:
            return rows.amax(1) if self.mode == "max" else getattr(rows, self.mode)(1)
        there = (input != self.padding_idx)[..., None]
        if self.mode == "max":
            most = rows.masked_fill(~there, float("-inf")).amax(1)
            return most.masked_fill(~there.any(1), 0.0)
        total = (rows * there).sum(1)
        return total / there.sum(1).clamp(min=1) if self.mode == "mean" else total


class _PlainWeightNorm(parametrizations._WeightNorm):
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return _normalised(weight_v, weight_g, self.dim)


class _PlainWeightNormHook(WeightNorm):
    def compute_weight(self, module: nn.Module) -> Any:
        return _normalised(getattr(module, self.name + "_v"), getattr(module, self.name + "_g"), self.dim)
