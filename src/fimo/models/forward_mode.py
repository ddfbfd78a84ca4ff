"""Directional derivatives by forward mode, which threads must not take at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fimo.errors import InputError

_LEVELS = threading.RLock()
"""PyTorch's levels of forward mode belong to the process: a thread that leaves the one it shares with another
takes the other's tangents away."""


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return a value and its derivative along tangents, as ``torch.func.jvp`` does, one thread at a time.

    Where an operation has no forward derivative (``grid_sample``), the backward pass, which is linear in what
    it starts from, is differentiated in that: the same numbers for more time.

    Raises:
        InputError: an operation has neither (``cdist``), or is an ``autograd.Function`` in the old form.
    """
    with lacking_derivatives_named():
        try:
            with _LEVELS:
                value, derivative = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
            return value, derivative
        except NotImplementedError as error:
            if "_weight_norm" in str(error):  # whose second derivatives take the norm as constant
                raise
            try:
                return _backward_twice(function, primals, tangents)
            except RuntimeError:
                raise error from None


@contextlib.contextmanager
def lacking_derivatives_named() -> Iterator[None]:
    """Say in one line which operation lacks what a block needs of it."""
    try:
        yield
    except RuntimeError as error:  # setup_context: the method that an autograd.Function in the old form lacks
        if not isinstance(error, NotImplementedError) and "setup_context" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise InputError("model.network", f"directional derivatives are needed here: {said}") from None


def _backward_twice(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    value, backward = torch.func.vjp(function, *primals)  # type: ignore[misc]
    again = torch.func.vjp(backward, tree_map(torch.zeros_like, value))[1]
    return value, again(tangents)[0]
