"""Whether a network may take a batch's rows in another order on its way.

What enters a module in the middle of a network is taken for the instances', in their order, by all that looks
there. Networks that sort texts by their length (as packed sequences want them) or select some rows are no
exception that shapes could show, and whether they do may depend on the batch. So the operations that could do
it are watched for; where there are any, whoever watches has to try more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fimo.data.instances import Inputs

ALONG = frozenset({"index_select", "gather", "sort", "topk", "flip", "roll"})
"""Operations that may take rows in another order along an axis, or several."""

JOINING = frozenset({"cat", "stack"})
"""Operations that may do so with parts that were cut before."""

ANY = frozenset(
    {"take", "masked_select", "masked_scatter", "index_copy", "index_add", "scatter", "scatter_add",
     "scatter_reduce", "_pack_padded_sequence"}
)  # fmt: skip
"""Operations that may do so whatever their arguments."""

BY_INDEX = frozenset({"index", "_unsafe_index", "index_put", "_unsafe_index_put"})
"""Operations that take a list of indices, one for each axis."""


class RowMoves(TorchDispatchMode):
    """Notes, within the context, whether rows of instances may be taken in another order.

    Tensors whose first axis isn't n instances or parts of them don't count, nor do the network's own, nor
    masks, which libraries look up by instance, unless inputs are such.

    Args:
        network: that is called.
        inputs: of n instances.
    """

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
        self.n, self.noted = len(tensors[0]), False
        self.masks_count = any(t.dtype == torch.bool for t in tensors)
        self.own = {_storage(t) for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.noted and self.n > 1:
            self.noted = self._moves(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _moves(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in BY_INDEX:
            return args[1][0] is not None and self._counts(args[0])
        if name in ANY:
            return any(self._counts(a) for a in args if isinstance(a, Tensor))
        if name not in ALONG | JOINING:
            return False
        axes = next(
            named.get(a.name, args[k] if k < len(args) else a.default_value)
            for k, a in enumerate(func._schema.arguments)
            if a.name in ("dim", "dims")
        )
        if name in JOINING:
            parts = [t for t in args[0] if t.numel()]  # an empty one starts a cache of keys and values
            rows = len(parts) if name == "stack" else sum(len(t) for t in parts if t.ndim)
            if len(parts) < 2 or rows % self.n:
                return False
            return bool(axes % max(1, parts[0].ndim + (name == "stack")) == 0)
        if name == "sort" and not args[0].is_floating_point():
            return False  # an order of rows, which is used as an index
        first = [axes] if isinstance(axes, int) else axes or [0]  # roll's without axes is of all numbers
        return self._counts(args[0]) and any(axis % args[0].ndim == 0 for axis in first)

    def _counts(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or not tensor.ndim or not len(tensor) or len(tensor) % self.n:
            return False
        return (tensor.dtype != torch.bool or self.masks_count) and _storage(tensor) not in self.own


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
