"""Networks that ask for float32 inside, run in the precision of their parameters."""

from __future__ import annotations

import contextlib
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_ASKING: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def own_precision(network: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Let float64 parameters of a network with modules of Hugging Face's be computed with in float64.

    Most of the library's norms, softmaxes and positions are computed in float32 whatever the network's type,
    for bfloat16's sake. In a float64 run this would round losses to 1e-8, and hide smaller effects.

    Args:
        dtype: of the parameters.
    """
    if dtype is not torch.float64:
        return contextlib.nullcontext()
    if network not in _ASKING:
        _ASKING[network] = any(type(m).__module__.startswith("transformers.") for m in network.modules())
    return _Wide() if _ASKING[network] else contextlib.nullcontext()


class _Wide(TorchFunctionMode):
    """In this context float64 is what functions are given for float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        wide = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **wide)
