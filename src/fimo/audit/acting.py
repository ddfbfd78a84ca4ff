"""What follows from verified effects: groups left out together, answers, the cleaned table and its proof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor

from fimo.audit.answers import answer_as_json
from fimo.audit.cleaning import HARMFUL, RANDOM, Halves, cleaned, proof
from fimo.audit.explained import typical_error
from fimo.audit.findings import Findings
from fimo.audit.groups import find_groups, group_table, measure_groups
from fimo.audit.question import Resources
from fimo.audit.removal import Removal
from fimo.audit.verify import Verified
from fimo.audit.why import why
from fimo.data.display import Display, figures
from fimo.further_training.seeds import other_seeds

SEEDS = 5
"""Of groups of rows, whose effects are larger than single rows'."""

SURE = 2.0
"""Standard errors of a change that is taken for sure."""

FEWEST_TESTS = 10
"""Test instances whose halves can judge."""


@dataclass(frozen=True)
class Acting:
    """The stages after verification, each of one job of runs.

    Their seeds are others than those that chose rows: neither those that the screen followed, nor those that
    verified them. So no effect is large because it was chosen for being large.

    Args:
        verified: the findings' own.
        suspects: positions of rows whose labels are probably wrong.
    """

    findings: Findings
    verified: Verified
    resources: Resources
    suspects: tuple[int, ...] = ()

    @cached_property
    def removal(self) -> Removal:
        """Further training without groups of rows, with seeds of its own.

        Where the protocol says ``shift``, the group's losses are dropped from the full run's batches instead
        (``mask``). The other batches that follow under ``shift`` are what verification takes out of single
        rows' effects; a group's can't be taken from random rows, and its last batch of another size may
        change more than the rows do.
        """
        question, settings = self.findings.question, self.findings.settings
        taken = [*range(settings.seeds), *self.findings.screened.followed]
        protocol = question.at_end
        if protocol.leave_out == "shift":
            protocol = replace(protocol, leave_out="mask")
        return Removal(
            question.train, protocol, other_seeds(taken, min(SEEDS, settings.seeds)), self.resources.store,
            self.resources.trainer,
        )  # fmt: skip

    def harmful(self, target: int, chosen: bool) -> list[int]:
        """Return the verified rows that surely harm a target.

        Args:
            chosen: only those that were verified for its sake.
        """
        verified = self.verified
        harmful = self.findings.question.quantity.better * verified.estimates[target].mean < 0
        sure = verified.decided(self.findings.settings.q)[target] & harmful
        return verified.rows[sure & verified.chosen.own[target] if chosen else sure].tolist()

    @property
    def removed(self) -> tuple[int, ...]:
        """Rows that are left out of the cleaned table: those that harm the mean test loss, and suspects."""
        return tuple(sorted({*self.harmful(0, False), *self.suspects}))

    def groups(self) -> pd.DataFrame:
        """Return rows that act together, see :mod:`fimo.audit.groups`."""
        question, score = self.findings.question, self.findings.screened.score[0]
        rows, effects = self._of_tests()
        found = find_groups(question.original or question.train, score, effects, rows)
        measured = measure_groups(found, question.final_model, question.test, self.removal)
        return group_table(
            found, measured, score, question.train_origin, self._display, self.findings.settings.q,
            question.quantity.better,
        )  # fmt: skip

    def _of_tests(self) -> tuple[list[int], Tensor]:
        """Return the rows at the top for the mean test loss, with their effects ``[S, J', R]``."""
        verified, own = self.verified, self.verified.chosen.own[0]
        effects = verified.by_test.double()
        effects = effects[~effects[:, 0].isnan().any(1)]  # seeds with which all rows were left out
        if not self.findings.question.rule.shares_batches:
            effects = effects - effects[..., verified.reference].mean(-1, keepdim=True)
        return verified.rows[own].tolist(), effects[..., own]

    def _display(self, row: int) -> Display:
        question = self.findings.question
        if question.read.row is not None:
            return question.read.row(row)
        return Display("" if question.shown is None else question.shown[row])

    def answers(self) -> list[Mapping[str, Any]]:
        """Return why each named test instance is predicted as it is, see :mod:`fimo.audit.why`."""
        question = self.findings.question
        if not question.tests:
            return []
        scores = self.findings.screened.score[list(question.prediction_targets)]
        found = why(
            question.final_model, question.test, question.predictions, scores, self.removal, question.read
        )
        error = typical_error(question.final_model, question.test, question.read)
        origins = (question.train_origin, question.test_origin)
        return [answer_as_json(answer, question.read, *origins, error) for answer in found]

    def proof(self) -> pd.DataFrame:
        """Return what cleaning is worth, see :func:`fimo.audit.cleaning.proof`."""
        question = self.findings.question
        first = len(question.targets) - 2
        chosen = [tuple(sorted({*self.harmful(first + h, True), *self.suspects})) for h in (0, 1)]
        split = Halves((question.halves[0], question.halves[1]), (chosen[0], chosen[1]))
        return proof(question.final_model, question.test, split, self.removal, question.read)

    def cleaned(self) -> pd.DataFrame:
        """Return the user's table without :attr:`removed`."""
        question = self.findings.question
        table = None if question.read.table is None else question.read.table()
        return cleaned(table, question.train_origin, self.removed)


