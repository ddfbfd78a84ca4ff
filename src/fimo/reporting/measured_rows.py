"""Every measured training instance of a study, with a verdict that holds for the whole list."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from fimo.further_training.sensitivity import adjust
from fimo.reporting.results import Results

DISCOVERY_RATE = 0.1
"""False discovery rate at which a study's verdicts hold."""


def measured_rows(run: Results, level: float = DISCOVERY_RATE) -> pd.DataFrame:
    """Return a line for each left-out instance: ``index,name,effect,error,agreeing,q,verdict,target``.

    ``effect`` is on the mean test loss (or what else was measured) after all further training, ``error`` its
    standard error over seeds, ``agreeing`` the number of seeds with the effect's sign. ``q`` is the smallest
    false discovery rate at which the effect is told from zero among all measured ones: two-sided t tests over
    seeds, adjusted as Benjamini and Hochberg (1995) do. With one seed (or single seeds not kept) it is NaN,
    and every verdict ``unclear``.
    """
    last = adjust(run.sensitivity.raw[:, -1], run.sensitivity.subtract_mean).double()
    per_seed = last.mean(1).numpy()  # [S, L]
    effect = per_seed.mean(0)
    seeds = len(per_seed)
    error, q = np.full_like(effect, np.nan), np.full_like(effect, np.nan)
    if seeds > 1 and run.has_raw:
        error = per_seed.std(0, ddof=1) / seeds**0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            p = 2 * stats.t.sf(np.abs(effect) / error, seeds - 1)
        known = np.isfinite(p)
        if known.any():
            q[known] = stats.false_discovery_control(p[known])
    clear = np.where(run.measured.better * effect > 0, "helpful", "harmful")
    indices = run.sensitivity.left_out.tolist()
    displays = [run.show("train", i) for i in indices]
    return pd.DataFrame(
        {
            "index": indices,
            "name": [run.called("train", i) for i in indices],
            "effect": effect,
            "error": error,
            "agreeing": (np.sign(per_seed) == np.sign(effect)).sum(0),
            "q": q,
            "verdict": np.where(q <= level, clear, "unclear"),
            "target": [None if d is None else d.target for d in displays],
        }
    )
