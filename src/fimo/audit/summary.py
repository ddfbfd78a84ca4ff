"""``audit.json``: what an audit found, in numbers and sentences."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from fimo.audit.calibration import Calibration
from fimo.audit.findings import Findings
from fimo.audit.verdicts import verdicts

FEW_FOUND = 0.9
"""Recall below which the reader is told to verify more rows."""

LOOSE = 0.5
"""Correlation of measured effects with scores below which scores are said to be loose."""

FEW_SEEDS = 3

MOSTLY = 0.5
"""Share of undecided rows above which the leave-out rule's own noise is named."""


def summary_of(findings: Findings) -> dict[str, Any]:
    """Return what JSON can hold; see :class:`~fimo.audit.result.Audit`."""
    question, settings, verified = findings.question, findings.settings, findings.verified
    origin, ids = question.test_origin, question.test_origin.ids
    targets: list[dict[str, Any]] = [{"name": question.targets[0].name, "test_row": None, "test_id": None}]
    targets += [{"name": ids[j], "test_row": int(origin.row[j]), "test_id": ids[j]} for j in question.tests]
    summary: dict[str, Any] = {
        "n": len(question.train),
        "tests": len(question.test),
        "targets": targets,
        "measured": asdict(question.quantity),
        "followed_seeds": list(findings.screened.followed),
        "q": settings.q,
        "method": findings.screened.method,
        "stages": dict(findings.seconds),
        "minutes": sum(findings.seconds.values()) / 60,
        "protocol": protocol_text(findings),
        "verify": settings.verify,
        "distrust": distrust(findings),
    }
    if findings.suspects is not None:
        rate = max((float(findings.suspects.q[row]) for row in findings.suspected), default=0.0)
        count = len(findings.suspected)
        summary["suspects"] = {"count": count, "fdr": rate, "order": findings.suspects.order}
    if verified is None:
        return summary
    found = verdicts(verified.estimates[0].mean, verified.q[0], settings.q, question.quantity.better)
    recall = findings.recall
    assert recall is not None
    summary |= {
        "verified": len(verified.rows),
        "controls": int(verified.chosen.control.sum()),
        **{name: found.count(name) for name in ("helpful", "harmful", "unclear")},
        "seeds": list(verified.seeds),
        "calibration": calibration_of(findings.calibrations[0], int(verified.reference.sum())),
        "recall": {
            "k": recall.k,
            "estimate": recall.estimate,
            "lower": recall.lower,
            "upper": recall.upper,
            "text": (
                f"about {recall.estimate:.0%} of the {recall.k} rows that help most and the {recall.k} that "
                f"harm most are among those verified (90 % interval {recall.lower:.0%} to {recall.upper:.0%})"
            ),
        },
    }
    return summary


def distrust(findings: Findings) -> list[str]:
    """Return what there is to doubt about the effects, in sentences."""
    recall, said = findings.recall, []
    if findings.verified is None or recall is None:
        return [
            "Nothing was verified: effects are predictions to first order, and their error bars contain the "
            "noise of seeds alone."
        ]
    if recall.estimate < FEW_FOUND:
        said.append(
            f"Only {recall.estimate:.0%} of the rows that matter most are expected to be among those "
            f"verified; a larger audit.top than {findings.settings.top} finds more."
        )
    if findings.calibrations[0].correlation < LOOSE:
        said.append("The scores of rows that were not verified say little about their effects.")
    own = findings.verified.chosen.own[0]
    unclear = float((findings.verified.q[0, own] > findings.settings.q).double().mean())
    if unclear > MOSTLY and not findings.question.rule.shares_batches:
        said.append(
            f"{unclear:.0%} of the rows that should matter are unclear: with leave_out="
            f"{findings.question.protocol.leave_out}, a run without a row sees other batches as well, which "
            "drowns small effects; further_training.leave_out=mask measures the row's absence alone."
        )
    if len(findings.verified.seeds) < FEW_SEEDS:
        said.append(f"Effects are means over only {len(findings.verified.seeds)} seeds.")
    return said


def calibration_of(calibration: Calibration, rows: int) -> dict[str, Any]:
    """Return a calibration as JSON can hold it."""
    values = {
        name: None if math.isnan(value := getattr(calibration, name)) else value
        for name in ("slope", "slope_sem", "correlation")
    }
    text = "too few random rows were left out to judge the scores"
    if values["slope"] is not None and values["correlation"] is not None:
        text = (
            f"over {rows} random rows, measured effects are {calibration.slope:.2f} "
            f"(± {calibration.slope_sem:.2f}) times the scores, correlation {calibration.correlation:.2f}"
        )
    return {**values, "text": text}


def protocol_text(findings: Findings) -> str:
    """Return the further training in words."""
    protocol = findings.question.protocol
    amount = f"{protocol.epochs} epochs" if protocol.epochs is not None else f"{protocol.steps} steps"
    return (
        f"{amount} of {protocol.optimizer}, learning rate {protocol.lr:g}, batches of {protocol.batch_size}, "
        f"leaving out by {protocol.leave_out}"
    )
