"""What Hydra refuses on a command line, as one line that names the key; and paths that it need not refuse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from fimo.app.config import Config, Trainer
from fimo.app.search_path import SearchPath
from fimo.errors import InputError, nearest

FOLDER_KEYS = ("store", "hydra.run.dir", "hydra.sweep.dir")
"""Settings that are one path each, whether or not it is there yet."""

OF_WANDB = ("mode", "project", "entity", "group", "name", "tags", "notes", "alerts")
"""Settings of W&B that may be given as ``logger.NAME``."""

GROUPS = (
    "dataset", "model", "trainer", "further_training", "evaluation", "logger", "callbacks", "method",
)  # fmt: skip
"""Whose choices hold keys."""

SPECIAL = re.compile(r"[\s,=~(){}\[\]:'\"\\]")
"""Characters that mean something to Hydra."""


def readable(argument: str) -> str:
    """Return an argument as Hydra takes it: with a path in quotes where it holds special characters.

    A value is a path where its key is a folder's, where it begins with ``~/`` (which is the home folder here;
    shells leave it as it is after ``=``), or where it is there. A method's settings may be given without the
    method's being chosen, so they are additions, as ``method`` is, which is not in the defaults list; so are
    callbacks, and the Trainer's arguments that its file does not have.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.startswith("-"):
        return argument
    if key == "method" or key.startswith("method@"):
        return f"+{argument}"
    if key.removeprefix("logger.") in OF_WANDB and key.startswith("logger."):
        key = key.replace("logger.", "logger.wandb.")
    if key.startswith(("methods.", "callbacks.")) or (
        key.startswith("trainer.") and key.removeprefix("trainer.") not in Trainer.__dataclass_fields__
    ):
        key = f"++{key}"
    if value == "None":  # as W&B's agents say null
        value = "null"
    if value[:1] not in ("'", '"') and "${" not in value and SPECIAL.search(value):
        path = Path(value).expanduser()
        if key in FOLDER_KEYS or value.startswith("~/") or _exists(path):
            value = "'" + str(path).replace("'", "\\'") + "'"
    return f"{key}={value}"


def in_one_line(error: Exception, places: SearchPath) -> InputError:
    """Return what Hydra could not compose as an error of one line.

    Args:
        error: Hydra's or OmegaConf's.
        places: where groups of configuration are, for the nearest known keys.
    """
    text = str(error).strip() or type(error).__name__
    if unknown := re.match(r"Could not override '([^']+)'", text):
        if unknown[1] in _flat(OmegaConf.structured(Config)):  # a choice's file need not hold all of it
            return InputError(unknown[1], f"is not in the chosen file; +{unknown[1]}=VALUE sets it")
        if others := choices_with(unknown[1], places):
            return InputError(unknown[1], f"unknown key of the chosen file; a key of {', '.join(others)}")
        return InputError(unknown[1], f"unknown key; {nearest_key(unknown[1], places)}")
    if several := re.match(r"Ambiguous value for argument '\+*([^=]+)=(.*)'\n", text):
        hint = f"[{several[2]}] is a list, -m sweeps over them, quotes make one text of them"
        return InputError(several[1], f"got several values; {hint}")
    if deleted := re.match(r"Could not delete '([^']+)'", text):
        what = "is not chosen, so it can't be left out"
        hint = "; without +method=NAME all methods run" if deleted[1] == "method" else ""
        return InputError(deleted[1], what + hint)
    if isinstance(error, MissingConfigException):
        group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
        hint = (
            f"; {nearest(choice, error.options)}"
            if error.options
            else f" in {', '.join(map(str, places.folders))}"
        )
        return InputError(group or "--config-name", f"no configuration {choice!r}{hint}")
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return InputError(error.override, "expected KEY=VALUE")
        reason = text.splitlines()[0]
        return InputError(
            key.lstrip("+~"), f"{value!r} can't be read ({reason}); a text in quotes can: '{key}=\"…\"'"
        )
    full_key = getattr(error, "full_key", None)
    return InputError(str(full_key or "configuration"), text.splitlines()[0])


def nearest_key(unknown: str, places: SearchPath) -> str:
    """Return a hint for an unknown key: the nearest of its siblings, or where else its last part is known."""
    known = known_keys(places)
    parts = unknown.split(".")
    for depth in range(len(parts)):  # the first part that is not known
        parent = ".".join(parts[:depth])
        siblings = sorted(
            {k.split(".")[depth] for k in known if k.startswith(f"{parent}." if parent else "")}
        )
        if parts[depth] not in siblings:
            break
    elsewhere = [k for k in known if k.split(".")[-1] == parts[-1] and not k.startswith("methods.")]
    hint = nearest(parts[depth], siblings)
    if elsewhere and (depth == 0 or not hint.startswith("did you mean")):
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return hint


def choices_with(key: str, places: SearchPath) -> list[str]:
    """Return the choices, ``GROUP=NAME``, whose own file holds a key of their group."""
    group, _, rest = key.partition(".")
    files = places.files(group) if group else {}
    return [f"{group}={name}" for name, file in files.items() if rest in _flat(OmegaConf.load(file))]


def known_keys(places: SearchPath) -> list[str]:
    """Return all keys of the schema and of every group's choices, dotted."""
    schema = OmegaConf.structured(Config)
    found = dict.fromkeys(_flat(schema))
    for group in GROUPS:
        for file in places.files(group).values():
            prefix = "methods" if group == "method" else group
            found |= dict.fromkeys(_flat(OmegaConf.load(file), prefix))
    return list(found)


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(node, DictConfig):
        return
    names: Iterable[str] = map(str, node.keys())
    for name in names:
        if name == "defaults":
            continue
        full = f"{prefix}.{name}" if prefix else name
        yield full
        yield from _flat(node._get_node(name), full)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or not a path at all
        return False
