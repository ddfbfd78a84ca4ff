"""Recording what enters a network's modules and the derivatives in what leaves them, by hooks.

Whether hooks see all uses of a parameter, and each instance apart, can't be told from a network's modules. It
is tried instead: on a few instances, sums of the recorded derivatives with random weights are compared with
automatic differentiation, parameter by parameter; those that differ (weights used as numbers, modules of
another kind) are left to automatic differentiation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.curvature.jacobian import split
from fimo.curvature.module_rows import (
    Call,
    ConvolutionCall,
    EmbeddingCall,
    LinearCall,
    ModuleRows,
    norm_calls,
    normalised,
)
from fimo.data.instances import IGNORED, Instances
from fimo.models.attention import plain_attention
from fimo.models.class_losses import LanguageModelling
from fimo.models.final_model import FinalModel, apply, functional_apply
from fimo.models.loss_function import Loss
from fimo.models.row_order import RowMoves
from fimo.models.vocabulary import NotReachedError, entering, vocabulary_of

TRIED = 3
"""Instances of the comparison."""

Axis = Literal["instances", "shared"]
"""Whether what leaves a module has an axis of instances (or of parts of each, in turn), or is one for all."""


class UnseenError(Exception):
    """A module was called in a way whose derivatives are not each instance's."""


