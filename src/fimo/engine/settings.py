"""Names and ranges of a protocol's settings, the one list of each; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from fimo.errors import InputError

OptimizerName = Literal["sgd", "adam", "adamw", "lion"]
LeaveOutRule = Literal["shift", "mask", "every_batch", "reweighted", "with_duplicates"]
ScheduleName = Literal["constant", "linear", "cosine"]

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
LEAVE_OUT_RULES: tuple[str, ...] = get_args(LeaveOutRule)
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: 0 < value < math.inf, "a positive number"),
    "momentum": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "betas": (lambda value: len(value) == 2 and all(0 <= b < 1 for b in value), "two numbers in [0, 1)"),
    "eps": (lambda value: value >= 0, "at least 0"),
    "weight_decay": (lambda value: value >= 0, "at least 0"),
    "clip_norm": (lambda value: value is None or value > 0, "a positive number or null"),
}
"""Of optimizers' hyperparameters: the test, and what it allows."""


def check_range(key: str, value: Any) -> None:
    """Refuse a hyperparameter out of its range.

    Args:
        key: whose last part names the hyperparameter, e.g. ``model.momentum``.

    Raises:
        InputError: naming the key.
    """
    allows, allowed = RANGES[key.rpartition(".")[2]]
    if not allows(value):
        shown = list(value) if isinstance(value, tuple) else value
        raise InputError(key, f"expected {allowed} but got {shown}")
