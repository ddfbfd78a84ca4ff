"""A nested configuration by dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration by dotted keys, as the command line takes them.

    Example:
        >>> flat({"model": {"lr": 0.1, "hidden": [8]}, "seed": 0})
        {'model.lr': 0.1, 'model.hidden': [8], 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