@dataclass(frozen=True)
class Recorder:
    """The modules of a final model whose derivatives have a known form.

    Args:
        final_model: in eval mode.
        modules: with (attribute, parameter) of those of their parameters that are recorded.
        axes: of what leaves each.
        bytes_each: of an instance's calls with one row.
        vocabulary: the frozen layer whose outputs are the logits of a language model; None: unknown or none.
        summed: calls that don't keep instances apart are recorded as one instance's, not refused: only sums
            over all instances are then right.
    """

    final_model: FinalModel
    modules: dict[nn.Module, tuple[tuple[str, str], ...]]
    axes: dict[nn.Module, Axis]
    bytes_each: float = 1.0
    vocabulary: nn.Linear | None = None
    summed: bool = False

    @property
    def names(self) -> set[str]:
        """The parameters that are recorded."""
        return {name for named in self.modules.values() for _, name in named}

    def losses(self, instances: Instances, loss: Loss) -> ModuleRows | None:
        """Return the rows of a loss without the logits of all tokens; None: by :meth:`rows` only."""
        layer = self.vocabulary
        if layer is None or not isinstance(loss, LanguageModelling):
            return None

        def cotangents(x: Tensor) -> Tensor:
            return loss.gradient_before(layer, x, instances.targets)[:, None]

        return self.rows(instances, cotangents, layer)

    def rows(
        self,
        instances: Instances,
        cotangents: Callable[[Tensor], Tensor],
        before: nn.Linear | None = None,
        trial: bool = False,
    ) -> ModuleRows:
        """Return the recorded parameters' rows, by one forward pass and a backward one for each of R.

        Args:
            cotangents: of the outputs, ``[n, R, ...]``.
            before: a layer whose outputs are the network's: the cotangents are those of what enters it.
            trial: the rows are compared with others, so that they may be wrong.

        Raises:
            UnseenError: see there.
            NotReachedError: the outputs of ``before`` are not the network's.
        """
        n = len(instances)
        network = self.final_model.network
        moves = RowMoves(network, instances.inputs)
        with self._recorded(n) as calls, moves, plain_attention(), torch.enable_grad():
            outputs = (
                apply(network, instances.inputs)
                if before is None
                else entering(before, lambda: apply(network, instances.inputs))
            )
        vectors = cotangents(outputs.detach())
        r = vectors.shape[1]
        leaving = [y for _, _, y in calls]
        counts = [n if _apart(module, x, y, n) else 1 for module, x, y in calls]
        shapes = [(m, r, *_instance_shape(y, m)) for y, m in zip(leaving, counts, strict=True)]
        # maybe each instance's in turn, or those that the network selected, or in its own order
        several = zip(calls, counts, strict=True) if n > 1 and not trial else ()
        tried = [
            k
            for k, ((_, x, _), m) in enumerate(several)
            if m == n and (moves.noted or (len(x) != n and not self.summed))
        ]
        # one row's derivatives are taken as they are, more are put in place
        deltas = [y.new_zeros(s) for y, s in zip(leaving, shapes, strict=True)] if r > 1 else []
        for k in range(r if calls and outputs.requires_grad else 0):
            found = torch.autograd.grad(
                outputs,
                leaving,
                vectors[:, k],
                retain_graph=k + 1 < r or bool(tried),
                materialize_grads=True,
                allow_unused=True,
            )
            if r == 1:
                deltas = [d.reshape(s) for d, s in zip(found, shapes, strict=True)]
            for into, d in zip(deltas, found if r > 1 else (), strict=False):
                into[:, k] = d.reshape(into[:, k].shape)
        deltas = deltas or [y.new_zeros(s) for y, s in zip(leaving, shapes, strict=True)]
        in_turn = True
        if tried and outputs.requires_grad:
            of_tried = [deltas[k][:, 0] for k in tried]
            in_turn = _in_turn(outputs, vectors[:, 0], [leaving[k] for k in tried], of_tried)
            if not (in_turn or self.summed):
                raise UnseenError("rows are not those of each instance in turn")
        made: list[Call] = []
        owners = {module: k for k, module in enumerate(self.modules)}
        for (module, x, _), delta, m in zip(calls, deltas, counts, strict=True):
            made += _calls_of(module, self.modules[module], owners[module], x, delta, m)
        if not made:
            raise UnseenError("no module was called")
        mask = tokens_of(instances, self.final_model.loss) if in_turn else None
        return ModuleRows(tuple(made), _shapes(self.final_model), None if mask is None else mask.bool())

    @contextlib.contextmanager
    def _recorded(self, n: int) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
        """Record (module, input, output) of each call in this thread; hooks are removed."""
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        thread = threading.get_ident()

        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            if threading.get_ident() != thread:
                return output
            x = _entering(args, named)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                raise UnseenError(f"{type(module).__name__} is not given one tensor")
            shared, one = self.axes.get(module) == "shared", len(x) == 1 or x.ndim == 1
            if shared and not one and not self.summed:
                raise UnseenError(f"{type(module).__name__} is called for all instances, and for each")
            if shared and one:
                x = x.reshape(1, -1).expand(n, -1)
                output = output.expand(n, *output.shape[1:] if len(output) == 1 else output.shape)
            elif not self.summed and not _apart(module, x, output, n):
                raise UnseenError(
                    f"{type(module).__name__} has outputs {list(output.shape)} of {n} instances"
                )
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            calls.append((module, x.detach(), output))
            return output.clone()  # an in-place activation then changes the clone

        # first, so that hooks of the network's own change what the module's output is used for
        handles = [m.register_forward_hook(hook, prepend=True, with_kwargs=True) for m in self.modules]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def _in_turn(outputs: Tensor, vectors: Tensor, leaving: Sequence[Tensor], deltas: Sequence[Tensor]) -> bool:
    """Return whether rows are each instance's in turn, not some that a network selected, or in another order.

    Each instance's derivatives are multiplied by another number once its cotangents are.

    Args:
        vectors: ``[n, ...]``, cotangents.
        leaving: what left modules.
        deltas: ``[n, ...]`` derivatives in these, as those of n instances.
    """
    n = len(vectors)
    each = torch.linspace(1, 2, n, dtype=vectors.dtype, device=vectors.device)
    scaled = vectors * each.view(n, *[1] * (vectors.ndim - 1))
    found = torch.autograd.grad(outputs, leaving, scaled, materialize_grads=True, allow_unused=True)
    for again, delta in zip(found, deltas, strict=True):
        expected = delta * each.view(n, *[1] * (delta.ndim - 1))
        difference = again.reshape(expected.shape) - expected
        if not difference.norm() <= torch.finfo(delta.dtype).eps ** 0.5 * expected.norm():
            return False
    return True


def recorder_for(final_model: FinalModel, instances: Instances) -> Recorder | None:
    """Return the recorder of a final model's modules, as tried on some instances; None for none."""
    modules = _modules(final_model)
    if not modules or not len(instances):
        return None
    probe = _unlike(instances)
    together, alone = (final_model.outputs(probe, size) for size in (len(probe), 1))
    if not (together - alone).norm() <= torch.finfo(together.dtype).eps ** 0.5 * alone.norm():
        return None  # what an instance's outputs are depends on others, or on which branch a batch takes
    try:
        axes = _axes(final_model, modules, probe)
        called = {m: own for m, own in modules.items() if m in axes}
        if not called:
            return None
        recorder = Recorder(final_model, called, axes)
        found, differing = _compared(recorder, probe)
    except (UnseenError, RuntimeError, ValueError, TypeError, IndexError):
        return None
    kept = {m: tuple((a, n) for a, n in own if n not in differing) for m, own in called.items()}
    kept = {m: own for m, own in kept.items() if own}
    if not kept:
        return None
    name = vocabulary_of(final_model, probe)
    vocabulary = None if name is None else final_model.network.get_submodule(name)
    assert vocabulary is None or isinstance(vocabulary, nn.Linear)
    recorder = Recorder(final_model, kept, axes, found.bytes / len(probe), vocabulary)
    if vocabulary is not None and not _same_losses(recorder, probe):
        return dataclasses.replace(recorder, vocabulary=None)
    return recorder


