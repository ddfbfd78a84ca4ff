"""Counterfactual removal curves of a run's methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from fimo.errors import InputError
from fimo.evaluation.counterfactual import removal_curves
from fimo.reporting.task_curves import REMOVAL
from fimo.tasks.base import Judged, Task, better, seeds_of

KEY = "evaluation.tasks.removal"


class Removal(Task):
    """See :func:`fimo.evaluation.counterfactual.removal_curves`.

    Args:
        counts: how many of the most helpful instances are left out together, one point of a curve each.
        random_sets: random sets of each count, for the curve of chance.
        seeds: of further training; None for as many as the gold standard has.
        seed: of the random sets.
    """

    curve = REMOVAL

    def __init__(
        self,
        counts: Sequence[int] = (1, 3, 10, 30),
        random_sets: int = 5,
        seeds: int | None = None,
        seed: int = 0,
    ) -> None:
        if not counts or min(counts) < 1:
            raise InputError(f"{KEY}.counts", f"expected numbers of at least 1 but got {list(counts)}")
        if random_sets < 1:
            raise InputError(f"{KEY}.random_sets", f"expected at least 1 but got {random_sets}")
        self.counts, self.random_sets = sorted(set(counts)), random_sets
        self.seeds, self.seed = seeds, seed

    def check(self, run: Judged) -> None:
        if self.counts[-1] >= len(run.data.train):
            raise InputError(
                f"{KEY}.counts", f"expected fewer than all {len(run.data.train)} but got {self.counts[-1]}"
            )

        better(run)

    def __call__(self, run: Judged) -> pd.DataFrame:
        seeds, sign = seeds_of(self.seeds, run, f"{KEY}.seeds"), better(run)
        return removal_curves(
            {name: replace(found, values=sign * found.values) for name, found in run.scores().items()},
            lambda groups: run.leave_out(groups, seeds),
            len(run.data.train),
            self.counts,
            self.random_sets,
            self.seed,
        )
