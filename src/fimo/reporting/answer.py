"""What a run answers, in sentences and short lists: its page's first screen, and its end in the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimo.reporting.numbers import number

FILE = "answer.json"
"""Of a finished run's folder; :func:`fimo.reporting.show.show` prints it without importing torch."""


@dataclass(frozen=True)
class NamedRow:
    """A training instance that a reader should look at.

    Args:
        name: the user's identifier; else ``row 407``, the data row of the user's file.
        effect: change of the test loss (or what else is measured) by removal.
        error: standard error of the effect; None where it is unknown.
        verdict: ``helpful``, ``harmful`` or ``unclear``; ``predicted`` where it was not measured.
        target, prediction: as people read them; empty where unknown.
        line: its values (or its text) on one line.
        image: a ``data:`` address, where it is a picture.
    """

    name: str
    effect: float
    error: float | None = None
    verdict: str = "unclear"
    target: str = ""
    prediction: str = ""
    line: str = ""
    image: str = ""


@dataclass(frozen=True)
class Answer:
    """The first screen.

    Args:
        question: the title.
        about: data set, sizes, model, on one line.
        verdict: how many rows were measured, and which clearly matter.
        helpful, harmful: rows, the largest effects first.
        effects: of what the rows' effects are, e.g. ``mean test loss``.
        helps, harms: what is seen without a row of each side, in words.
        why: of named test instances, what becomes of their predictions.
        others: how good the ranking of rows that were not measured is.
        do, distrust: sentences.
        files: by name in the run's folder, what each holds.
    """

    question: str
    about: str
    verdict: Sequence[str]
    helpful: Sequence[NamedRow] = ()
    harmful: Sequence[NamedRow] = ()
    effects: str = "mean test loss"
    helps: str = "the loss rises"
    harms: str = "the loss falls"
    why: Sequence[str] = ()
    others: Sequence[str] = ()
    do: Sequence[str] = ()
    distrust: Sequence[str] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``answer.json``."""
        from fimo.store.files import written_aside  # torch, which reading does without

        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)
        with written_aside(folder / FILE) as path:
            path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Answer:
        """Read what :meth:`save` wrote."""
        content: dict[str, Any] = json.loads((folder / FILE).read_text("utf-8"))
        for side in ("helpful", "harmful"):
            content[side] = tuple(NamedRow(**row) for row in content[side])
        return cls(**content)


def model_facts(final_model: Mapping[str, Any]) -> list[str]:
    """Return how good a final model is on test instances, in words; nothing where that is unknown."""
    if (accuracy := final_model.get("test_accuracy")) is not None:
        return [f"the model's test accuracy is {accuracy:.1%}"]
    if (loss := final_model.get("test_loss")) is None:
        return []
    baseline = final_model.get("baseline_loss")
    than = "" if baseline is None else f" (always predicting the average: {number(baseline, 3)})"
    return [f"the model's test loss is {number(loss, 3)}{than}"]


def sentence(text: str) -> str:
    """Return text with a capital letter at its start and a full stop at its end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", ":")) else ".")


def counted(count: int, noun: str) -> str:
    """Return ``1 row`` or ``2,000 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names as a sentence lists them: the first few, and how many more there are."""
    shown = list(names[:most])
    if more := len(names) - len(shown):
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
