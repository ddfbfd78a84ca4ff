"""What a run says, in rows and sentences: the headline, the verdict on methods, the warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from fimo.evaluation.ceiling import WANTED, not_enough_seeds, seeds_for
from fimo.further_training.sensitivity import adjust
from fimo.reporting.results import Results
from fimo.reporting.style import BASELINES


@dataclass(frozen=True)
class Influence:
    """How much leaving one training instance out changes the test loss, or what else was measured.

    Args:
        index: into the training set.
        effect: adjusted change, mean over seeds.
        error: its standard error over seeds; NaN with one seed.
        seeds_agreeing: in how many seeds the change has the sign of the mean.
        seeds: in all.
    """

    index: int
    effect: float
    error: float
    seeds_agreeing: int
    seeds: int

    @property
    def clear(self) -> bool | None:
        """Whether the effect is more than two standard errors from zero; None with one seed."""
        return None if math.isnan(self.error) else abs(self.effect) > 2 * self.error


def influences(
    results: Results, position: int | None = None, k: int = 10
) -> tuple[list[Influence], list[Influence]]:
    """Return the k most helpful and k most harmful left-out instances at the last evaluation point.

    Args:
        position: of a test instance along J; the mean over all test instances when None.
    """
    last = adjust(results.sensitivity.raw[:, -1], results.sensitivity.subtract_mean).double()
    per_seed = last.mean(1) if position is None else last[:, position]  # [S, L]
    effect = per_seed.mean(0)
    seeds = len(per_seed)
    many = seeds > 1 and results.has_raw
    error = per_seed.std(0) / seeds**0.5 if many else torch.full_like(effect, torch.nan)
    agreeing = (per_seed.sign() == effect.sign()).sum(0)

    def describe(order: Tensor) -> list[Influence]:
        return [
            Influence(
                int(results.sensitivity.left_out[i]),
                effect[i].item(),
                error[i].item(),
                int(agreeing[i]),
                seeds,
            )
            for i in order.tolist()
        ]

    helping = results.measured.better * effect
    order = helping.argsort(descending=True)
    helpful, harmful = order[:k], order.flip(0)[:k]
    return describe(helpful[helping[helpful] > 0]), describe(harmful[helping[harmful] < 0])


def at_last_point(results: Results, metric: str) -> pd.DataFrame:
    """Return each method's row of the evaluation at the last point with all seeds, best first."""
    table = results.evaluation
    rows = table[(table.metric == metric) & (table.seeds == results.seeds) & (table.step == table.step.max())]
    best: pd.DataFrame = rows.sort_values("mean", ascending=False, na_position="last")
    return best


def method_order(results: Results) -> list[str]:
    """Return methods by agreement at the last point, best first."""
    return list(at_last_point(results, results.metrics[0])["method"])


MOST_HIGHLIGHTED = 8
"""Lines that a reader can tell apart."""


def all_methods(runs: Sequence[Results]) -> list[str]:
    """Return the methods of several runs by their mean agreement at the last point, best first."""
    rows = pd.concat([at_last_point(run, run.metrics[0]) for run in runs])
    means = rows.groupby("method", sort=False)["mean"].mean()
    return list(means.sort_values(ascending=False, kind="stable", na_position="last").index)


def highlighted(runs: Sequence[Results]) -> list[str]:
    """Return the methods that figures draw in colours of their own, best first: at most eight.

    The best five, Grad-Dot (which the others refine) and baselines that know nothing, then the next best;
    of methods with the same scores, one.
    """
    methods = all_methods(runs)
    if len(methods) <= MOST_HIGHLIGHTED:
        return methods
    twins = set.intersection(*({m for group in same_scores(run) for m in _covered(group)} for run in runs))
    single = [m for m in methods if m not in twins]
    wanted = [*single[:5], *(m for m in ("graddot", *BASELINES) if m in single), *single]
    chosen = [*dict.fromkeys(wanted)][:MOST_HIGHLIGHTED]
    return [m for m in methods if m in chosen]


def compared(runs: Sequence[Results]) -> list[str]:
    """Return those of the highlighted methods that more than one run has, best first; no baselines."""
    has = [set(run.evaluation["method"]) for run in runs]
    return [m for m in highlighted(runs) if m not in BASELINES and sum(m in names for names in has) > 1]


def _covered(group: Sequence[str]) -> list[str]:
    """Return the methods with the same scores as another that stands for them: Grad-Dot, else the first."""
    known = "graddot" if "graddot" in group else group[0]
    return [method for method in group if method != known]


