"""Low-rank adapters (Hu et al., 2022): few parameters to move in a network of many."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import Tensor, nn

from fimo.errors import InputError, shortened

KEY = "model.network.adapters"


class LowRankAdapter(nn.Module):
    """A linear layer W and its low-rank change: ``x -> W x + b + (alpha / rank) B A x``.

    B starts at zero, so that the network computes what it did before; the gradient in A is then zero at
    first, and that in B is not.

    Args:
        layer: ``nn.Linear``, or GPT-2's layer with the transposed weight ``[in, out]``.
        rank: of the change.
        alpha: its scale, divided by the rank.
        dropout: rate of what enters A in training steps.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        rows, columns = _shape(layer)
        weight = layer.get_parameter("weight")
        self.layer, self.scale = layer, alpha / rank
        # modules of their own, so that methods which work layer by layer cover them
        self.down = nn.Linear(columns, rank, bias=False, dtype=weight.dtype, device=weight.device)
        self.up = nn.Linear(rank, rows, bias=False, dtype=weight.dtype, device=weight.device)
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout) if dropout else None

    @property
    def rate(self) -> float:
        """The rate of dropout."""
        return 0.0 if self.dropout is None else self.dropout.p

    def forward(self, x: Tensor) -> Tensor:
        entering = x if self.dropout is None else self.dropout(x)
        # the narrow product is scaled: a pass over the wide one takes as long as the adapter's products
        output: Tensor = self.layer(x) + self.up(self.scale * self.down(entering))
        return output


def add_adapters(
    network: nn.Module, layers: Sequence[str], rank: int = 4, alpha: float = 8.0, freeze: str = "*"
) -> list[str]:
    """Put adapters on a network's linear layers, in place.

    Args:
        layers: patterns (``fnmatch``) of the layers' names, such as ``*query``.
        rank, alpha: see :class:`LowRankAdapter`.
        freeze: pattern of the parameters that the final model's training then leaves alone.

    Returns:
        The names of the adapted layers.

    Raises:
        InputError: naming ``model.network.adapters``: a pattern that matches no linear layer, or a bad rank.
    """
    linear = [name for name, module in network.named_modules() if is_linear(module)]
    chosen = []
    for pattern in layers:
        found = fnmatch.filter(linear, pattern)
        if not found:
            raise InputError(KEY, f"no linear layer matches {pattern!r}; there are {shortened(linear)}")
        chosen += [name for name in found if name not in chosen]
    if rank < 1:
        raise InputError(KEY, f"expected a rank of at least 1 but got {rank}")
    leave_alone(network, freeze)
    for name in chosen:
        parent, _, attribute = name.rpartition(".")
        adapted = LowRankAdapter(network.get_submodule(name), rank, alpha)
        setattr(network.get_submodule(parent), attribute, adapted)
    return chosen


def leave_alone(network: nn.Module, freeze: str) -> None:
    """Freeze the parameters whose names match a pattern."""
    for name, parameter in network.named_parameters():
        if fnmatch.fnmatch(name, freeze):
            parameter.requires_grad_(False)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a layer that can have an adapter."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)
