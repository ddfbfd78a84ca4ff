"""What enters and leaves a network's modules: the second moments of K-FAC's factors, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.curvature.arranged_rows import calls_of
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import FactoredRows, Rows
from fimo.curvature.module_rows import ConvolutionCall, EmbeddingCall, LinearCall, ModuleRows
from fimo.curvature.recording import is_transposed, tokens_of
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.attention import plain_attention
from fimo.models.final_model import apply


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
    found = _of_rows(rows) or _by_hooks(gradients, train, fisher, samples, seed)
    for m in found:
        if not (m.entering.isfinite().all() and m.leaving.isfinite().all()):
            raise InputError("model", f"activations or gradients at {m.names[0]} are not finite")
    return found


def _add_factors(rows: FactoredRows, found: list[Moments], n: int) -> None:
    """Add the factors of some rows of a network of linear layers to those of others, of n instances."""
    for k, layer in enumerate(rows.layers):
        a, delta = layer.entering_all, layer.delta.flatten(0, 1)
        entering, leaving = a.T @ a / n, delta.T @ delta / n
        if k < len(found):
            found[k].entering += entering
            found[k].leaving += leaving
        else:
            found.append(Moments(layer.names, entering, leaving))


def _of_rows(rows: Rows) -> list[Moments] | None:
    """Return the factors of layers by what entered and left them, or None where rows don't say."""
    claimed: dict[str, int] = {}
    calls: dict[int, LinearCall | EmbeddingCall] = {}
    entering: dict[int, Tensor] = {}
    leaving: dict[int, Tensor] = {}
    positions: dict[int, int] = {}
    linear: list[Moments] = []
    for block in _parts(rows):
        if block is None:
            return None
        if isinstance(block, FactoredRows):
            for part in block.parts():
                _add_factors(part, linear, rows.n)
            continue
        made: dict[tuple[int, bool, bool], tuple[Tensor, int]] = {}  # layers may share what enters them
        for call in sorted(block.calls, key=lambda c: c.owner):
            grouped = isinstance(call, ConvolutionCall) and call.groups > 1
            if not isinstance(call, LinearCall | EmbeddingCall) or grouped:
                continue
            k = call.owner
            if any(claimed.setdefault(name, k) != k for name in call.names):
                continue  # tied: represented by the first module's use
            if isinstance(call, EmbeddingCall):
                a, count = _entering_table(call, block.mask)
            else:
                key = (call.entering.data_ptr(), bool(call.weight), bool(call.bias))
                if isinstance(call, ConvolutionCall) or key not in made:
                    made[key] = _entering_layer(call, block.mask)
                a, count = made[key]
            # what leaves a convolution has its positions last, and would be copied otherwise as well
            delta = call.delta.permute(3, 0, 1, 2).flatten(1)
            b = delta @ delta.T
            calls[k] = call
            entering[k] = entering[k] + a if k in entering else a
            leaving[k] = leaving[k].add_(b) if k in leaving else b
            positions[k] = positions.get(k, 0) + count
    return linear or [
        Moments(
            call.names, entering[k] / max(1, positions[k]), leaving[k] / rows.n,
            isinstance(call, LinearCall) and call.transposed,
        )
        for k, call in calls.items()
    ]  # fmt: skip


def _parts(rows: Rows) -> Iterator[FactoredRows | ModuleRows | None]:
    """Yield rows in parts by what enters and leaves layers; None for one that isn't."""
    for block in rows.blocks():
        yield from (block,) if isinstance(block, FactoredRows) else calls_of(block) or (None,)


def _entering_table(call: EmbeddingCall, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return how often each row of a table is looked up, and how often any is."""
    kept = _kept(call.index, mask)
    return torch.bincount(kept, minlength=call.size).to(call.delta.dtype), len(kept)


def _entering_layer(call: LinearCall, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return the sum over instances and positions of a a^T, and the number of positions."""
    flat = call.entries() if isinstance(call, ConvolutionCall) else _kept(call.positions(), mask).T
    count = flat.shape[1]
    if not call.weight:
        return flat.new_full((1, 1), count), count
    a = flat @ flat.T
    if call.bias:
        sums = flat.sum(1)
        a = torch.cat([torch.cat([a, sums[:, None]], 1), F.pad(sums, (0, 1), value=count)[None]])
    return a, count


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions ``[., ...]`` of values ``[n, T, ...]`` that are no padding."""
    t = values.shape[1]
    if mask is None or mask.shape[1] < t or bool(mask[:, t:].any()):
        return values.flatten(0, 1)
    return values[mask[:, :t]]


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
