"""``rows.csv`` and ``pairs.csv``: every training row with its predicted and measured effects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fimo.audit.findings import Findings
from fimo.audit.result import PAIRS, ROWS
from fimo.audit.verdicts import verdicts


def rows_of(findings: Findings) -> pd.DataFrame:
    """Return every training row with its effect on the mean test loss, in the order of the user's file."""
    table = _effects(findings, 0)
    own = findings.screened.self_effect.clone()
    if findings.verified is not None and findings.own_estimates is not None:
        own[findings.verified.rows] = findings.own_estimates.mean
    table["own_loss"] = findings.own_losses.tolist()
    table["self_effect"] = own.tolist()
    table["suspect_q"] = np.nan if findings.suspects is None else findings.suspects.q.tolist()
    table["suggested"] = suggestions(findings)
    return table[list(ROWS)].sort_values("row", kind="stable").reset_index(drop=True)


def pairs_of(findings: Findings) -> pd.DataFrame:
    """Return the same for each named test instance, its rows by the size of their scores."""
    question, tables = findings.question, []
    origin = question.test_origin
    for m, position in enumerate(question.tests, 1):
        table = _effects(findings, m)
        table["test_row"], table["test_id"] = int(origin.row[position]), origin.ids[position]
        table["prediction_effect"], table["prediction_effect_sem"] = np.nan, np.nan
        if findings.verified is not None:
            rows = findings.verified.rows.numpy()
            shown = findings.verified.estimates[question.prediction_targets[m - 1]]
            table.loc[rows, "prediction_effect"] = shown.mean.numpy()
            table.loc[rows, "prediction_effect_sem"] = shown.sem.numpy()
        size = table["score"].abs()
        tables.append(table.loc[size.sort_values(ascending=False, kind="stable").index, list(PAIRS)])
    if not tables:
        return pd.DataFrame(columns=list(PAIRS))
    return pd.concat(tables, ignore_index=True)


def _effects(findings: Findings, m: int) -> pd.DataFrame:
    """Return all N rows, with predicted and measured effects on a target."""
    question, verified = findings.question, findings.verified
    n = len(question.train)
    columns: dict[str, Any] = {
        "row": question.train_origin.row,
        "id": question.train_origin.ids,
        "target": shown_targets(findings),
        "score": findings.screened.score[m].tolist(),
        "score_sem": findings.score_sem[m].tolist(),
        "effect": np.full(n, np.nan),
        "effect_sem": np.full(n, np.nan),
        "q": np.full(n, np.nan),
        "verdict": np.full(n, "", dtype=object),
    }
    if verified is not None:
        rows, estimates = verified.rows.numpy(), verified.estimates[m]
        columns["effect"][rows] = estimates.mean.numpy()
        columns["effect_sem"][rows] = estimates.sem.numpy()
        columns["q"][rows] = verified.q[m].numpy()
        columns["verdict"][rows] = verdicts(
            estimates.mean, verified.q[m], findings.settings.q, question.quantity.better
        )
    return pd.DataFrame(columns)


def suggestions(findings: Findings) -> list[str]:
    """Return as text what each suspect's target should rather be, ``[N]``; empty where a row is none."""
    found, read = [""] * len(findings.question.train), findings.question.read
    if findings.suspects is None:
        return found
    better, of_values = findings.suspects.suggested, findings.suspects.suggested.is_floating_point()
    for row in findings.suspected:
        if of_values:
            found[row] = " ".join(f"{value:.4g}" for value in read.values(better[row]).tolist())
        else:
            found[row] = read.label(int(better[row]))
    return found


def shown_targets(findings: Findings) -> list[str | float | int]:
    """Return labels or target values as people read them."""
    question = findings.question
    if question.shown is not None:
        return list(question.shown)
    targets = question.train.targets
    flat = targets.flatten(1) if targets.ndim > 1 else targets[:, None]
    if flat.shape[1] == 1:
        found: list[str | float | int] = flat[:, 0].tolist()
        return found
    return [" ".join(f"{value:g}" for value in row) for row in flat[:, :8].tolist()]
