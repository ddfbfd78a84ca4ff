"""The gold standard as distributions over seeds: what leaving out does to them."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from fimo.errors import InputError
from fimo.tasks.base import Judged, Task, seeds_of

KEY = "evaluation.tasks.distribution"


class Distribution(Task):
    """See :meth:`fimo.Sensitivity.distribution`; it is read from the gold standard's own runs.

    Args:
        permutations: by which p-values are computed.
        seeds: how many; None for as many as the gold standard has.
        seed: of the permutations.
    """

    def __init__(self, permutations: int = 999, seeds: int | None = None, seed: int = 0) -> None:
        if permutations < 1:
            raise InputError(f"{KEY}.permutations", f"expected at least 1 but got {permutations}")
        self.permutations, self.seeds, self.seed = permutations, seeds, seed

    def check(self, run: Judged) -> None:
        if len(seeds_of(self.seeds, run, f"{KEY}.seeds")) < 2:
            raise InputError(f"{KEY}.seeds", "a distribution over seeds needs at least 2 but there is 1")

    def __call__(self, run: Judged) -> pd.DataFrame:
        found = run.leave_out(run.left_out, seeds_of(self.seeds, run, f"{KEY}.seeds"))
        train, test = (torch.from_numpy(run.data.origin(split).row) for split in ("train", "test"))
        named = replace(found, left_out_row=train[found.left_out], test_row=test[found.test])
        return named.distribution(permutations=self.permutations, seed=self.seed)
