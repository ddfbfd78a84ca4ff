"""Replicas: which runs there are, and which are advanced together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fimo.further_training.protocol import Protocol

Unit = tuple[int, ...]
"""What a run leaves out: training indices, ascending; empty for the full run."""


@dataclass(frozen=True, order=True)
class Replica:
    """One further-training trajectory: a seed, and what it leaves out."""

    seed: int
    left_out: Unit = ()


def plan_chunks(
    replicas: Sequence[Replica], size: int, protocol: Protocol, one_seed_each: bool
) -> list[list[Replica]]:
    """Group replicas that take the same steps into chunks of at most ``size``.

    Under ``shift`` these leave out equally many instances, so that all batches of a step are equally large.

    Args:
        one_seed_each: keep the replicas of a chunk to one seed (they share their dropout masks).
    """

    def group(replica: Replica) -> tuple[int, int]:
        seed = replica.seed if one_seed_each else 0
        return seed, len(replica.left_out) if protocol.leave_out == "shift" else 0

    chunks: list[list[Replica]] = []
    for _, members in itertools.groupby(sorted(replicas, key=lambda r: (group(r), r)), key=group):
        same = list(members)
        chunks.extend(same[start : start + size] for start in range(0, len(same), size))
    return chunks
