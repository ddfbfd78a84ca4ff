"""Replicas: which runs there are, and which are advanced together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

Unit = tuple[int, ...]
"""What a run leaves out: training indices, ascending; empty for the full run."""


class Replica(NamedTuple):
    """One further-training trajectory: a seed, and what it leaves out."""

    seed: int
    left_out: Unit = ()


def next_chunk(
    waiting: Iterable[Replica], size: int, width: Callable[[Unit], int], one_seed_each: bool
) -> list[Replica]:
    """Return the first chunk of waiting replicas: at most ``size`` that take the same steps.

    The order of ``waiting`` decides, so chunks taken one after another cut a list at the same places
    whether some were finished before or not.

    Args:
        waiting: replicas to run, in an order that does not depend on what is finished.
        width: the leave-out rule's, of the batches of runs that leave something out.
        one_seed_each: keep the replicas of a chunk to one seed (they share their dropout masks).
    """

    def group(replica: Replica) -> tuple[int, int, bool]:
        seed = replica.seed if one_seed_each else 0
        return seed, width(replica.left_out), not replica.left_out

    chunk: list[Replica] = []
    for replica in waiting:
        if not chunk or group(replica) == group(chunk[0]):
            chunk.append(replica)
            if len(chunk) == size:
                break
    return chunk


def even_parts(count: int, most: int, workers: int = 2) -> list[int]:
    """Return sizes of about equal parts of ``count``, the largest first, at most ``most`` (at least 1) each.

    They are as many as workers, or a multiple of that, so that none waits at the end; fewer only where
    there is not enough for all.
    """
    parts = min(count, workers * -(-count // (workers * max(1, most))))
    return [count // parts + (k < count % parts) for k in range(parts)]