@dataclass(frozen=True)
class Acted:
    """What the stages after verification found."""

    groups: pd.DataFrame | None = None
    proof: pd.DataFrame | None = None
    cleaned: pd.DataFrame | None = None
    answers: Sequence[Mapping[str, Any]] = ()
    removed: tuple[int, ...] = ()

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """What there is, by name."""
        found = {"groups": self.groups, "proof": self.proof, "cleaned": self.cleaned}
        return {name: table for name, table in found.items() if table is not None}

    @property
    def summary(self) -> dict[str, Any]:
        """What ``audit.json`` says of it."""
        found: dict[str, Any] = {"answers": list(self.answers), "removed": len(self.removed)}
        if self.proof is not None and len(self.proof):
            found["proof"] = proof_in_words(self.proof)
        return found


def proof_in_words(table: pd.DataFrame) -> list[str]:
    """Return in a sentence for each metric what leaving rows out did, and then whether it is worth it."""
    found = []
    for metric, lines in table.groupby("metric", sort=False):
        by: dict[str, dict[str, Any]] = lines.set_index("removed").to_dict("index")  # type: ignore[assignment]
        best, random = by[HARMFUL], by[RANDOM]
        before = best["mean"] - best["change"]
        over_seeds, over_tests = (figures(best[c], 1) for c in ("change_sem", "change_sem_tests"))
        found.append(
            f"without the harmful and suspect rows that one half of the test rows chooses "
            f"({round(best['rows'])} on average), {metric} on the other half goes from {figures(before)} "
            f"to {figures(best['mean'])} ({_change(best, before)} ± {over_seeds} over seeds, ± "
            f"{over_tests} over test rows); without as many random rows it changes by "
            f"{_change(random, before)} ± {figures(random['change_sem'], 1)}"
        )
    return [*found, _worth(table)]


def _worth(table: pd.DataFrame) -> str:
    """Return in words whether the test loss is surely lower, for other seeds and other test rows."""
    of_loss = table[(table["metric"] == "test loss") & (table["removed"] == HARMFUL)].iloc[0]
    change, beyond = float(of_loss["change"]), float(of_loss["beyond_random"])
    error = math.hypot(float(of_loss["change_sem"]), float(of_loss["change_sem_tests"]))
    if change < -SURE * error and beyond < -SURE * float(of_loss["beyond_random_sem"]):
        return "so leaving them out is worth it"
    if change > SURE * error:
        return "so leaving them out is harmful: what is bad for some test rows is good for the others"
    return "so it is not shown that leaving them out is worth it: look at them one by one"


def _change(line: dict[str, Any], before: float) -> str:
    change = float(line["change"])
    if abs(change) < 1e-9 * abs(before):  # a mean of changes that cancel, but for rounding
        return "0"
    return ("+" if change > 0 else "") + figures(change, 2)


def judged(tests: int) -> bool:
    """Return whether there are enough test instances for their halves to judge one another's choices."""
    return tests >= FEWEST_TESTS
