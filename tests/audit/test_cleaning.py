"""Cleaned tables, and their proof against runs by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tests.cases import CASES, Case
from tests.reference.further_training import plain_run
from torch import nn

from fimo.audit.cleaning import COMPARED, HARMFUL, NOTHING, RANDOM, Halves, cleaned, halves, proof
from fimo.audit.explained import Shown
from fimo.audit.removal import Removal
from fimo.audit.result import PROOF
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel

PROTOCOL = Protocol(lr=0.1, batch_size=5, epochs=3, dtype="float64", leave_out="mask")
SEEDS = [0, 2, 3]


def test_a_cleaned_table_has_all_columns_and_all_rows_but_those_removed() -> None:
    frame = pd.DataFrame({"name": list("abcdefg"), "x": [1.5, None, 3, 4, 5, 6, 7], "note": [""] * 7})
    origin = Origin(np.array([6, 0, 2, 4]), ("g", "a", "c", "e"))  # 1, 3, 5: test rows
    found = cleaned(frame, origin, [0, 2])
    pd.testing.assert_frame_equal(found, frame.drop(index=[6, 2]).reset_index(drop=True))
    pd.testing.assert_frame_equal(cleaned(frame, origin, []), frame)
    kept = cleaned(None, origin, [1])
    assert kept.to_dict("list") == {"row": [2, 4, 6], "id": ["c", "e", "g"]}


def test_halves_share_no_test_instance_and_leave_none_out() -> None:
    first, second = halves(11)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(11))
    assert len(first) == 5
    assert not torch.equal(first, halves(11, seed=1)[0])


def by_hand(case: Case, unit: tuple[int, ...], shown: Shown) -> tuple[np.ndarray, np.ndarray]:
    """Return losses ``[S, J]``, and whether predictions are right or how far they are off."""
    losses, second = [], []
    for seed in SEEDS:
        loss, _, network = plain_run(case.final_model, case.train, case.test, PROTOCOL, seed, unit)
        with torch.no_grad():
            outputs = network.eval()(case.test.inputs)
        y = case.test.targets
        right = (
            (shown.values(outputs) - shown.values(y))[:, 0].abs()
            if y.is_floating_point()
            else (outputs.argmax(1) == y).double()
        )
        losses.append(loss[-1].numpy())
        second.append(right.numpy())
    return np.stack(losses), np.stack(second)


@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification"])
def test_the_proof_is_that_of_runs_by_hand_judged_by_the_other_half(name: str) -> None:
    case = CASES[name]()
    shown = Shown(units=lambda v: 10 * v + 5) if name == "mlp_regression" else Shown()
    tests, chosen = (torch.tensor([0, 3]), torch.tensor([1, 2, 4])), ((1, 4), (4, 7, 9, 11))
    removal = Removal(case.train, PROTOCOL, SEEDS)
    table = proof(case.final_model, case.test, Halves(tests, chosen), removal, shown, draws=3)
    assert list(table) == [*PROOF, *COMPARED]
    second = "error" if name == "mlp_regression" else "accuracy"
    full, without = by_hand(case, (), shown), [by_hand(case, rows, shown) for rows in chosen]
    for k, metric in enumerate(("test loss", second)):
        lines = table[table["metric"] == metric].set_index("removed")
        assert list(lines.index) == [NOTHING, HARMFUL, RANDOM]
        assert lines["rows"].tolist() == [0, 3, 3]
        level = full[k].mean(1)
        crossed = full[k].copy()
        crossed[:, tests[1].numpy()] = without[0][k][:, tests[1].numpy()]
        crossed[:, tests[0].numpy()] = without[1][k][:, tests[0].numpy()]
        change = (crossed - full[k]).mean(1)
        best = lines.loc[HARMFUL]
        assert lines.loc[NOTHING, "mean"] == pytest.approx(level.mean())
        assert lines.loc[NOTHING, "sem"] == pytest.approx(stats.sem(level))
        assert best["mean"] == pytest.approx(crossed.mean(), rel=1e-6)
        assert best["sem"] == pytest.approx(stats.sem(crossed.mean(1)), rel=1e-4, abs=1e-9)
        assert best["change"] == pytest.approx(change.mean(), rel=1e-4, abs=1e-9)
        assert best["change_sem"] == pytest.approx(stats.sem(change), rel=1e-4, abs=1e-9)
        per_test = (crossed - full[k]).mean(0)
        assert best["change_sem_tests"] == pytest.approx(stats.sem(per_test), rel=1e-4, abs=1e-9)
        random = lines.loc[RANDOM]
        assert best["beyond_random"] == pytest.approx(best["change"] - random["change"], abs=1e-12)
        assert random["mean"] == pytest.approx(level.mean() + random["change"])
    assert set(table["seeds"]) == {3}


def test_where_one_half_chose_nothing_the_other_is_as_without_removal() -> None:
    case = CASES["mlp_regression"]()
    tests = halves(5)
    removal = Removal(case.train, PROTOCOL, SEEDS)
    table = proof(case.final_model, case.test, Halves(tests, ((), (2, 3))), removal, draws=2)
    full, without = by_hand(case, (), Shown())[0], by_hand(case, (2, 3), Shown())[0]
    judges = tests[0].numpy()
    change = (without - full)[:, judges].sum(1) / 5
    best = table[(table["removed"] == HARMFUL) & (table["metric"] == "test loss")].iloc[0]
    assert best["change"] == pytest.approx(change.mean(), rel=1e-5)
    assert proof(case.final_model, case.test, Halves(tests, ((), ())), removal).empty


def test_planted_errors_are_worth_removing_and_random_rows_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(140, 5, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    wrong = torch.randperm(100, generator=generator)[:15]
    given = y.clone()
    given[wrong] = 1 - given[wrong]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    train, test = Instances(x[:100], given[:100]), Instances(x[100:], y[100:])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train.inputs), train.targets).backward()
        optimizer.step()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    rows = tuple(wrong.tolist())
    removal = Removal(train, Protocol(lr=0.2, batch_size=20, epochs=10), range(4))
    table = proof(model, test, Halves(halves(40), (rows, rows)), removal, draws=10)
    lines = table.set_index(["metric", "removed"])
    loss, accuracy = lines.loc["test loss"], lines.loc["accuracy"]
    assert loss.loc[HARMFUL, "beyond_random"] < -3 * loss.loc[HARMFUL, "beyond_random_sem"]
    assert accuracy.loc[HARMFUL, "mean"] > accuracy.loc[NOTHING, "mean"]
    assert abs(loss.loc[RANDOM, "change"]) < -loss.loc[HARMFUL, "change"]
