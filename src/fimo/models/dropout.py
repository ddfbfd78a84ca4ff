"""Dropout whose masks come from a generator of the step's own.

PyTorch's dropout draws from the process's one generator, so that threads would have to take turns. Here the
same masks are drawn from a generator that is handed in: in its state after ``manual_seed(seed)`` it gives, to
the bit, what the process's would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
)
from torch.overrides import TorchFunctionMode


class DrawnFrom(TorchFunctionMode):
    """In this context dropout draws its masks from a generator; other functions draw as always.

    Of replicas that ``vmap`` advances together all have the same masks, and these are a run's alone under
    ``torch.func``'s derivatives as well.

    Args:
        generator: of a CPU; the process's when None.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.dropout or func is torch.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
    ) -> Tensor:
        if not (training and train) or p == 0 or input.numel() == 0:
            return input
        if not 0 <= p <= 1:
            raise ValueError(f"expected a dropout probability between 0 and 1 but got {p}")
        if p == 1:
            mask = torch.zeros((), dtype=input.dtype)
        else:
            # laid out in memory as in a run alone, by which the order of drawing may go
            mask = torch.empty_like(_of_one(input)).bernoulli_(1 - p, generator=self.generator).div_(1 - p)
        return input.mul_(mask) if inplace else input * mask


def _of_one(tensor: Tensor) -> Tensor:
    """Return what ``torch.func`` wraps, of a single replica of those that ``vmap`` advances together."""
    while is_functorch_wrapped_tensor(tensor):
        inner = get_unwrapped(tensor)
        tensor = inner.select(maybe_get_bdim(tensor), 0) if is_batchedtensor(tensor) else inner
    return tensor
