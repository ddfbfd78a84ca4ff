"""The user's own division of a table into a training and a test part, by a column."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from fimo.data.cells import TRUTHS
from fimo.errors import InputError, shortened

TRAIN = ("train", "training", "tr", "fit", "learn", "learning", "development")
TEST = (
    "test",
    "testing",
    "te",
    "tst",
    "holdout",
    "hold-out",
    "held-out",
    "heldout",
    "held out",
    "eval",
    "evaluation",
)
VALIDATION = ("validation", "valid", "val", "dev", "cv")
TRUE_OF_TEST = ("test", "testing", "holdout", "heldout", "valid", "validation")
TRUE_OF_TRAIN = ("train", "training")
NEGATIONS = ("not", "non", "no")
"""Words in the name of a column of truth values; with a negation it may say either."""
KEY = "dataset.split"


def parts(column: pd.Series, where: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the positions of the training and of the test rows, and what was seen, in a line.

    Parts are called as people call them (``train``, ``test``, ``holdout``, …, in any case of letters); a part
    called ``validation`` is the test part where no other is, else its rows are left out. Truth values say it
    where the column's name does (``is_test``, ``train``).

    Raises:
        InputError: ``dataset.split``: an empty cell, other names, or an empty part.
    """
    if column.isna().any():
        row = int(np.flatnonzero(column.isna())[0])
        raise InputError(KEY, f"column {column.name!r} is empty in {where(row)}")
    words = column.map(_word)
    found = list(words.unique())
    called = _by_name(found) or _by_truth(found, str(column.name))
    if called is None:
        raise InputError(
            KEY,
            f"column {column.name!r} has the values {shortened(found)}; expected train and test (or holdout, "
            "validation, …), or true and false in a column that is called test or train",
        )
    train, test = (np.flatnonzero(words.isin(names)) for names in called)
    rest = len(words) - len(train) - len(test)
    said = (
        f"parts by {column.name}: {len(train)} training rows ({', '.join(called[0])}), {len(test)} test rows "
    )
    left = f"; {rest} rows of other parts are left out" if rest else ""
    return train, test, f"{said}({', '.join(called[1])}){left}"


def _word(value: object) -> str:
    return re.sub(r"^(\d+)\.0+$", r"\1", str(value).strip().casefold())


def _by_name(found: list[str]) -> tuple[list[str], list[str]] | None:
    train, test = ([w for w in found if w in names] for names in (TRAIN, TEST))
    validation = [w for w in found if w in VALIDATION]
    if not train or len(train) + len(test) + len(validation) < len(found):
        return None
    return (train, test or validation) if test or validation else None


def _by_truth(found: list[str], name: str) -> tuple[list[str], list[str]] | None:
    pair = next((p for p in (("0", "1"), *TRUTHS) if set(found) == set(p)), None)
    words = _words(name)
    of_test, of_train = (not words.isdisjoint(called) for called in (TRUE_OF_TEST, TRUE_OF_TRAIN))
    if pair is None or of_test == of_train or not words.isdisjoint(NEGATIONS):
        return None
    no, yes = pair
    return ([no], [yes]) if of_test else ([yes], [no])


def _words(name: str) -> set[str]:
    """Return the words of a column's name, and two that follow each other as one (``hold_out``).

    Words end where no letter follows, and where a capital letter follows a small one. ``is`` before a word,
    and ``set`` after it, are no part of it (``istest``, ``testset``).
    """
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+", apart)]
    words += [f"{one}{other}" for one, other in itertools.pairwise(words)]
    return {*words, *(re.sub(r"^is|sets?$", "", word) for word in words)}
