"""Arguments of a ``_target_``, held against its signature before it is called."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, ListConfig

from fimo.errors import InputError, nearest
from fimo.validation.annotations import described, fits

HYDRAS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")


def check_arguments(node: Any, key: str, given: Collection[str] = ()) -> None:
    """Refuse a node whose target can't be imported, or does not take the node's arguments.

    Types are checked for the package's own targets, where an annotation is a number, a truth value, a text or
    a list; elsewhere annotations may say what the author likes.

    Args:
        node: of a configuration, with a ``_target_``; nodes inside it are checked too.
        key: of the node.
        given: names of arguments that the caller replaces.

    Raises:
        InputError: naming the argument's key.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return
    target = imported(node._target_, f"{key}._target_")
    own = str(node._target_).startswith("fimo.")
    try:
        parameters = inspect.signature(target, eval_str=own).parameters
    except (TypeError, ValueError, NameError):  # written in C, or annotated for type checkers only
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in map(str, node):
        if name in HYDRAS or name in given:
            continue
        if name not in parameters and not takes_any:
            known = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            raise InputError(f"{key}.{name}", f"unknown argument; {nearest(name, known)}")
        value = node[name]
        check_arguments(value, f"{key}.{name}")
        if own and name in parameters and not fits(value, parameters[name].annotation):
            wanted = described(parameters[name].annotation)
            raise InputError(f"{key}.{name}", f"expected {wanted} but got {_shown(value)}")


def imported(name: Any, key: str) -> Any:
    """Return what a dotted path names.

    Raises:
        InputError: with ``key`` and the reason.
    """
    try:
        found = _locate(str(name))  # as hydra.utils.get_object, which also logs the error
    except Exception as error:  # a user's module may fail in any way
        if lacking := _lacking(error, str(name)):
            raise InputError(key, f"{name} can't be imported: {lacking}") from error
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise InputError(key, f"{name} can't be imported: {reason}") from error
    if not callable(found):
        raise InputError(key, f"expected a class or function but {name} is a {type(found).__name__}")
    return found


def _lacking(error: BaseException, name: str) -> str | None:
    """Return which module an import lacks that is not part of the name itself, and where it is imported."""
    cause: BaseException | None = error
    while cause is not None:
        lacks = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if lacks and not (name == lacks or name.startswith(f"{lacks}.")):
            frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith("<")]
            where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else name
            return f"{where} imports {lacks!r}, which is not installed"
        cause = cause.__cause__ or cause.__context__
    return None


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, ListConfig) else repr(value)
