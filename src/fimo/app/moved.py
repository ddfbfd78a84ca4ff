"""Dotted paths of configurations written for an earlier version, which keep working for one version."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig, ListConfig

log = logging.getLogger(__name__)

MOVED = {"fimo.models.custom": "fimo.models.adapted", "fimo.models.module": "fimo.models.lightning_module"}
"""Modules that 0.1 had elsewhere, of those that a configuration can name."""


def with_present_paths(node: Any, key: str = "") -> None:
    """Replace moved modules in every text of a configuration that names something in one; warn of each.

    Args:
        node: changed in place.
        key: of the node.
    """
    if isinstance(node, DictConfig | ListConfig) and not (node._is_none() or node._is_missing()):
        names = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            child = node._get_node(name)
            full = f"{key}.{name}" if key else str(name)
            value = child._value() if child is not None else None  # type: ignore[union-attr]
            if isinstance(value, str):
                if (now := present(value)) != value:
                    log.warning("%s: %s is now %s; the old path works in this version only", full, value, now)
                    node[name] = now
            else:
                with_present_paths(child, full)


def present(path: str) -> str:
    """Return a dotted path as it is now."""
    module, _, name = path.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else path
