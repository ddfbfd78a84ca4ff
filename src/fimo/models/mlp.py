"""The paper's network for tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from numbers import Integral

from torch import nn

from fimo.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def mlp(
    inputs: int,
    outputs: int,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return linear layers inputs-hidden-outputs with an activation (and dropout) after each hidden layer.

    Inputs of more than one dimension are flattened.

    Raises:
        InputError: an unknown activation, or a width that is no whole number of at least 1.
    """
    if activation not in ACTIVATIONS:
        raise InputError(
            "model.network.activation", f"expected one of {', '.join(ACTIVATIONS)} but got {activation!r}"
        )
    widths = list(hidden) if isinstance(hidden, Iterable) and not isinstance(hidden, str) else hidden
    if not isinstance(widths, list) or not all(_is_width(width) for width in widths):
        raise InputError(
            "model.network.hidden",
            f"expected widths of at least 1, a list of whole numbers, but got {widths!r}",
        )
    if not 0 <= dropout < 1:
        raise InputError("model.network.dropout", f"expected a rate in [0, 1) but got {dropout}")
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((inputs, *widths)):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear((inputs, *widths)[-1], outputs))


def _is_width(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
