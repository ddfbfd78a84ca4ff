"""What a study answers: measured rows that clearly matter, and the method that would rank the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from fimo.evaluation.ceiling import WANTED
from fimo.reporting.answer import Answer, NamedRow, counted, listed, model_facts
from fimo.reporting.class_effects import ClassEffects, class_effects
from fimo.reporting.findings import all_warnings, at_last_point, same_scores
from fimo.reporting.instance_lines import line
from fimo.reporting.measured_rows import DISCOVERY_RATE, measured_rows
from fimo.reporting.numbers import number
from fimo.reporting.results import Results

MOST_ROWS = 5
"""Of each side on the first screen."""

GOOD, USABLE = 0.9, 0.7
"""Shares of the noise ceiling from which a method's ranking is called good, or good enough for candidates."""


def study_answer(run: Results, rows: pd.DataFrame | None = None) -> Answer:
    """Return the first screen of a study.

    Args:
        rows: of :func:`measured_rows`, where they are known already.
    """
    rows = measured_rows(run) if rows is None else rows
    noun, total = run.noun, run.dataset.get("train")
    clear = rows[rows["verdict"] != "unclear"]
    of_all = f" of {total:,}" if total else ""
    verdict = [
        f"Measured: {len(rows):,}{of_all} training {noun}s, each left out of further training in turn "
        f"({counted(run.seeds, 'seed')}).",
        _clear_sentence(rows, run),
    ]
    measured = run.measured
    helpful, harmful = (named_rows(run, rows, sign * measured.better) for sign in (1, -1))
    return Answer(
        question=f"Which training {noun}s matter to this model?",
        about=_about(run),
        verdict=verdict,
        helpful=helpful,
        harmful=harmful,
        effects=measured.mean,
        helps=f"the {measured.name} {measured.worsens}",
        harms=f"the {measured.name} {measured.improves}",
        others=_others(run),
        do=_advice(run, clear, total),
        distrust=_distrust(run, rows),
        files={
            "report.html": "every measured row, test instance and method",
            "evaluation.csv": "agreement of each method with the measurement",
        },
    )


def _about(run: Results) -> str:
    facts = [run.name]
    if run.dataset.get("train"):
        facts.append(f"{run.dataset['train']:,} training and {run.dataset.get('test', 0):,} test {run.noun}s")
    return " · ".join([*facts, *model_facts(run.final_model)])


def _clear_sentence(rows: pd.DataFrame, run: Results) -> str:
    if rows["q"].isna().all():
        return (
            f"Which {run.noun}s clearly matter can't be told: that takes the spread over at least two seeds."
        )
    counts = rows["verdict"].value_counts()
    helpful, harmful, unclear = (int(counts.get(v, 0)) for v in ("helpful", "harmful", "unclear"))
    if not helpful + harmful:
        return f"None of them clearly matters (false discovery rate {DISCOVERY_RATE:.0%})."
    compared = ", compared with an average one" if run.sensitivity.subtract_mean else ""
    return (
        f"Clearly matter: {helpful} helpful and {harmful} harmful (false discovery rate {DISCOVERY_RATE:.0%}"
        f"{compared}); {unclear} can't be told from no effect."
    )


def named_rows(run: Results, rows: pd.DataFrame, sign: int) -> list[NamedRow]:
    """Return the rows with the largest effects of a sign, for the first screen."""
    side = rows[rows["effect"] * sign > 0].sort_values("effect", ascending=sign < 0, kind="stable")
    found = []
    for row in side.head(MOST_ROWS).itertuples():
        display = run.show("train", int(row.index))  # type: ignore[call-overload]
        error = float(row.error)  # type: ignore[arg-type]
        found.append(
            NamedRow(
                name=str(row.name),
                effect=float(row.effect),  # type: ignore[arg-type]
                error=None if math.isnan(error) else error,
                verdict=str(row.verdict),
                target="" if display is None else number(display.target),
                prediction=""
                if display is None or display.prediction is None
                else number(display.prediction),
                line=line(display),
                image=(display.image or "") if display else "",
            )
        )
    return found


def best_method(run: Results) -> dict[str, Any]:
    """Return the evaluation's row of the method that predicts best, with the method's own name.

    A method that followed the gold standard's own seeds knows part of their noise: it comes after all others.
    ``best`` stands for the method that it chose, where that ran too.
    """
    ranking = at_last_point(run, run.metrics[0])
    fair = ranking[ranking["followed_seeds"] != "same"]
    row: dict[str, Any] = (fair if len(fair) else ranking).to_dict("records")[0]  # type: ignore[assignment]
    twins = next((group for group in same_scores(run) if row["method"] in group), [row["method"]])
    if row["method"] == "best" and len(twins) > 1:
        row["method"] = next(m for m in twins if m != "best")
    return row


