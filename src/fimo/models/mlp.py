"""The paper's network for tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
        InputError: an unknown activation, or a width below 1.
    """
    if activation not in ACTIVATIONS:
        raise InputError(
            "model.network.activation", f"expected one of {', '.join(ACTIVATIONS)} but got {activation!r}"
        )
    if any(width < 1 for width in hidden):
        raise InputError("model.network.hidden", f"expected widths of at least 1 but got {list(hidden)}")
    if not 0 <= dropout < 1:
        raise InputError("model.network.dropout", f"expected a rate in [0, 1) but got {dropout}")
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs))
