"""Directional derivatives by forward mode, which threads must not take at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_LEVELS = threading.RLock()
"""PyTorch's levels of forward mode belong to the process: a thread that leaves the one it shares with another
takes the other's tangents away."""


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return a value and its derivative along tangents (``torch.func.jvp``), one thread at a time."""
    with _LEVELS:
        value, derivative = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
    return value, derivative
