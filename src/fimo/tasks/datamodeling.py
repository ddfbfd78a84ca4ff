"""The linear datamodeling score of a run's methods, by further training or by training from scratch."""

from __future__ import annotations

import pandas as pd

from fimo.errors import InputError
from fimo.evaluation.lds import datamodeling_score
from fimo.further_training.sensitivity import Sensitivity
from fimo.reporting.task_curves import DATAMODELING
from fimo.tasks.base import Judged, Task, seeds_of
from fimo.tasks.retraining import check_retraining

KEY = "evaluation.tasks.datamodeling"


class Datamodeling(Task):
    """See :func:`fimo.evaluation.lds.datamodeling_score`.

    Args:
        subsets: M, random sets that are left out.
        share: of the training set that each leaves out.
        start: ``final_model`` further trains from it; ``random`` trains from initial parameters, one for
            each seed, as the score was first defined.
        seeds: how many; None for as many as the gold standard has.
        seed: of the sets.
    """

    curve = DATAMODELING

    def __init__(
        self,
        subsets: int = 50,
        share: float = 0.5,
        start: str = "final_model",
        seeds: int | None = None,
        seed: int = 0,
    ) -> None:
        if start not in ("final_model", "random"):
            raise InputError(f"{KEY}.start", f"expected final_model or random but got {start!r}")
        if not 0 < share < 1:
            raise InputError(f"{KEY}.share", f"expected a share between 0 and 1 but got {share}")
        if subsets < 3:
            raise InputError(f"{KEY}.subsets", f"expected at least 3 but got {subsets}")
        self.subsets, self.share, self.start = subsets, share, start
        self.seeds, self.seed = seeds, seed

    def check(self, run: Judged) -> None:
        if self.start == "random":
            check_retraining(run, f"{KEY}.start")

    def __call__(self, run: Judged) -> pd.DataFrame:
        seeds = seeds_of(self.seeds, run, f"{KEY}.seeds")

        def leave_out(groups: list[list[int]]) -> Sensitivity:
            if self.start == "random":
                return run.retrain(groups, seeds)
            return run.leave_out(groups, seeds)

        scores = run.scores()
        if self.start == "random":  # one evaluation point: the last amount of further training stands for it
            scores = {name: found.at_end() for name, found in scores.items()}
        return datamodeling_score(scores, leave_out, len(run.data.train), self.subsets, self.share, self.seed)
