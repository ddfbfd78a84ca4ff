"""How far a score can be trusted: by the amount of further training, by its error bar, and row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from fimo.further_training.sensitivity import adjust
from fimo.reporting.curves import with_epochs
from fimo.reporting.findings import method_order, scored_methods
from fimo.reporting.results import Results

WITHIN = 2.0
"""Standard errors that an interval reaches to each side: 95 % where errors are normal."""


@dataclass(frozen=True)
class Departure:
    """A left-out instance on which a method departs from the measurement.

    Args:
        index: of the training instance.
        difference: root mean square over test instances of score minus sensitivity.
        effect: root mean square of the sensitivity.
        expected: root mean square of what the two standard errors explain, None without them.
    """

    index: int
    difference: float
    effect: float
    expected: float | None


def share_of_ceiling_table(run: Results, metric: str) -> pd.DataFrame:
    """Return ``method,epoch,step,mean,sem,ceiling,ceiling_lower``: agreement and ceilings over the upper one.

    Rows without a ceiling are left out.
    """
    table = run.evaluation
    rows = table[(table["metric"] == metric) & (table["seeds"] == run.seeds) & (table["ceiling"] > 0)]
    columns = ["mean", "sem", "ceiling_lower"]
    share = rows.assign(ceiling=1.0, **{c: rows[c] / rows["ceiling"] for c in columns})
    order = {method: k for k, method in enumerate(method_order(run))}
    return with_epochs(run, share).sort_values("method", key=lambda m: m.map(order), kind="stable")


def coverage(run: Results, method: str, points: Sequence[int] = (0, -1)) -> list[float] | None:
    """Return the share of sensitivities within ``WITHIN`` standard errors of a method's scores.

    The variance is that of the score and of the sensitivity, the latter from its spread over seeds; where
    both follow the same seeds their errors are correlated and the interval is wider than it need be. Scores
    whose bar is withheld (NaN) count as neither.

    Args:
        points: evaluation points along E; the first and the last by default.

    Returns:
        by point; None where the method gives (or withholds) no error bars, or single seeds were not kept.
    """
    shares = []
    for e in points:
        if (error := combined_error(run, method, e)) is None:
            return None
        difference = run.judged_scores(method)[e].double() - run.sensitivity.sensitivity[e].double()
        known = error.isfinite()
        if not known.any():
            return None
        shares.append((difference.abs() <= WITHIN * error)[known].double().mean().item())
    return shares


def combined_error(run: Results, method: str, point: int) -> Tensor | None:
    """Return the standard error ``[J, L]`` of score minus sensitivity at a point, taken as independent."""
    bars = run.errors(method)
    if bars is None or not run.has_raw or len(run.sensitivity.seeds) < 2:
        return None
    changes = adjust(run.sensitivity.raw[:, point], run.sensitivity.subtract_mean).double()
    return (changes.var(0) / len(changes) + bars[point].double().square()).sqrt()


def departures(run: Results, method: str, most: int = 5) -> list[Departure]:
    """Return the instances on which a method that predicts loss changes departs most, at the last point."""
    difference = run.judged_scores(method)[-1].double() - run.sensitivity.sensitivity[-1].double()
    size = difference.square().mean(0).sqrt()
    effect = run.sensitivity.sensitivity[-1].double().square().mean(0).sqrt()
    error = combined_error(run, method, -1)
    expected = None if error is None or error.isnan().all() else error.square().nanmean(0).sqrt()
    return [
        Departure(
            int(run.sensitivity.left_out[k]),
            float(size[k]),
            float(effect[k]),
            None if expected is None else float(expected[k]),
        )
        for k in size.argsort(descending=True)[:most].tolist()
    ]


def trusted_methods(run: Results) -> list[str]:
    """Return the methods that predict loss changes at each amount of further training, best first."""
    return [method for method in scored_methods(run) if run.predicts_raw_changes(method)]