def _unlike(instances: Instances) -> Instances:
    """Return few instances to try, a long, a short and a middle one where they differ in that.

    A network that sorts instances by length then has them in another order.
    """
    some = instances[: 64 * TRIED]
    tensors = some.inputs.values() if isinstance(some.inputs, dict) else [some.inputs]
    filled = torch.stack([(t != 0).reshape(len(some), -1).sum(1) for t in tensors]).sum(0)
    order = filled.argsort(stable=True)
    if filled[order[0]] == filled[order[-1]]:
        return instances[[k % len(instances) for k in range(TRIED)]]
    return some[torch.stack([order[-1], order[0], order[len(order) // 2]])]


def recorder_of_sums(final_model: FinalModel, instances: Instances) -> Recorder | None:
    """Return the recorder of linear, convolutional and embedding modules, or None where there are none.

    Nothing is tried: their own calls are recorded, whatever else is made of their parameters, or of positions
    before instances.
    """
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    modules = {
        module: tuple((a, n) for a, n in own if a in ("weight", "bias"))  # weight normalisation has others
        for module, own in _modules(final_model).items()
        if isinstance(module, kinds) or is_transposed(module)
    }
    modules = {module: own for module, own in modules.items() if own}
    axes = _axes(final_model, modules, instances[:TRIED])
    return Recorder(final_model, modules, axes, summed=True) if modules else None


def _modules(final_model: FinalModel) -> dict[nn.Module, tuple[tuple[str, str], ...]]:
    """Return modules of known form, with (attribute, parameter) of their own trainable parameters."""
    trained = final_model.parameters()
    names = {id(p): n for n, p in final_model.network.named_parameters() if n in trained}
    found: dict[nn.Module, tuple[tuple[str, str], ...]] = {}
    for module in final_model.network.modules():
        own = tuple((a, names[id(p)]) for a, p in module.named_parameters(recurse=False) if id(p) in names)
        if own and _known(module):
            found[module] = own
    return found


def _known(module: nn.Module) -> bool:
    """Whether the derivatives of a module's own parameters have a known form."""
    if type(module) is nn.Linear or is_transposed(module):
        return True
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return module.padding_mode == "zeros"
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return type(module) in kinds and (not hasattr(module, "running_mean") or module.running_mean is not None)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer, with a weight ``[in, out]``; without importing it."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def _axes(
    final_model: FinalModel, modules: dict[nn.Module, tuple[tuple[str, str], ...]], probe: Instances
) -> dict[nn.Module, Axis]:
    """Return the axes of what leaves each module that is called for instances apart, or for all."""
    n = len(probe)
    found: dict[nn.Module, Axis] = {}
    others: set[nn.Module] = set()

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        x = _entering(args, named)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            others.add(module)
        elif isinstance(module, nn.Embedding) and (len(x) == 1 or (x.ndim == 1 and len(x) != n)):
            found[module] = "shared"
        elif _apart(module, x, output, n):
            found[module] = "instances"
        else:
            others.add(module)

    handles = [m.register_forward_hook(hook, prepend=True, with_kwargs=True) for m in modules]
    try:
        with torch.no_grad(), plain_attention():
            apply(final_model.network, probe.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {module: axis for module, axis in found.items() if module not in others}


def _entering(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return args[0] if args else named.get("input", named.get("x"))


def _apart(module: nn.Module, x: Tensor, output: Tensor, n: int) -> bool:
    """Whether the first axes of what enters and leaves a module may be n instances, or their parts."""
    if not len(x) or len(x) != len(output) or len(x) % n:
        return False
    if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm) or is_transposed(module):
        return True
    # channels are the second axis: parts of an instance would come before them
    return len(x) == n and x.ndim == output.ndim and x.ndim >= 2


def _compared(recorder: Recorder, probe: Instances) -> tuple[ModuleRows, set[str]]:
    """Return recorded rows of random cotangents, and the parameters of which automatic ones differ."""
    final_model = recorder.final_model
    generator = torch.Generator().manual_seed(0)
    cotangents: list[Tensor] = []

    def draw(outputs: Tensor) -> Tensor:
        drawn = torch.randn(outputs.shape, generator=generator).to(outputs)
        cotangents.append(drawn)
        return drawn[:, None]

    rows = recorder.rows(probe, draw, trial=True)
    weights = torch.randn(len(probe), generator=generator, dtype=torch.float64).to(rows.dtype).to(rows.device)
    ours = split(rows.transposed_times(weights[:, None, None])[:, 0], rows.shapes)
    parameters = {n: p.clone().requires_grad_() for n, p in final_model.parameters().items()}
    with torch.enable_grad(), plain_attention():
        tensors = {**final_model.buffers(), **parameters}
        outputs = functional_apply(final_model.network, tensors, probe.inputs)
        total = (outputs.flatten(1) * cotangents[0].flatten(1)).sum(1) @ weights
    theirs = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    tolerance = torch.finfo(rows.dtype).eps ** 0.5
    whole = torch.stack([g.norm() for g in theirs]).norm()
    differing = set()
    for (name, mine), other in zip(ours.items(), theirs, strict=True):
        bound = tolerance * (other.norm() + 0.01 * whole)
        if not (mine - other.flatten()).norm() <= bound:
            differing.add(name)
    return rows, differing


def _same_losses(recorder: Recorder, probe: Instances) -> bool:
    """Return whether a loss's rows without logits are those by way of them."""
    loss = recorder.final_model.loss
    plain = recorder.rows(probe, lambda outputs: loss.gradient(outputs, probe.targets)[:, None])
    try:
        short = recorder.losses(probe, loss)
    except (UnseenError, NotReachedError, RuntimeError, ValueError, TypeError, IndexError):
        return False
    assert short is not None
    weights = torch.tensor([1.0, -2.0, 3.0][: len(probe)], dtype=plain.dtype, device=plain.device)
    mine, theirs = (rows.transposed_times(weights[:, None, None]) for rows in (short, plain))
    return bool((mine - theirs).norm() <= torch.finfo(plain.dtype).eps ** 0.5 * theirs.norm())


def _calls_of(
    module: nn.Module, named: tuple[tuple[str, str], ...], owner: int, x: Tensor, delta: Tensor, n: int
) -> list[Call]:
    """Return the calls of a module's parameters.

    Args:
        named: (attribute, parameter) of those that are recorded.
        x: what entered, its first axis n instances or parts of them.
        delta: ``[n, R, ...]``, of what left.
    """
    attributes = dict(named)
    names = tuple(attributes.values())
    weight, bias = attributes.get("weight"), attributes.get("bias")
    x = x.reshape(n, *_instance_shape(x, n))
    if isinstance(module, nn.Embedding):
        flat = delta.reshape(n, delta.shape[1], -1, module.embedding_dim)
        index = x.reshape(n, -1)
        if module.padding_idx is not None:
            flat = flat * (index != module.padding_idx)[:, None, :, None]
        return [EmbeddingCall(names, owner, index, flat, module.num_embeddings)]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        size = module.kernel_size
        return [
            ConvolutionCall(
                names, owner, weight, bias, F.pad(x, _padding(module)), delta.flatten(3).mT, False,
                size, module.dilation, module.stride, module.groups,
            )
        ]  # fmt: skip
    if normalised(module, x[:1]) is not None:
        return norm_calls(module, named, owner, x, delta)
    entering = x.reshape(n, -1, x.shape[-1])
    left = delta.reshape(n, delta.shape[1], -1, delta.shape[-1])
    return [LinearCall(names, owner, weight, bias, entering, left, is_transposed(module))]


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Return what is added on each side of each axis, the last one first."""
    if isinstance(module.padding, str):
        found = []
        for k, d in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
            total = d * (k - 1) if module.padding == "same" else 0
            found += [total // 2, total - total // 2]
        return found
    return [p for each in reversed(module.padding) for p in (each, each)]


def _instance_shape(tensor: Tensor, n: int) -> tuple[int, ...]:
    """Return the shape of an instance's part of a tensor whose first axis is n instances, or their parts."""
    each = len(tensor) // n
    return tuple(tensor.shape[1:]) if each == 1 else (each, *tensor.shape[1:])


def _shapes(final_model: FinalModel) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in final_model.parameters().items()}


def tokens_of(batch: Instances, loss: Loss) -> Tensor | None:
    """Return which positions ``[n, T]`` are tokens and no padding, 1 or true; None where all are.

    By the attention mask; in a language model's data without one, all up to the last token that is predicted.
    """
    if isinstance(batch.inputs, dict) and "attention_mask" in batch.inputs:
        return batch.inputs["attention_mask"]
    if loss.targets != "tokens":
        return None
    return (batch.targets != IGNORED).flip(1).cumsum(1).flip(1) > 0
