"""Packages that only parts of fimo need: whether they are installed, and the extra that brings them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from fimo.errors import InputError

PACKAGES = {"PIL": "pillow"}
"""Names of packages that differ from those of their modules."""

FIGURES = {"figures": ("plotly", "jinja2")}
"""What the report needs."""

STATIC_FIGURES = {"figures": ("matplotlib",)}
"""What figures as PDF and PNG need."""

WANDB = {"wandb": ("wandb", "plotly")}
IMAGES = {"image": ("PIL",)}
TEXT = {"text": ("transformers",)}
XLS = {"spreadsheets": ("xlrd",)}
XLSX = {"spreadsheets": ("openpyxl",)}


def require(key: str, needed: Mapping[str, Sequence[str]], instead: str = "") -> None:
    """Check, without importing them, that packages are installed.

    Args:
        key: configuration key, or function, that needs them.
        needed: names of modules, by the extra of fimo that brings them.
        instead: what to do without them.

    Raises:
        InputError: in one line: which are missing, and how to install them.
    """
    if problem := lacking(needed):
        raise InputError(key, f"{problem}; {instead}" if instead else problem)


def lacking(needed: Mapping[str, Sequence[str]]) -> str | None:
    """Return in one line which packages are not installed, and how to install them; None where all are."""
    missing = {extra: [m for m in modules if not installed(m)] for extra, modules in needed.items()}
    missing = {extra: modules for extra, modules in missing.items() if modules}
    if not missing:
        return None
    names = dict.fromkeys(PACKAGES.get(m, m) for modules in missing.values() for m in modules)
    return f"needs {', '.join(names)}, not installed here: pip install 'fimo[{','.join(missing)}]'"


def available(needed: Mapping[str, Sequence[str]]) -> bool:
    """Return whether all packages are installed; see :func:`require`."""
    return all(installed(module) for modules in needed.values() for module in modules)


def installed(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing, or it was put there by hand
        return False
