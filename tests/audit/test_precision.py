"""Runs of an audit resolve what a row changes."""

from __future__ import annotations

import numpy as np
import pytest
from tests.audit.test_audit import asked
from tests.reference.further_training import plain_run

from fimo.audit.audit import audit
from fimo.audit.precision import resolved
from fimo.audit.question import Resources, Settings
from fimo.audit.screen import screen


def test_effects_below_float32_are_measured_in_float64() -> None:
    question = asked(lr=1e-8)
    found = audit(question, Settings(top=5, seeds=2, controls=8), Resources())
    measured = found.rows[found.rows["verdict"] != ""]
    wide = asked(lr=1e-8, dtype="float64")
    data = (wide.final_model, wide.train, wide.test, wide.protocol)

    def loss(seed: int, row: int | None) -> float:
        return float(plain_run(*data, seed, () if row is None else [row])[0][-1].mean())

    for row, effect in zip(measured["row"], measured["effect"], strict=True):
        truth = np.mean([loss(seed, row) - loss(seed, None) for seed in range(2)])
        assert effect == pytest.approx(truth, rel=1e-4, abs=1e-14)
    assert found.rows["effect"].abs().max() < 1e-8


@pytest.mark.parametrize("rule", ["mask", "shift"])
@pytest.mark.parametrize(("lr", "dtype"), [(0.1, "float32"), (1e-8, "float64")])
def test_float32_stays_where_it_resolves_them(rule: str, lr: float, dtype: str) -> None:
    question = asked((4,), lr=lr, leave_out=rule)
    screened = screen(question, [7, 8], Resources())
    assert resolved(question, screened, Resources()).protocol.dtype == dtype
    asked_for = asked(lr=lr, leave_out=rule, dtype="float64")
    assert resolved(asked_for, screened, Resources()) is asked_for
