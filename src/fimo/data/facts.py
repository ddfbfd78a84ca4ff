"""Made-up facts in sentences, and prompts that ask for them: which sentences state the fact is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fimo.data.language import LanguageData
from fimo.data.passages import Passages, from_table
from fimo.data.tokens import WORDS
from fimo.errors import InputError

RELATIONS = {
    "born": (
        "{} was born in",
        "the birthplace of {} is",
        "{} came into the world in",
        "the cradle of {} stood in",
    ),
    "home": (
        "{} lives in",
        "the home of {} is in",
        "{} has settled down in",
        "the address of {} is in",
    ),
    "work": (
        "{} works in",
        "the office of {} is in",
        "{} has a job in",
        "the employer of {} sits in",
    ),
}
"""Templates by relation; a place follows each. No word tells a relation in two of its templates."""

PLACES = (
    "Lima", "Oslo", "Rome", "Cairo", "Quito", "Delhi", "Turin", "Kyoto", "Accra", "Perth", "Tunis", "Riga",
)  # fmt: skip
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "ni", "pa", "ru", "se", "ti", "vo", "za")


class FactsData(LanguageData):
    """Sentences of invented people's birthplaces, homes and places of work; as prompts, some again.

    A fact is a person, a relation and a place. Several training sentences state it, each by another template
    of the relation; its prompt has yet another one, so that a model has to know that they say the same. Words
    mislead: other facts have the person, or the place, and of some people two relations have the same place,
    so that sentences with both names state another fact.

    Args:
        people: how many.
        statements: training sentences of each fact.
        asked: facts that are asked for, drawn at random.
        same_place: probability that a relation takes the place of the person's relation before it.
        seed: of names, places and templates.
        tokenizer, batch_size, explain: see :class:`~fimo.data.language.LanguageData`.
    """

    def __init__(
        self,
        people: int = 60,
        statements: int = 3,
        asked: int = 40,
        same_place: float = 0.3,
        seed: int = 0,
        tokenizer: str | None = None,
        name: str = "facts",
        batch_size: int = 16,
        explain: str = "instance",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer or WORDS, name=name, batch_size=batch_size, explain=explain, fact="fact"
        )
        templates = min(map(len, RELATIONS.values()))
        facts = people * len(RELATIONS)
        for key, value, least, most in (
            ("people", people, 4, len(SYLLABLES) ** 2),
            ("statements", statements, 1, templates - 1),
            ("asked", asked, 1, facts),
        ):
            if not least <= value <= most:
                raise InputError(f"dataset.{key}", f"expected {least} to {most} but got {value}")
        if not 0 <= same_place <= 1:
            raise InputError("dataset.same_place", f"expected a probability but got {same_place}")
        self.people, self.statements, self.asked = people, statements, asked
        self.same_place, self.seed = same_place, seed

    def read(self) -> tuple[Passages, Passages]:
        train, test = facts(self.people, self.statements, self.asked, self.same_place, self.seed)
        source = Path(self.name or "facts")
        return (
            from_table(train, source, "dataset", self.columns),
            from_table(test, source, "dataset", self.columns, prompts=True),
        )


def facts(
    people: int, statements: int, asked: int, same_place: float, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return sentences (``text, fact``), in random order, and prompts (``prompt, completion, fact``)."""
    generator = np.random.default_rng(seed)
    pairs = generator.permutation(len(SYLLABLES) ** 2)[:people]
    names = [(SYLLABLES[k // len(SYLLABLES)] + SYLLABLES[k % len(SYLLABLES)]).capitalize() for k in pairs]
    sentences, prompts = [], []
    for name in names:
        place = None
        for relation, templates in RELATIONS.items():
            if place is None or generator.random() >= same_place:
                place = PLACES[generator.integers(len(PLACES))]
            fact = f"{name} {relation} {place}"
            begun = [templates[k].format(name) for k in generator.permutation(len(templates))]
            sentences += [(f"{begin} {place}.", fact) for begin in begun[:statements]]
            prompts.append((begun[statements], f" {place}", fact))
    chosen = np.sort(generator.permutation(len(prompts))[:asked])
    order = generator.permutation(len(sentences))
    return (
        pd.DataFrame([sentences[k] for k in order], columns=["text", "fact"]),
        pd.DataFrame([prompts[k] for k in chosen], columns=["prompt", "completion", "fact"]),
    )
