"""Several short sequences in one row, each of which sees itself alone."""

from __future__ import annotations

import torch

from fimo.data.instances import IGNORED, Instances


def packed(instances: Instances, length: int) -> tuple[Instances, list[list[int]]]:
    """Put sequences together into rows without padding between them, in their order.

    Each row is an instance then: under :data:`~fimo.models.losses.language_modelling_sum` its loss, its
    gradient and so its Grad-Dot are the sums of its sequences' (under the mean over tokens, means weighted by
    numbers of tokens). A network of :func:`fimo.models.huggingface.causal_lm` computes each sequence as if it
    stood alone: tokens see their own sequence only, and positions are counted anew.

    Args:
        instances: ``input_ids`` ``[n, T]`` with targets ``[n, T]``, -100 where nothing is predicted; a
            sequence ends with its last target.
        length: most tokens of a row; a longer sequence has a row of its own.

    Returns:
        rows ``input_ids``, ``segments`` (which of the row's sequences, counted from 0; the padding at its end
        is one more), and targets; and the indices of each row's sequences.
    """
    assert isinstance(instances.inputs, dict)
    ends = (instances.targets != IGNORED).flip(1).cumsum(1).flip(1).gt(0).sum(1).tolist()
    members: list[list[int]] = []
    free = 0
    for row, end in enumerate(ends):
        if not members or end > free:
            members.append([])
            free = length
        members[-1].append(row)
        free -= end
    width = max(sum(ends[row] for row in rows) for rows in members)
    ids = torch.zeros(len(members), width, dtype=torch.int64)
    segments = torch.zeros(len(members), width, dtype=torch.int64)
    targets = torch.full((len(members), width), IGNORED)
    for k, rows in enumerate(members):
        at = 0
        for segment, row in enumerate(rows):
            there, own = slice(at, at + ends[row]), slice(ends[row])
            ids[k, there] = instances.inputs["input_ids"][row, own]
            targets[k, there], segments[k, there] = instances.targets[row, own], segment
            at += ends[row]
        segments[k, at:] = len(rows)
    return Instances({"input_ids": ids, "segments": segments}, targets), members
