"""What enters and leaves a network's modules: the second moments of K-FAC's factors, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import FactoredRows, Rows
from fimo.data.instances import IGNORED, Instances
from fimo.errors import InputError
from fimo.models.attention import plain_attention
from fimo.models.final_model import apply
from fimo.models.loss_function import Loss


@dataclass
class Moments:
    """The factors of one module.

    Args:
        names: its trainable parameters: weight, bias, or both.
        entering: ``[in (+ 1), in (+ 1)]``, mean over instances and positions; ``[V]`` for an embedding.
        leaving: ``[out, out]``, summed over positions, mean over instances.
        transposed: the weight is ``[in, out]``, as in GPT-2's linear layers.
    """

    names: tuple[str, ...]
    entering: Tensor
    leaving: Tensor
    transposed: bool = False


def layer_moments(
    gradients: InstanceGradients, train: Instances, rows: Rows, fisher: str, samples: int, seed: int
) -> list[Moments]:
    """Return the factors of every linear, convolutional and embedding module with trainable parameters.

    A module whose parameters are used elsewhere too (tied weights) is represented by its own use; one that is
    never called (functional use of its weights) is left out.

    Raises:
        InputError: a factor is not finite.
    """
    if isinstance(rows, FactoredRows):
        found = [_of_factors(rows, k) for k in range(len(rows.layers))]
    else:
        found = _by_hooks(gradients, train, fisher, samples, seed)
    for m in found:
        if not (m.entering.isfinite().all() and m.leaving.isfinite().all()):
            raise InputError("model", f"activations or gradients at {m.names[0]} are not finite")
    return found


def _of_factors(rows: FactoredRows, k: int) -> Moments:
    layer = rows.layers[k]
    parts = [layer.entering] if layer.weight else []
    parts += [torch.ones_like(layer.entering[:, :1])] if layer.bias else []
    a, delta = torch.cat(parts, 1), layer.delta.flatten(0, 1)
    names = tuple(name for name in (layer.weight, layer.bias) if name)
    return Moments(names, a.T @ a / rows.n, delta.T @ delta / rows.n)


def _by_hooks(
    gradients: InstanceGradients, train: Instances, fisher: str, samples: int, seed: int
) -> list[Moments]:
    loss, network = gradients.final_model.loss, gradients.final_model.network
    generator = torch.Generator(gradients.device).manual_seed(seed)
    modules = _supported(gradients)
    entering: dict[nn.Module, Tensor] = {}
    leaving: dict[nn.Module, Tensor] = {}
    positions: dict[nn.Module, int] = {}
    for batch in train.batches(64):
        mask = tokens_of(batch, loss)
        with _recorded(list(modules), len(batch)) as calls, plain_attention(), torch.enable_grad():
            outputs = apply(network, batch.inputs)
        at = outputs.detach()
        if fisher == "exact":
            cotangents = loss.hessian_root(at, batch.targets)
        elif fisher == "sampled":
            cotangents = loss.sampled_gradients(at, batch.targets, samples, generator)
        else:
            cotangents = loss.gradient(at, batch.targets)[:, None]
        for module, x, _ in calls:
            a, count = _second_moment_entering(module, x, modules[module], mask)
            entering[module] = a if module not in entering else entering[module] + a
            positions[module] = positions.get(module, 0) + count
        for r in range(cotangents.shape[1] if calls else 0):
            found = torch.autograd.grad(
                outputs, [y for _, _, y in calls], cotangents[:, r], retain_graph=True, allow_unused=True
            )
            for (module, _, y), g in zip(calls, found, strict=True):
                delta = _instances_last(module, torch.zeros_like(y) if g is None else g)
                b = delta.T @ delta
                leaving[module] = b if module not in leaving else leaving[module] + b
    return [
        Moments(names, entering[m] / max(1, positions[m]), leaving[m] / len(train), is_transposed(m))
        for m, names in modules.items()
        if m in entering
    ]


def tokens_of(batch: Instances, loss: Loss) -> Tensor | None:
    """Return which positions ``[n, T]`` are tokens and no padding, 1 or true; None where all are.

    By the attention mask; in a language model's data without one, all up to the last token that is predicted.
    """
    if isinstance(batch.inputs, dict) and "attention_mask" in batch.inputs:
        return batch.inputs["attention_mask"]
    if loss.targets != "tokens":
        return None
    return (batch.targets != IGNORED).flip(1).cumsum(1).flip(1) > 0


def _supported(gradients: InstanceGradients) -> dict[nn.Module, tuple[str, ...]]:
    """Return the modules in Kronecker form with the names of their trainable parameters, each name once."""
    names = {id(gradients.final_model.network.get_parameter(n)): n for n in gradients.shapes}
    claimed: set[str] = set()
    found: dict[nn.Module, tuple[str, ...]] = {}
    for module in gradients.final_model.network.modules():
        plain_convolution = (
            type(module) in (nn.Conv1d, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if type(module) in (nn.Linear, nn.Embedding) or is_transposed(module) or plain_convolution:
            parameters = [getattr(module, "weight", None), getattr(module, "bias", None)]
            own = tuple(names[id(p)] for p in parameters if p is not None and id(p) in names)
            if own and not claimed & set(own):
                found[module] = own
                claimed |= set(own)
    return found


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer, with a weight ``[in, out]``; without importing it."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


@contextlib.contextmanager
def _recorded(modules: list[nn.Module], n: int) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Record (module, input, output) of each call; outputs stay in the graph, hooks are removed.

    Args:
        n: instances of a call.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if isinstance(module, nn.Embedding) and len(output) == 1 < n:  # of positions: alike in all instances
            x, output = (t.expand(n, *t.shape[1:]) for t in (x, output))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        calls.append((module, x, output))
        return output.clone()  # an in-place activation then changes the clone

    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _second_moment_entering(
    module: nn.Module, x: Tensor, names: tuple[str, ...], mask: Tensor | None
) -> tuple[Tensor, int]:
    """Return the sum over instances and positions of a a^T (a diagonal for embeddings), and their number."""
    if isinstance(module, nn.Embedding):
        ids = x[mask.bool()] if mask is not None and mask.shape == x.shape else x.flatten()
        counts = torch.bincount(ids, minlength=module.num_embeddings).to(module.weight.dtype)
        return counts, ids.numel()
    if isinstance(module, nn.Conv1d):
        x = F.unfold(
            x[:, :, None],
            (1, module.kernel_size[0]),
            (1, module.dilation[0]),
            (0, int(module.padding[0])),
            (1, module.stride[0]),
        ).transpose(1, 2)
    elif isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    if (
        mask is not None
        and (isinstance(module, nn.Linear) or is_transposed(module))
        and x.shape[:-1] == mask.shape
    ):
        flat = x[mask.bool()]
    else:
        flat = x.reshape(-1, x.shape[-1])
    weight = any(n.endswith("weight") for n in names)
    bias = any(n.endswith("bias") for n in names)
    parts = [flat] if weight else []
    parts += [torch.ones_like(flat[:, :1])] if bias else []
    a = torch.cat(parts, 1)
    return a.T @ a, len(a)


def _instances_last(module: nn.Module, delta: Tensor) -> Tensor:
    """Return derivatives in a module's output as ``[positions, out]``."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return delta.flatten(2).transpose(1, 2).flatten(0, 1)
    return delta.reshape(-1, delta.shape[-1])
