"""Which seeds a method follows that shall not know the noise of the gold standard's."""

from __future__ import annotations

from collections.abc import Iterable

LARGEST = 2**31
"""Seeds are below it."""


def other_seeds(seeds: Iterable[int], count: int | None = None) -> list[int]:
    """Return ``count`` seeds that are not among ``seeds``: the next ones after the largest.

    A prediction that follows the gold standard's own seeds knows part of the noise in the gold standard,
    and so can agree with it better than the noiseless truth does.

    Args:
        seeds: the gold standard's.
        count: as many as those when None.

    Example:
        >>> other_seeds([0, 1, 2])
        [3, 4, 5]
        >>> other_seeds([7, 3], count=1)
        [8]
    """
    taken = {int(s) for s in seeds}
    count, start = len(taken) if count is None else count, max(taken, default=-1) + 1
    if start + count <= LARGEST:
        return list(range(start, start + count))
    free = (s for s in range(LARGEST) if s not in taken)  # where there are none above: from 0
    return [next(free) for _ in range(count)]


def relation(followed: Iterable[int], seeds: Iterable[int]) -> str:
    """Return how followed seeds relate to the gold standard's: ``none``, ``other``, or ``same`` if any is."""
    followed = {int(s) for s in followed}
    if not followed:
        return "none"
    return "same" if followed & {int(s) for s in seeds} else "other"
