"""Whether a value is one that an annotation allows, as far as that can be told."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Mapping, Sequence, Sized
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is one that an annotation allows; True where it can't be told."""
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if hint is type(None):
        return value is None
    if get_origin(hint) is Literal:
        return True  # the constructor says which are allowed
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if _is_list(hint):
        return isinstance(value, Sized) and not isinstance(value, str | Mapping)
    return value is not None


def described(hint: Any) -> str:
    """Return an annotation in a user's words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(described, get_args(hint))))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if hint in words:
        return words[hint]
    if hint is type(None):
        return "null"
    return "a list" if _is_list(hint) else "settings"


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Sequence | tuple | list) and origin is not str
