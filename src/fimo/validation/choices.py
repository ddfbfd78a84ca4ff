"""Numbers and lists, in any form that users hold them in: scores, and what chooses seeds and instances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fimo.errors import InputError, reason, shortened


def real_numbers(values: Any, key: str, expected: str, what: str = "numbers") -> Tensor:
    """Return a tensor, an array or lists of numbers as a tensor without a graph.

    Args:
        expected, what: in what form, and what they are, for errors.

    Raises:
        InputError: with ``key``: something else, or complex numbers.
    """
    try:
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(values).__name__
        raise InputError(key, f"expected {expected} but got {kind}: {reason(error)}") from None
    if found.is_complex():
        raise InputError(key, f"expected real {what} but got {found.dtype}")
    return found


def spaced(count: int, total: int) -> list[int]:
    """Return ``count`` evenly spaced indices of ``total``."""
    return [k * total // count for k in range(count)]


def whole_numbers(value: Any, key: str, what: str) -> list[int]:
    """Return a list, range, array or tensor of whole numbers as a list.

    Raises:
        InputError: with ``key``: other things than whole numbers, or a mask of truth values.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        entries = list(value)
    except TypeError:
        raise InputError(key, f"expected a number of {what}, or a list of them, but got {value!r}") from None
    found = []
    for entry in entries:
        number = (
            entry.item() if isinstance(entry, np.generic | np.ndarray | Tensor) and entry.ndim == 0 else entry
        )
        if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
            raise InputError(key, f"expected whole numbers but got {shortened([entry])}")
        found.append(int(number))
    return found


def seeds(value: Any, key: str = "further_training.seeds") -> list[int]:
    """Return seeds: N means 0 to N - 1; a list, array or tensor is taken as it is.

    Raises:
        InputError: with ``key``: none, negative ones, duplicates.
    """
    if _is_number(value):
        if value < 1:
            raise InputError(key, f"expected at least 1 seed but got {value!r}")
        return list(range(int(value)))
    found = whole_numbers(value, key, "seeds")
    if not found:
        raise InputError(key, "expected at least one seed but got none")
    if any(not 0 <= s < 2**31 for s in found):
        raise InputError(key, f"expected seeds in [0, 2^31) but got {shortened(found)}")
    if twice := sorted({s for s in found if found.count(s) > 1}):
        raise InputError(key, f"expected distinct seeds but some occur twice: {shortened(twice)}")
    return found


def count(value: Any, key: str, alternative: str = "") -> int:
    """Return a whole number of at least 1.

    Args:
        alternative: what else would do, for messages: ``, or auto``.

    Raises:
        InputError: with ``key``: something else.
    """
    if not _is_number(value) or value != int(value):
        raise InputError(key, f"expected a whole number{alternative} but got {value!r}")
    if value < 1:
        raise InputError(key, f"expected at least 1{alternative} but got {value}")
    return int(value)


def units(value: Any, total: int, key: str = "further_training.left_out") -> list[tuple[int, ...]]:
    """Return what is left out together, as sorted tuples: N means N evenly spaced instances, None all.

    Args:
        value: a number, or indices (a list, range, array or tensor), or lists of indices.
        total: N, the number of instances.

    Raises:
        InputError: with ``key``: none, indices out of range, duplicates.
    """
    entries: list[Any]
    if value is None:
        entries = list(range(total))
    elif _is_number(value):
        if not 1 <= value <= total:
            raise InputError(
                key, f"expected a number from 1 to {total}, or a list of indices, but got {value!r}"
            )
        entries = list(spaced(int(value), total))
    else:
        entries = value.tolist() if isinstance(value, Tensor | np.ndarray) else _listed(value, key)
    found: list[tuple[int, ...]] = []
    for entry in entries:
        single = isinstance(entry, int | float) or getattr(entry, "ndim", 1) == 0
        members = whole_numbers([entry] if single else entry, key, "instances")
        if not members:
            raise InputError(key, "a group is empty")
        if bad := [i for i in members if not 0 <= i < total]:
            raise InputError(key, f"expected indices from 0 to {total - 1} but got {shortened(bad)}")
        if len(set(members)) < len(members):
            raise InputError(key, f"a group has an index twice: {shortened(members)}")
        found.append(tuple(sorted(members)))
    if not found:
        raise InputError(key, "expected at least one index but got none")
    if len(set(found)) < len(found):
        twice = sorted({u for u in found if found.count(u) > 1})
        raise InputError(key, f"left out twice: {shortened([u[0] if len(u) == 1 else u for u in twice])}")
    if any(len(u) == total for u in found):
        raise InputError(key, f"a group leaves out all {total} training instances")
    return found


def indices(value: Any, total: int, key: str) -> Tensor:
    """Return indices ``[L]`` of single instances: N means N evenly spaced ones, None all.

    Raises:
        InputError: with ``key``, as :func:`units`; indices may occur twice.
    """
    if value is None:
        return torch.arange(total)
    if _is_number(value):
        return torch.tensor([u[0] for u in units(value, total, key)])
    _refuse_text(value, key)
    found = whole_numbers(value, key, "instances")
    if not found:
        raise InputError(key, "expected at least one index but got none")
    if bad := [i for i in found if not 0 <= i < total]:
        raise InputError(key, f"expected indices from 0 to {total - 1} but got {shortened(bad)}")
    return torch.tensor(found)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.ndim == 0 and not isinstance(value, np.bool_)
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(value: Any, key: str) -> list[Any]:
    _refuse_text(value, key)
    try:
        return list(value)
    except TypeError:
        raise InputError(key, f"expected a number or a list of indices but got {value!r}") from None


def _refuse_text(value: Any, key: str) -> None:
    """Refuse a word as a choice of rows, which is no list of letters."""
    if isinstance(value, str):
        raise InputError(
            key, f"expected a number of rows, a list of their indices, or None for all, but got {value!r}"
        )


def device(given: str | torch.device) -> torch.device:
    """Return a device.

    Raises:
        InputError: it is none, or not there; or another one is the process's default for new tensors.
    """
    if (default := torch.empty(0).device).type != "cpu":
        # a setting of the thread that made it, of which fimo's own threads know nothing
        raise InputError(
            "device",
            f"torch.set_default_device has made {default} the place of all new tensors, unknown to threads; "
            "expected torch.set_default_device(None), and the device as the argument of this name",
        )
    there = ", ".join(["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))])
    try:
        found = torch.device(given)
    except (RuntimeError, TypeError):  # whose message lists every kind of device that torch knows of
        raise InputError("device", f"expected one of {there} but got {given!r}") from None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", f"{given} is not here ({reason(error)}); there are {there}") from error
    return found
