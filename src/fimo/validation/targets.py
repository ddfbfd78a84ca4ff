"""Targets in the form that a loss takes: converted where that is plain, refused where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fimo.data.instances import IGNORED
from fimo.errors import InputError
from fimo.models.loss_function import Loss
from fimo.models.value_losses import like

Conversion = Callable[[Tensor], Tensor]


def known_targets(loss: Loss, outputs: Tensor, targets: Tensor, key: str) -> Tensor:
    """Return the targets of a known loss in its own form.

    Args:
        outputs: ``[m, ...]`` of some instances.
        targets: ``[n, ...]`` of all.
        key: of the instances, for errors.

    Raises:
        InputError: labels that are no classes of these outputs, values of another shape, values that are no
            probabilities.
    """
    name = loss.name
    if loss.targets in ("classes", "tokens"):
        axes = 2 if loss.targets == "classes" else 3
        if outputs.ndim != axes:
            wanted = "[n, C]" if axes == 2 else "[n, T, V]"
            raise InputError(
                "model.loss", f"{name} takes outputs {wanted} but the network's are {_shape(outputs)}"
            )
        if targets.is_floating_point() and targets.shape[1:] == outputs.shape[1:] and outputs.shape[1] > 1:
            raise InputError(
                "model.loss",
                f"{name} takes class indices, but the targets are class probabilities {_shape(targets)}; for "
                "these pass lambda o, t: torch.nn.functional.cross_entropy(o, t, reduction='none')",
            )
        return class_indices(targets, outputs.shape[-1], axes - 1, key)
    if loss.targets in ("values", "probabilities"):
        found = like(outputs[:1].expand(len(targets), *outputs.shape[1:]), targets).to(outputs.dtype)
        outside = (found < 0) | (found > 1)
        if loss.targets == "probabilities" and outside.any():
            row = int(outside.flatten(1).any(1).nonzero()[0])
            worst = found[row][outside[row]].flatten()[0].item()
            raise InputError(key, f"instance {row} has the target {worst:g}; expected numbers from 0 to 1")
        return found
    return targets


def class_indices(targets: Tensor, classes: int, axes: int, key: str) -> Tensor:
    """Return class labels as int64 ``[n]`` (or ``[n, T]``): whole numbers of any type.

    Args:
        axes: of the result; a last axis of size one is dropped.

    Raises:
        InputError: with ``key``: labels that are no whole numbers, or out of range.
    """
    if targets.ndim == axes + 1 and targets.shape[-1] == 1:
        targets = targets[..., 0]
    if targets.ndim != axes:
        wanted = "[n]" if axes == 1 else "[n, T]"
        raise InputError(key, f"expected class indices {wanted} but got targets of shape {_shape(targets)}")
    if targets.is_floating_point():
        broken = targets != targets.round()
        if broken.any():
            raise InputError(
                key, f"{_first(targets, broken)}; expected whole numbers from 0 to {classes - 1}"
            )
    found = targets.to(torch.int64)
    bad = (found < 0) | (found >= classes)
    if axes == 2:
        bad &= found != IGNORED
    if bad.any():
        raise InputError(
            key, f"{_first(targets, bad)}; the network has outputs for {classes} classes (from 0)"
        )
    return found


def candidates(outputs: Tensor, targets: Tensor) -> Iterator[Conversion]:
    """Yield what the targets of a user's own loss may have to become, as they are first."""
    dtype = outputs.dtype
    if not targets.is_floating_point() and targets.dtype not in (torch.int64, torch.bool):
        yield lambda t: t.to(torch.int64)  # some losses take uint8, but not where replicas are vectorised
    yield lambda t: t
    if targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] == 1:
        yield lambda t: t[:, None].to(dtype)
    if targets.is_floating_point():
        if bool((targets == targets.round()).all()):
            yield lambda t: t.to(torch.int64)
            if targets.ndim == 2 and targets.shape[1] == 1:
                yield lambda t: t[:, 0].to(torch.int64)
        return
    if targets.dtype == torch.bool:
        yield lambda t: t.to(torch.int64)
    yield lambda t: t.to(dtype)
    if targets.ndim == 2 and targets.shape[1] == 1:
        yield lambda t: t[:, 0].to(torch.int64)


def _first(targets: Tensor, bad: Tensor) -> str:
    where = bad.nonzero()[0].tolist()
    return f"instance {where[0]} has the label {targets[tuple(where)].item():g}"


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(['n', *map(str, tensor.shape[1:])])}]"
