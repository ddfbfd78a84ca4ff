"""Cheap controls of attribution: questions whose answer is known without further training.

The definitions are quanda's (Bareeva et al., 2024, https://github.com/dilyabareeva/quanda), each with the
level that it has by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.label_errors import average_precision, chance_precision


def share_of_class(scores: Tensor, train: Tensor, test: Tensor, top: int) -> Tensor:
    """Return which share of the most helpful training instances has the test instance's class, ``[J]``.

    Args:
        scores: ``[J, N]``.
        train, test: classes ``[N]``, ``[J]``.
        top: how many training instances.
    """
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    found = (train[best] == test[:, None]).double().mean(1)
    return found.masked_fill(~scores.isfinite().all(1), torch.nan)


def chance_of_class(train: Tensor, test: Tensor, known: tuple[Tensor, Tensor] | None = None) -> float:
    """Return what :func:`share_of_class` is in the mean for a random order.

    Args:
        known: coarser classes ``[N]``, ``[J]``, within which the order is random, the test instance's first.
    """
    same = (train == test[:, None]).double()
    among = torch.ones_like(same) if known is None else (known[0] == known[1][:, None]).double()
    return float(((same * among).sum(1) / among.sum(1)).mean())


def precision_of_marked(scores: Tensor, marked: Tensor) -> Tensor:
    """Return the average precision ``[J]`` of finding marked training instances as the most helpful.

    Args:
        scores: ``[J, N]``.
        marked: ``[N]`` bool.
    """
    return torch.stack([average_precision(row, marked).double() for row in scores.double()])


def chance_of_marked(marked: Tensor) -> float:
    """Return what :func:`precision_of_marked` is in the mean for a random order."""
    return chance_precision(int(marked.sum()), len(marked))


def merged_classes(classes: int, into: int, generator: torch.Generator) -> Tensor:
    """Return for each class the one of fewer classes that it becomes part of, at random, ``[classes]``.

    Raises:
        InputError: not every one of the fewer classes could have several.
    """
    if not 2 <= into <= classes // 2:
        raise InputError(
            "evaluation.tasks.subclass_detection.classes",
            f"expected 2 to {classes // 2}, half of the {classes} classes, but got {into}",
        )
    found = torch.empty(classes, dtype=torch.int64)
    found[torch.randperm(classes, generator=generator)] = torch.arange(classes) % into
    return found


def with_mark(inputs: Tensor, share: float, value: float) -> Tensor:
    """Return inputs ``[n, ...]`` whose first entries have a value: a mark that is the same in all of them.

    Args:
        share: of the entries of an instance; at least one.
    """
    flat = inputs.flatten(1).clone()
    flat[:, : max(1, round(share * flat.shape[1]))] = value
    return flat.view_as(inputs)


def permuted(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return inputs ``[n, ...]`` with the entries of every instance in another order, the same for all."""
    flat = inputs.flatten(1)
    return flat[:, torch.randperm(flat.shape[1], generator=generator)].view_as(inputs)
