"""Instances as a reader sees them: a row in the table's own units, a sentence, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from fimo.data.display import Display
from fimo.further_training.sensitivity import Sensitivity

Split = Literal["train", "test"]
Value = float | int | str


@dataclass(frozen=True)
class InstanceDisplay(Display):
    """An instance for people to read, with what the final model makes of it.

    Args:
        prediction: of the final model, as ``target``.
        loss: of the final model.
        tokens: of a sequence whose tokens are predicted: the text of each.
        token_losses: of the final model on each of them; None of a prompt's, and of the first.
    """

    prediction: Value | None = None
    loss: float | None = None
    tokens: tuple[str, ...] | None = None
    token_losses: tuple[float | None, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, without what is absent."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Show(Protocol):
    """How a data set shows an instance: its split, and its index there."""

    def __call__(self, split: Split, index: int) -> InstanceDisplay: ...


Shown = Mapping[str, Mapping[int, InstanceDisplay]]
"""By split (``train``, ``test``), then by index there."""


def collect(
    sensitivity: Sensitivity, show: Show, tests: int = 30, per_test: int = 5, overall: int = 10
) -> Shown:
    """Ask for the instances that a report shows, and for no others (pictures are large).

    Args:
        tests: most test instances that a reader can choose from.
        per_test: most helpful and most harmful training instances of each of them.
        overall: the same over all test instances.
    """
    wanted = chosen_tests(sensitivity, tests)
    last = sensitivity.sensitivity[-1]
    left_out = set(extremes(last.mean(0), overall))
    for position in wanted:
        left_out.update(extremes(last[position], per_test))
    return {
        "train": {i: show("train", i) for i in sorted(sensitivity.left_out[list(left_out)].tolist())},
        "test": {j: show("test", j) for j in sensitivity.test[wanted].tolist()},
    }


def chosen_tests(sensitivity: Sensitivity, most: int = 30) -> list[int]:
    """Return positions along J: all, or ``most`` evenly spaced ones."""
    total = len(sensitivity.test)
    most = min(most, total)
    return sorted({position * total // most for position in range(most)})


def extremes(values: Tensor, k: int) -> Iterable[int]:
    """Return the positions of the k largest and k smallest values ``[L]``."""
    order = values.argsort(descending=True).tolist()
    return [*order[:k], *order[-k:]]


def noun(shown: Shown) -> str:
    """Return what an instance of a data set is called: ``row``, ``text`` or ``picture``."""
    displays = [d for instances in shown.values() for d in instances.values()]
    for kind, word in (("image", "picture"), ("text", "text")):
        if any(getattr(display, kind) for display in displays):
            return word
    return "row"
