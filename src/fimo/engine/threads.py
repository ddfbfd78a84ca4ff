"""One thread for many small products: handing each to several threads costs more than it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run a block with one CPU thread and put the caller's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(function: Callable[[Item], Found], items: Sequence[Item], workers: int) -> list[Found]:
    """Return the function's values, computed on as many CPU threads, each of which uses one.

    A value doesn't depend on the number of workers, unless the function's arithmetic does on torch's threads.
    """
    if workers <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with one_thread(), pool:
        return list(pool.map(function, items))
