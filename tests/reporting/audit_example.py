"""An audit made up of known effects and noise: houses with prices, or sentences with classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from fimo.audit.result import GROUPS, PAIRS, PROOF, ROWS, Audit
from fimo.reporting.audit_run import AuditRun, test_rows, train_rows
from fimo.reporting.instance_table import InstanceDisplay

Kind = Literal["table", "classes", "text"]
PARTS = ("the food", "a plot", "this camera", "its battery", "the <b>service</b>", "an ending")


def example_audit(kind: Kind = "table", n: int = 300, verified: int = 60, seed: int = 0) -> Audit:
    """Return an audit of n rows, of which the largest ``verified`` and as many random ones were measured."""
    rng = np.random.default_rng(seed)
    classes = np.where(rng.random(n) < 0.5, "positive", "negative")
    truth = rng.standard_t(3, n) * 1e-3
    if kind == "text":  # all that matters is the balance of classes
        truth = np.where(classes == "positive", -2e-3, 2e-3) + 3e-4 * rng.standard_normal(n)
    score_sem = np.full(n, 2e-4)
    score = 0.9 * truth + score_sem * rng.standard_normal(n)
    top = np.argsort(-np.abs(score))[:verified]
    controls = rng.choice(n, verified, replace=False)
    measured = np.zeros(n, bool)
    measured[top] = measured[controls] = True
    effect_sem = np.where(measured, 3e-4, np.nan)
    effect = np.where(measured, truth + 3e-4 * rng.standard_normal(n), np.nan)
    q = np.where(measured, np.exp(-((np.nan_to_num(effect) / 3e-4) ** 2) / 2), np.nan)
    clear = np.where(effect > 0, "helpful", "harmful")
    verdict = np.where(measured, np.where(q <= 0.1, clear, "unclear"), "")
    prices = np.round(rng.lognormal(12.5, 0.4, n), -2)
    own_loss = rng.exponential(0.1, n)
    suspect = np.argsort(-own_loss)[:8]
    suggested, suspect_q = np.full(n, "", object), np.linspace(0.2, 1, n)
    suspect_q[suspect] = np.linspace(0.004, 0.09, 8)
    flipped = np.where(classes == "positive", "negative", "positive")
    suggested[suspect] = flipped[suspect] if kind != "table" else [f"{p * 1.4:.0f}" for p in prices[suspect]]
    # the user's file holds the test rows too, so data rows have gaps
    data_row = np.sort(rng.choice(int(n * 1.2), n, replace=False))
    rows = pd.DataFrame(
        {
            "row": data_row,
            "id": [f"H{row:05d}" for row in data_row] if kind == "table" else data_row.astype(str),
            "target": prices if kind == "table" else classes,
            "score": score,
            "score_sem": score_sem,
            "effect": effect,
            "effect_sem": effect_sem,
            "q": q,
            "verdict": verdict,
            "own_loss": own_loss,
            "self_effect": own_loss * 0.8,
            "suspect_q": suspect_q,
            "suggested": suggested,
        }
    )[list(ROWS)]
    pairs = pd.concat([_pairs(rows, test, kind, rng) for test in (3, 17)], ignore_index=True)
    five, two = ([" ".join(rows[c].head(k).astype(str)) for c in ("row", "id")] for k in (5, 2))
    groups = pd.DataFrame(
        [
            ("g1", "together", 5, *five, 4e-3, 5e-3, 6e-4, 4e-3, 7e-4, 0.01, "helpful", "district=Harbour"),
            ("g2", "duplicates", 2, *two, -1e-3, -8e-4, 6e-4, -9e-4, 7e-4, 0.4, "unclear", "the same values"),
        ],
        columns=list(GROUPS),
    )
    proof = pd.DataFrame(
        [
            (removed, rows_, metric, mean, sem, 10)
            for metric, scale in (("loss", 1.0), ("accuracy", -0.3))
            for removed, rows_, mean, sem in (
                ("what was found", 14, 0.5 - 0.03 * scale, 0.006),
                ("as many random rows", 14, 0.5 + 0.002 * scale, 0.005),
                ("nothing", 0, 0.5, 0.004),
            )
        ],
        columns=list(PROOF),
    )
    counts = rows["verdict"].value_counts()
    summary = {
        "n": n, "tests": 60, "verified": int(measured.sum()), "controls": verified,
        "targets": [{"name": "mean test loss"}],
        **{v: int(counts.get(v, 0)) for v in ("helpful", "harmful", "unclear")},
        "seeds": [0, 1, 2, 3, 4], "q": 0.1, "method": "response",
        "recall": {"k": 20, "estimate": 0.96, "lower": 0.88},
        "calibration": {"slope": 1.08, "slope_sem": 0.06, "correlation": 0.93},
        "suspects": {"count": 8, "fdr": 0.09, "order": "self_effect"},
        "answers": [
            {
                "test_row": 3, "test_id": "H00003" if kind == "table" else "3",
                "target": 250000.0, "prediction": 301200.0, "unit": "EUR",
                "turned_by": None, "prediction_without": 288700.0, "probability": None,
                "removals": [
                    {
                        "side": "lowers", "removed": k, "ids": [f"H{i:05d}" for i in range(k)],
                        "loss_effect": 1e-3 * k, "loss_effect_sem": 1e-4, "change": -600.0 * k,
                        "change_sem": 90.0, "without": 301200 - 600.0 * k, "turned": None, "label": None,
                    }
                    for k in (1, 5, 20)
                ],
                "text": "predicted 301200 EUR; without the 20 rows that raise it most, 289200 EUR",
            }
        ],
        "distrust": ["The model memorised part of its training set."],
        "minutes": 0.9, "stages": {"final_model": 4.1, "screen": 12.5, "verify": 37.0, "suspects": 1.2},
        "protocol": "sgd, lr 0.01, batches of 32, 10 epochs", "verify": True,
    }  # fmt: skip
    return Audit(rows, pairs, groups, proof, None, summary)


def _pairs(rows: pd.DataFrame, test: int, kind: Kind, rng: np.random.Generator) -> pd.DataFrame:
    n = len(rows)
    pairs = rows[["row", "id", "target"]].assign(
        test_row=test,
        test_id=f"H{test:05d}" if kind == "table" else str(test),
        score=rng.standard_t(3, n) * 1e-2,
        score_sem=1e-3,
    )
    large = pairs["score"].abs().rank(ascending=False) <= 20
    effect = np.where(large, pairs["score"] * 1.1, np.nan)
    move = 2000.0 if kind == "table" else 0.05
    pairs = pairs.assign(
        effect=effect,
        effect_sem=np.where(large, 1e-3, np.nan),
        q=np.where(large, 0.01, np.nan),
        verdict=np.where(large, np.where(effect > 0, "helpful", "harmful"), ""),
        prediction_effect=np.where(large, move * rng.standard_normal(n), np.nan),
        prediction_effect_sem=np.where(large, move / 20, np.nan),
    )
    order = pairs["score"].abs().sort_values(ascending=False).index
    return pairs.loc[order, list(PAIRS)]


def example_run(kind: Kind = "table", n: int = 300, **changes: object) -> AuditRun:
    """Return an audit with the rows, or sentences, that its page shows."""
    audit = example_audit(kind, n)
    targets = dict(zip(audit.rows["row"], audit.rows["target"], strict=True))

    def show(row: int) -> InstanceDisplay:
        target = targets.get(row, "positive" if kind != "table" else 250_000)
        target = target if isinstance(target, str) else float(target)
        if kind == "text":
            text = (
                f"I think {PARTS[row % 6]} was {'good' if row % 3 else 'dull'}, and I would say so again. "
                * (1 + row % 4)
            )
            return InstanceDisplay(target, text=text, prediction="positive", loss=0.2)
        district = ("Harbour", "Old Town", "Mill & Meadow")[row % 3]
        values = {
            "area_m2": 60.0 + row % 97, "rooms": 2 + row % 5,
            **{f"district={d}": int(d == district) for d in ("Harbour", "Old Town", "Mill & Meadow")},
            "year_built": 1900 + row % 120, "remark": "sold by <script>alert(1)</script>",
        }  # fmt: skip
        predicted = target * 1.1 if isinstance(target, float) else "negative"
        return InstanceDisplay(target, row=values, prediction=predicted, loss=0.2)

    columns = None if kind == "text" else 7
    content = {
        "name": "houses.csv" if kind == "table" else "reviews.csv",
        "dataset": {"name": "houses.csv", "task": "regression" if kind == "table" else "classification"},
        "final_model": {"train_loss": 0.3, "test_loss": 0.5, "baseline_loss": 1.02},
        "config": {"mode": "audit", "audit": {"top": 20, "q": 0.1}},
        "versions": {"fimo": "0.1.0"},
        "shown": {
            "train": {row: show(row) for row in train_rows(audit, columns)},
            "test": {row: show(row) for row in test_rows(audit)},
        },
    }
    return AuditRun(audit, **(content | changes))  # type: ignore[arg-type]


__all__ = ["example_audit", "example_run"]
