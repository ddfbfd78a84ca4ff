"""What an audit answers: rows that surely matter, how good the ranking of the others is, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fimo.audit.result import KEPT
from fimo.reporting.answer import Answer, NamedRow, counted, listed, model_facts, sentence
from fimo.reporting.audit_run import AuditRun
from fimo.reporting.class_effects import ClassEffects, class_effects
from fimo.reporting.findings import poor_model
from fimo.reporting.instance_lines import line
from fimo.reporting.numbers import MINUS, number

MOST_ROWS = 5
"""Of each side on the first screen."""

SIDES = {"lowers": "raise it most", "raises": "lower it most"}
"""Of removals: what the rows do to a prediction, by what becomes of it without them."""

MOST_TESTS = 3
"""Named test instances whose answers are on the first screen."""


def audit_answer(run: AuditRun) -> Answer:
    """Return the first screen of an audit."""
    answers, measured = run.audit.summary.get("answers", []), run.audit.measured
    return Answer(
        question=f"Which training {run.noun}s matter to this model?",
        about=_about(run),
        verdict=_verdict(run),
        why=[f"{test_name(a)}: {in_short(a)}" for a in answers[:MOST_TESTS] if a.get("text")],
        helpful=_named(run, measured.better),
        harmful=_named(run, -measured.better),
        effects=measured.mean,
        helps=f"the {measured.name} {measured.worsens}",
        harms=f"the {measured.name} {measured.improves}",
        others=_others(run),
        do=_advice(run),
        distrust=_distrust(run),
        files={
            "rows.csv": f"every training {run.noun}, ranked, with what was measured",
            **({"pairs.csv": "the same for named test instances"} if len(run.audit.pairs) else {}),
            **({"groups.csv": f"{run.noun}s that act together"} if len(run.audit.groups) else {}),
            **({"suspects.csv": f"{run.noun}s whose target may be wrong"} if len(run.audit.suspects) else {}),
            **({"cleaned.csv": _cleaned(run)} if run.audit.cleaned is not None else {}),
            "report.html": "all of it, to look at",
        },
    )


def row_name(row: Any) -> str:
    """Return what a line of ``rows.csv`` is called: its identifier, else its data row."""
    identifier = str(row.id)
    return f"row {identifier}" if identifier == str(row.row) else identifier


def test_name(answer: Mapping[str, Any]) -> str:
    """Return what a named test instance is called."""
    identifier = str(answer["test_id"])
    return f"Test row {identifier}" if identifier == str(answer["test_row"]) else identifier


def in_short(answer: Mapping[str, Any]) -> str:
    """Return what becomes of a prediction without its foremost rows, in a short sentence."""
    steps: list[Mapping[str, Any]] = answer.get("removals") or []
    if not steps:
        return sentence(str(answer["text"]))
    last, turned = steps[-1], answer.get("turned_by")
    if last.get("label"):
        head = f"predicted {answer['prediction']} with probability {answer['probability']:.2f}"
        if turned is not None:
            return f"{head}; without {counted(turned, 'row')} it is {answer['prediction_without']}."
        return f"{head}; it stays so without {counted(last['removed'], 'row')} that support it most."
    unit = f" {answer['unit']}" if answer.get("unit") else ""
    parts = [f"predicted {number(answer['prediction'])}{unit}"]
    for side, word in SIDES.items():
        of_side = [step for step in steps if step["side"] == side]
        if of_side:
            step = of_side[-1]
            moved = f"{step['change']:+.3g}" if abs(step["change"]) < 1000 else f"{step['change']:+.0f}"
            moved = f"{moved} ± {number(step['change_sem'], 2)}".replace("-", MINUS)
            parts.append(f"{moved} without the {counted(step['removed'], 'row')} that {word}")
    return "; ".join(parts) + "."


def effects_by_class(run: AuditRun) -> ClassEffects | None:
    """Return how far the screen's effects follow the rows' classes; None for regression."""
    rows, task = run.audit.rows, run.dataset.get("task")
    if task is None:
        numeric = pd.to_numeric(rows["target"], errors="coerce")
        whole = bool((numeric.dropna() % 1 == 0).all())
        task = "classification" if numeric.isna().any() or whole else "regression"
    if task != "classification":
        return None
    return class_effects(helping(run), [str(t) for t in rows["target"]])


def helping(run: AuditRun) -> np.ndarray:
    """Return by how much each row is predicted to help, ``[N]``."""
    return run.audit.measured.better * run.audit.rows["score"].to_numpy(float)


def _cleaned(run: AuditRun) -> str:
    cleaned = run.audit.cleaned
    if cleaned is not None and list(cleaned) == [*KEPT]:
        return f"row and id of each {run.noun} that is left without what was found"
    return "your table without what was found"


def _about(run: AuditRun) -> str:
    summary = run.audit.summary
    facts = [str(run.dataset.get("name") or run.name)] if run.dataset.get("name") or run.name else []
    n, tests = summary.get("n", len(run.audit.rows)), summary.get("tests")
    facts.append(f"{n:,} training{f' and {tests:,} test' if tests else ''} {run.noun}s")
    return " · ".join([*facts, *model_facts(run.final_model)])


def _verdict(run: AuditRun) -> list[str]:
    rows, summary = run.audit.rows, run.audit.summary
    n = int(summary.get("n", len(rows)))
    counts = rows["verdict"].value_counts()
    helpful, harmful, unclear = (
        int(summary.get(v, counts.get(v, 0))) for v in ("helpful", "harmful", "unclear")
    )
    verified = int(summary.get("verified", rows["effect"].notna().sum()))
    if not verified:
        return [f"All {n:,} training {run.noun}s are ranked; none was measured, so no {run.noun} is sure."]
    seeds = len(summary.get("seeds", []))
    over = f" ({'up to ' if seeds > 1 else ''}{counted(seeds, 'seed')})" if seeds else ""
    q = summary.get("q", 0.1)
    return [
        f"Measured: {verified:,} of {n:,} training {run.noun}s, each by further training with and without it"
        f"{over}. The others are ranked by {summary.get('method', 'a screen')}.",
        f"Clearly matter: {helpful} helpful and {harmful} harmful (false discovery rate {q:.0%}); {unclear} "
        "can't be told from no effect."
        if helpful + harmful
        else f"None of the measured {run.noun}s clearly matters (false discovery rate {q:.0%}).",
    ]


def _named(run: AuditRun, sign: int) -> list[NamedRow]:
    """Return the measured rows with the largest effects of a sign, clear ones first; else predicted ones."""
    rows = run.audit.rows
    measured = rows[rows["effect"].notna()]
    predicted = not len(measured)
    column = "score" if predicted else "effect"
    side = (rows if predicted else measured).assign(
        clear=lambda t: t["verdict"].isin(["helpful", "harmful"]), size=lambda t: t[column].abs()
    )
    side = side[side[column] * sign > 0].sort_values(["clear", "size"], ascending=False, kind="stable")
    found = []
    for row in side.head(MOST_ROWS).itertuples():
        display = run.show("train", int(row.row))  # type: ignore[arg-type]
        error = float(getattr(row, f"{column}_sem"))
        found.append(
            NamedRow(
                name=row_name(row),
                effect=float(getattr(row, column)),
                error=None if math.isnan(error) else error,
                verdict="predicted" if predicted else str(row.verdict) or "unclear",
                target=number(_target(row.target)),
                prediction=""
                if display is None or display.prediction is None
                else number(display.prediction),
                line=line(display),
                image=(display.image or "") if display else "",
            )
        )
    return found


def _target(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _others(run: AuditRun) -> list[str]:
    summary = run.audit.summary
    said = []
    recall: Mapping[str, Any] = summary.get("recall") or {}
    if recall.get("text"):
        said.append(sentence(str(recall["text"])))
    elif recall.get("estimate") is not None:
        low, high = recall.get("lower"), recall.get("upper")
        between = f" (at least {low:.0%})" if low is not None and high is None else ""
        said.append(
            f"Of the {recall.get('k', '')} {run.noun}s with the largest true effects, an estimated "
            f"{recall['estimate']:.0%}{between} were measured."
        )
    calibration: Mapping[str, Any] = summary.get("calibration") or {}
    if calibration.get("text"):
        said.append(sentence(str(calibration["text"])))
    elif calibration.get("slope") is not None:
        error = calibration.get("slope_sem")
        bar = "" if error is None else f" ± {error:.2f}"
        text = f"A measured effect is {calibration['slope']:.2f}{bar} times the predicted one"
        correlation = calibration.get("correlation")
        with_it = "" if correlation is None else f" (correlation {correlation:.2f})"
        said.append(
            f"{text}{with_it}, judged by {counted(int(summary.get('controls', 0)), 'random control')}."
        )
    return said


def _advice(run: AuditRun) -> list[str]:
    audit, summary = run.audit, run.audit.summary
    if summary.get("do"):
        return [sentence(str(s)) for s in summary["do"]]
    said = []
    listed_suspects = audit.suspects
    if len(listed_suspects):
        first = listed([row_name(r) for r in listed_suspects.itertuples()])
        said.append(f"Check the targets of {counted(len(listed_suspects), 'suspect')}: {first}.")
    harmful = audit.rows[audit.rows["verdict"] == "harmful"]
    if len(harmful):
        measured = audit.measured
        harmful = harmful.sort_values("effect", ascending=measured.better > 0, kind="stable")
        said.append(
            f"Look at {listed([row_name(r) for r in harmful.itertuples()])}: the test {measured.name} "
            f"{measured.improves} without {'each of them' if len(harmful) > 1 else 'it'}."
        )
    said += _proof(run)
    if audit.cleaned is not None and len(audit.proof):
        said.append("cleaned.csv is without them.")
    if not audit.rows["effect"].notna().any():
        said.append("Measure before you act: audit.verify=true.")
    return said


def _proof(run: AuditRun) -> list[str]:
    """Return what further training without the rows that were found gives, beside its alternatives."""
    said = [sentence(str(s)) for s in run.audit.summary.get("proof", [])]
    if said:
        return said
    for metric, table in run.audit.proof.groupby("metric", sort=False):
        parts = [f"{row.mean:.4g} ± {row.sem:.2g} without {row.removed}" for row in table.itertuples()]
        said.append(f"Tried on test rows that did not choose them, {metric}: {'; '.join(parts)}.")
    return said


def _distrust(run: AuditRun) -> list[str]:
    said = [*poor_model(run.final_model), *(sentence(str(s)) for s in run.audit.summary.get("distrust", []))]
    found = effects_by_class(run)
    if found is not None and found.follow:
        rows = run.audit.rows
        classes, names = [str(t) for t in rows["target"]], [row_name(r) for r in rows.itertuples()]
        said += [str(found), found.leading(helping(run), classes, names)]
    return said
