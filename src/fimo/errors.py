"""The one exception for bad input."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path


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


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Return a hint for a misspelt name: the nearest allowed ones, else all of them (shortened)."""
    if same := [a for a in allowed if a.lower() == name.lower()]:
        return f"did you mean {same[0]}?"
    close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {shortened(list(allowed), 20)}"


def reason(error: BaseException) -> str:
    """Return an error of foreign code in one line, with the user's line of code that failed."""
    text = (str(error).strip() or "no message").splitlines()[0]
    if not isinstance(error, RuntimeError | TypeError | ValueError):  # whose messages say enough
        text = f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _of_a_package(f.filename)]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text


def _of_a_package(file: str) -> bool:
    """Return whether a file belongs to an installed package, to Python, or to this package."""
    places = (
        Path(__file__).parent,
        *map(Path, (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))),
    )
    return file.startswith("<") or any(place in Path(file).parents for place in places)