def _others(run: Results) -> list[str]:
    best, metric, methods = best_method(run), run.metrics[0], run.evaluation["method"].nunique()
    mean, ceiling, lower = best["mean"], best["ceiling"], best["ceiling_lower"]
    if mean != mean:
        return ["No method's agreement with the measurement is known."]
    share = mean / ceiling if ceiling > 0 else math.nan
    of_all = f", best of {methods} methods" if methods > 1 else ""
    said = f"{best['method']} predicts the measured effects with a {metric} of {mean:.2f}{of_all}"
    if share != share:
        return [f"{said}; there is no noise ceiling to compare with."]
    again = f", and measuring again would give {lower:.2f}" if lower == lower else ""
    said += f"; a perfect method would show {ceiling:.2f}{again}."
    if best["followed_seeds"] == "same":
        said += " It followed the measurement's own seeds and knows part of their noise, so this is too high."
    if share >= GOOD:
        return [said, f"Its ranking of {run.noun}s that were not measured is about as good as a measurement."]
    if share >= USABLE:
        return [said, f"Its ranking of {run.noun}s that were not measured gives candidates, to be measured."]
    return [said, f"That is too little to rank {run.noun}s that were not measured."]


def _advice(run: Results, clear: pd.DataFrame, total: int | None) -> list[str]:
    said = []
    measured = run.measured
    harmful = clear[clear["verdict"] == "harmful"].sort_values("effect", ascending=measured.better > 0)
    if len(harmful):
        plural, average = len(harmful) > 1, run.sensitivity.subtract_mean
        end = "lower" if measured.better > 0 else "higher"
        said.append(
            f"Look at {listed(list(harmful['name']))}: without {'each of them' if plural else 'it'} the test "
            f"{measured.name} ends {end}{f' than without an average {run.noun}' if average else ''}. Check "
            f"{'their targets' if plural else 'its target'} and values before anything is deleted."
        )
    if total is None or len(run.sensitivity.left_out) < total:
        every = f"all {total:,}" if total else "all"
        said.append(
            f"For {every} training {run.noun}s: fimo mode=audit ranks them and measures those that matter."
        )
    if not len(clear):
        more = max(20, 4 * run.seeds)
        said.append(f"More seeds (further_training.seeds={more}) tell smaller effects from none.")
    return said


def _distrust(run: Results, rows: pd.DataFrame) -> list[str]:
    said = list(all_warnings(run))
    last = run.sensitivity.sensitivity
    if (finite := float(last.isfinite().double().mean())) < 1:
        said.append(f"Further training diverged in part: {1 - finite:.1%} of the changes are not finite.")
    if run.seeds > 1 and not any("seed" in s for s in said):
        ceiling = float(best_method(run)["ceiling"])
        if ceiling < WANTED:
            said.append(
                f"Few seeds: the noise ceiling is {ceiling:.2f}; small effects and close ranks are uncertain."
            )
    if (found := _class_effects(run, rows)) is not None:
        classes = [str(t) for t in rows["target"]]
        said += [str(found), found.leading(_helping(run, rows), classes, list(rows["name"]))]
    if run.skipped:
        said.append(f"Not run, or failed: {listed(list(run.skipped))}.")
    return said


def _class_effects(run: Results, rows: pd.DataFrame) -> ClassEffects | None:
    """Return how measured effects follow classes, where they do."""
    if run.dataset.get("task") != "classification" or rows["target"].isna().any():
        return None
    found = class_effects(_helping(run, rows), [str(t) for t in rows["target"]])
    return found if found is not None and found.follow else None


def _helping(run: Results, rows: pd.DataFrame) -> np.ndarray:
    """Return by how much each measured row helps, ``[L]``."""
    return run.measured.better * rows["effect"].to_numpy()


def follows(run: Results, rows: pd.DataFrame) -> str:
    """Return that effects follow classes, as a sentence; empty where they don't."""
    found = _class_effects(run, rows)
    return "" if found is None else str(found)


def within_class(run: Results, rows: pd.DataFrame) -> list[float] | None:
    """Return measured effects minus the mean of their class, where effects follow classes; else None."""
    found = _class_effects(run, rows)
    if found is None:
        return None
    within = found.within(_helping(run, rows), [str(t) for t in rows["target"]])
    return [float(v) for v in run.measured.better * within]