def scored_methods(results: Results) -> list[str]:
    """Return the methods whose scores were kept, best first."""
    return [method for method in method_order(results) if method in results.scores]


def above_ceiling(results: Results) -> list[str]:
    """Return methods whose agreement at the last point exceeds the noise ceiling by two standard errors.

    The ceiling is that of the noiseless sensitivity. A method that follows the very runs of the gold
    standard's seeds (:func:`same_seeds`) can predict part of their noise, and so exceed it.
    """
    rows = at_last_point(results, results.metrics[0])
    return list(rows[rows["mean"] > rows["ceiling"] + 2 * rows["sem"].fillna(0)]["method"])


def same_seeds(runs: Sequence[Results]) -> list[str]:
    """Return methods that followed seeds of the gold standard's own in some run, whose noise they know."""
    tables = [run.evaluation for run in runs]
    return [*dict.fromkeys(m for t in tables for m in t[t["followed_seeds"] == "same"]["method"])]


def label(method: str, runs: Sequence[Results]) -> str:
    """Return a method's name in a legend, which says where it followed the gold standard's own seeds."""
    return f"{method} (same seeds)" if method in same_seeds(runs) else method


def same_scores(results: Results) -> list[list[str]]:
    """Return groups of methods whose scores are the same up to a positive factor, so that curves coincide."""
    groups: list[list[str]] = []
    for method in scored_methods(results):
        for group in groups:
            if _proportional(results.scores[group[0]].values, results.scores[method].values):
                group.append(method)
                break
        else:
            groups.append([method])
    return [group for group in groups if len(group) > 1]


def _proportional(u: Tensor, v: Tensor) -> bool:
    """Return whether scores are the same up to a positive factor; looking at the last ones first."""
    if u.shape != v.shape:
        return False
    for one, other in ((u[-1], v[-1]), (u, v)):
        if not (one.isfinite().all() and other.isfinite().all()):
            return False
        one, other = (x.double() / x.double().norm().clamp(min=1e-300) for x in (one, other))
        if (one - other).norm() >= 1e-4:
            return False
    return True


def mean_test_loss(results: Results) -> float:
    """Return the final model's test loss, NaN where unknown."""
    return float(results.final_model.get("test_loss") or math.nan)


def poor_model(numbers: Mapping[str, float]) -> list[str]:
    """Return what is wrong with the final model: a reader should not trust attributions of a bad one.

    Args:
        numbers: ``train_loss, test_loss, baseline_loss, test_accuracy, baseline_accuracy``, where known.
    """
    found = []
    test, train, baseline = (numbers.get(k) for k in ("test_loss", "train_loss", "baseline_loss"))
    if test is not None and baseline is not None and test >= baseline:
        found.append(
            f"The final model is bad: its test loss ({test:.4g}) is no better than that of always predicting "
            f"the training targets' mean or class shares ({baseline:.4g}). What it is sensitive to says "
            "little about the data."
        )
    accuracy, most = numbers.get("test_accuracy"), numbers.get("baseline_accuracy")
    if accuracy is not None and most is not None and accuracy <= most:
        found.append(
            f"The final model is bad: its test accuracy ({accuracy:.1%}) is no better than that of always "
            f"predicting the most common class ({most:.1%})."
        )
    if test is not None and train is not None and train > 0 and test > 20 * train:
        found.append(
            f"The final model fits its training set far better than new data (test loss {test:.4g}, training "
            f"loss {train:.4g}): it has probably memorised it."
        )
    return found


def further_training_warnings(results: Results) -> list[str]:
    """Return what limits the gold standard."""
    found = []
    if results.seeds == 1:
        found.append(
            "Further training was run with one seed: how much of a sensitivity is chance can't be told, and "
            "there is no noise ceiling. Use further_training.seeds=5 or more."
        )
    metric, last = results.metrics[0], at_last_point(results, results.metrics[0])
    ceiling = float(last["ceiling"].iloc[0]) if len(last) else math.nan
    if (said := not_enough_seeds(ceiling, results.seeds, metric)) is not None:
        found.append(said)
    elif ceiling < 0.7:
        found.append(
            f"The gold standard is noisy: even a perfect method would reach only {ceiling:.2f} "
            f"({metric}). About {seeds_for(ceiling, results.seeds)} seeds would raise that to {WANTED}."
        )
    return found


def all_warnings(results: Results) -> list[str]:
    """Return every warning, the gravest first, each once."""
    return list(
        dict.fromkeys(
            [*poor_model(results.final_model), *further_training_warnings(results), *results.warnings]
        )
    )
