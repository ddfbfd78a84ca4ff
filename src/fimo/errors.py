"""The one exception for bad input."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input, found before any long work starts.

    Args:
        key: the configuration key, file or argument at fault, e.g. ``dataset.path``.
        problem: what was found and what is allowed, in one line.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        # launchers send exceptions between processes; the default would call __init__ with one argument
        return type(self), (self.key, self.problem)


class CheckFailedError(Exception):
    """A check of the user's own model failed: its lines, which were printed, say why."""


def shortened(names: Sequence[object], most: int = 8) -> str:
    """Return names for an error message: the first ``most``, and how many more."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"
