"""What enters and leaves a network's modules: the second moments of K-FAC's factors, by hooks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.curvature.arranged_rows import calls_of
from fimo.curvature.cotangents import Cotangents
from fimo.curvature.gradients import BATCH, InstanceGradients
from fimo.curvature.jacobian import FactoredRows, Rows
from fimo.curvature.module_rows import ConvolutionCall, EmbeddingCall, LinearCall, ModuleRows
from fimo.curvature.recording import UnseenError, recorder_of_sums
from fimo.data.instances import Instances
from fimo.errors import InputError


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
    gradients: InstanceGradients, train: Instances, rows: Rows, cotangents: Cotangents
) -> list[Moments]:
    """Return the factors of every linear, convolutional and embedding module with trainable parameters.

    A module whose parameters are used elsewhere too (tied weights) is represented by its own use; one that is
    never called (functional use of its weights) is left out.

    Args:
        rows: of the training instances with these cotangents; where they don't say what enters and leaves
            layers, it is recorded in another pass.

    Raises:
        InputError: a factor is not finite.
    """
    found = _moments(_parts(rows), rows.n)
    if not found:
        found = _moments(_recorded(gradients, train, cotangents, rows.r), rows.n) or []
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


def _moments(parts: Iterable[FactoredRows | ModuleRows | None], n: int) -> list[Moments] | None:
    """Return the factors of layers by what entered and left them, or None where a part doesn't say.

    Args:
        parts: of n instances in all.
    """
    claimed: dict[str, int] = {}
    calls: dict[int, LinearCall | EmbeddingCall] = {}
    entering: dict[int, Tensor] = {}
    leaving: dict[int, Tensor] = {}
    positions: dict[int, int] = {}
    linear: list[Moments] = []
    for block in parts:
        if block is None:
            return None
        if isinstance(block, FactoredRows):
            for part in block.parts():
                _add_factors(part, linear, n)
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
            call.names, entering[k] / max(1, positions[k]), leaving[k] / n,
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
    if mask is None or len(mask) != len(values) or mask.shape[1] < t or bool(mask[:, t:].any()):
        return values.flatten(0, 1)
    return values[mask[:, :t]]


def _recorded(
    gradients: InstanceGradients, train: Instances, cotangents: Cotangents, r: int
) -> Iterator[ModuleRows]:
    """Yield what enters and leaves layers, recorded whatever else the network does with their parameters."""
    recorder = recorder_of_sums(gradients.final_model, train)
    if recorder is None:
        return
    for batch in train.batches(max(1, BATCH // r)):
        gradients.count(len(batch) * r)
        try:
            yield recorder.rows(batch, functools.partial(_at_targets, cotangents, batch.targets))
        except UnseenError:  # weights are used as numbers, and no module is called
            return


def _at_targets(cotangents: Cotangents, targets: Tensor, outputs: Tensor) -> Tensor:
    return cotangents(outputs, targets)
