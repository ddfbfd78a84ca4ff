"""The linear layers of a network whose ``forward`` is the user's own, found by watching it run.

Where it hands one tensor from a linear layer or an activation to the next, and does nothing else with it, in
train and in eval mode, the network is the sequence of these.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fimo.models.activations import Activation, activation_of
from fimo.models.copied import duplicate

Watched = tuple[str, str | None, Activation | None]
"""Names of a linear layer's weight and bias, and the activation after it."""

Shape = tuple[int, ...]

SIZES = (1, 3)
"""Instances in the batches that are watched."""

_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    functional.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU,
    Tensor.relu: nn.ReLU, Tensor.relu_: nn.ReLU, functional.relu_: nn.ReLU,
    functional.tanh: nn.Tanh, torch.tanh: nn.Tanh, Tensor.tanh: nn.Tanh,
    functional.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, Tensor.sigmoid: nn.Sigmoid,
    functional.silu: nn.SiLU, functional.gelu: nn.GELU,
    functional.leaky_relu: nn.LeakyReLU, functional.elu: nn.ELU,
}  # fmt: skip

_FLATTENING = (Tensor.view, Tensor.reshape, Tensor.flatten, torch.flatten, torch.reshape)

_OF_COLUMNS = (
    Tensor.squeeze, torch.squeeze, Tensor.__getitem__, Tensor.unsqueeze, torch.unsqueeze, *_FLATTENING,
)  # fmt: skip

LOOKS = (Tensor.size, Tensor.dim, Tensor.shape.__get__, Tensor.ndim.__get__)  # type: ignore[attr-defined]
"""At a batch's shape, as flattening it needs."""

_KNOWN_CALLS = {functional.linear, functional.dropout, *_ACTIVATIONS, *_FLATTENING, *_OF_COLUMNS, *LOOKS}

_NOTHING = torch.empty(0)

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Shape, list[Watched] | None]] = weakref.WeakKeyDictionary()


def watched_layers(network: nn.Module, shape: Shape = ()) -> list[Watched] | None:
    """Return a network's layers if it is a sequence of linear layers and activations; else None.

    A leading flattening of each instance is seen through, as are identities, dropout with rate 0, and a
    single output that is squeezed and becomes a column again.

    Args:
        shape: of an instance, which a network may look at; () for one of one axis.
    """
    known = _KNOWN.setdefault(network, {})
    if shape not in known:
        known[shape] = _watched(network, shape) if _may_be(network) else None
    return known[shape]


def _may_be(network: nn.Module) -> bool:
    """Whether all that a network holds is linear layers' parameters."""
    held = [module for module in network.modules() if module._parameters]
    linear = all(isinstance(module, nn.Linear) for module in held)
    return bool(held) and linear and next(network.buffers(), None) is None


def _watched(network: nn.Module, shape: Shape) -> list[Watched] | None:
    widths = dict.fromkeys(m.in_features for m in network.modules() if isinstance(m, nn.Linear))
    shapes = [shape] if shape else [(width,) for width in widths]  # which layer is first is not known
    try:
        with torch.inference_mode(False), torch.enable_grad():
            network = duplicate(network).requires_grad_(True)
            for each in shapes:
                found = [
                    _Watch(network.train(train)).layers(n, each) for train in (True, False) for n in SIZES
                ]
                if found[0] and all(f == found[0] for f in found):
                    return found[0]
    except Exception:  # whatever a user's code does with such a batch
        return None
    return None


class _OtherwiseError(Exception):
    """A network does something else."""


class _Watch(TorchFunctionMode):
    """Watches what a network calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.names = {id(p): name for name, p in network.named_parameters()}
        self.found: list[Watched] = []
        self.at = _NOTHING  # what the next layer is expected to take

    def layers(self, n: int, shape: Shape) -> list[Watched] | None:
        """Return the layers that a batch of n instances goes through; None where something else happens."""
        p, size = next(self.network.parameters()), n * math.prod(shape)
        batch = self.at = torch.linspace(-1, 1, size, dtype=p.dtype, device=p.device).view(n, *shape)
        try:
            with self:
                outputs = self.network(batch)
        except (_OtherwiseError, RuntimeError):  # the latter: of another width
            return None
        used = [name for weight, bias, _ in self.found for name in (weight, bias) if name]
        whole = outputs is self.at and outputs.ndim == 2 and sorted(used) == sorted(self.names.values())
        return self.found if whole else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        options = {k: v for k, v in kwargs.items() if k not in ("input", "inplace")}
        drawing = func is functional.dropout and _is_on(*args[1:], **options)
        taken = args[0] if args else kwargs.get("input")
        at, self.at = self.at, _NOTHING  # until it is known: a network may catch what is raised here
        if taken is not at or func not in _KNOWN_CALLS or drawing:  # before it draws random numbers
            raise _OtherwiseError
        after = func(*args, **kwargs)
        if func in LOOKS:
            self.at = at
            return after
        if not isinstance(after, Tensor) or after.dtype != at.dtype:
            raise _OtherwiseError
        if func in _OF_COLUMNS and self.found and {at.shape, after.shape} == _column(len(at)):
            self.at = after
            return after
        flat = (len(at), at[0].numel())
        if func in _FLATTENING and not self.found and after.shape == flat:
            self.at = after
            return after
        if at.ndim != 2:
            raise _OtherwiseError
        if func is functional.linear:
            self.found.append((*self._names(*args[1:], **options), None))
        elif func is functional.dropout:
            pass
        elif func in _ACTIVATIONS and self.found and self.found[-1][2] is None:
            activation = activation_of(_ACTIVATIONS[func](*args[1:], **options))
            if activation is None:
                raise _OtherwiseError
            self.found[-1] = (*self.found[-1][:2], activation)
        else:
            raise _OtherwiseError
        if self.found and not after.requires_grad:  # computed as a constant
            raise _OtherwiseError
        self.at = after
        return after

    def _names(self, weight: Tensor, bias: Tensor | None = None) -> tuple[str, str | None]:
        try:
            return self.names[id(weight)], None if bias is None else self.names[id(bias)]
        except KeyError:  # computed from others
            raise _OtherwiseError from None


def _column(n: int) -> set[torch.Size]:
    return {torch.Size([n]), torch.Size([n, 1])}


def _is_on(p: float = 0.5, training: bool = True, *_: object) -> bool:
    return training and p > 0
