"""What an audit says beyond single rows, from the question to the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.reference.further_training import plain_run
from torch import nn

import fimo
from fimo import FinalModel, Protocol
from fimo.audit import Audit
from fimo.audit.acting import Acting, proof_in_words
from fimo.audit.audit import audit
from fimo.audit.explained import Shown
from fimo.audit.findings import Findings
from fimo.audit.question import Question, Resources, Settings
from fimo.audit.screen import screen
from fimo.audit.verify import verify
from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.data.origin import Origin

N, WRONG = 90, 12


def planted() -> Question:
    """Two classes of which some rows have the wrong label, and three rows the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + 40, 4, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    given = y.clone()
    given[:WRONG] = 1 - given[:WRONG]
    x[[31, 32]], given[[31, 32]] = x[[30, 30]], given[[30, 30]]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2))
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[:N]), given[:N]).backward()
        optimizer.step()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    train, test = Instances(x[:N], given[:N]), Instances(x[N:], y[N:])
    protocol = Protocol(lr=0.2, batch_size=15, epochs=4, leave_out="mask")
    table = pd.DataFrame(x.numpy(), columns=list("abcd"))  # of all rows, those of the test part first
    origin = Origin(np.arange(40, 40 + N), tuple(f"r{k}" for k in range(N)))

    def row(k: int) -> Display:
        return Display(str(int(given[k])), dict(table.iloc[k]))

    read = Shown(("no", "yes"), row=row, table=lambda: pd.concat([table[N:], table[:N]], ignore_index=True))
    return Question(model, train, test, protocol, (3, 8), origin, Origin.counted(40), read=read)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    made = audit(planted(), Settings(top=15, seeds=4), Resources())
    made.save(tmp_path_factory.mktemp("audit"))
    return made


def chances(question: Question, unit: tuple[int, ...], position: int) -> np.ndarray:
    """Return the probabilities ``[S, C]`` of a test instance by plain loops over the verification's seeds."""
    found = []
    for seed in range(4):
        network = plain_run(
            question.final_model, question.train, question.test, question.protocol, seed, unit
        )[2]
        with torch.no_grad():
            odds = network.eval()(question.test.inputs[position]).double().exp()
        found.append((odds / odds.sum()).numpy())
    return np.stack(found)


def test_pairs_have_the_measured_effect_on_the_probability_of_the_predicted_class(found: Audit) -> None:
    question = planted()
    for position in question.tests:
        of_test = found.pairs[(found.pairs["test_row"] == position) & (found.pairs["verdict"] != "")]
        predicted = int(question.final_model.outputs(question.test)[position].argmax())
        full = chances(question, (), position)[:, predicted]
        for _, pair in of_test.head(2).iterrows():
            without = chances(question, (int(pair["row"]) - 40,), position)[:, predicted]
            expected = (without - full).mean()
            assert pair["prediction_effect"] == pytest.approx(expected, rel=2e-3, abs=1e-6)
            assert (
                pair["prediction_effect"]
                * pair["effect"]
                * (-1 if predicted == int(question.test.targets[position]) else 1)
                > 0
            )
    assert found.pairs.loc[found.pairs["verdict"] == "", "prediction_effect"].isna().all()


def test_planted_duplicates_are_a_group_with_its_effect_and_ids(found: Audit) -> None:
    group = found.groups[found.groups["kind"] == "duplicates"].iloc[0]
    assert (group["rows"], group["ids"], group["size"]) == ("70 71 72", "r30 r31 r32", 3)
    assert group["shared"].startswith("all ")
    assert found.groups["verdict"].isin(["helpful", "harmful", "unclear"]).all()
    harmful = found.groups[(found.groups["kind"] == "cluster") & (found.groups["verdict"] == "harmful")]
    members = {int(row) - 40 for rows in harmful["rows"] for row in rows.split()}
    assert len(members) >= 6
    assert len(members & set(range(WRONG))) / len(members) > 3 * WRONG / N


def test_the_cleaned_table_lacks_what_harms_and_the_proof_judges_it(found: Audit) -> None:
    harmful = found.rows[found.rows["verdict"] == "harmful"]
    assert found.cleaned is not None
    assert len(found.cleaned) == 40 + N - len(harmful)
    assert found.summary["removed"] == len(harmful) >= 6
    table = planted().read.table()
    kept = table.drop(index=harmful["row"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(found.cleaned, kept)
    lines = found.proof.set_index(["metric", "removed"])
    best = lines.loc[("test loss", "harmful and suspect rows")]
    assert best["change"] < -3 * best["change_sem"]
    assert best["beyond_random"] < -3 * best["beyond_random_sem"]
    assert set(found.proof["metric"]) == {"test loss", "accuracy"}
    assert "test loss on the other half goes from" in found.summary["proof"][0]


@pytest.mark.parametrize(
    ("change", "over_tests", "said"),
    [
        (-0.1, 0.02, "is worth it"),
        (-0.1, 0.08, "not shown"),
        (0.1, 0.02, "harmful"),
        (0.01, 0.02, "not shown"),
    ],
)
def test_cleaning_is_worth_it_where_other_test_rows_would_say_so_too(
    change: float, over_tests: float, said: str
) -> None:
    line = {"rows": 3, "metric": "test loss", "mean": 1 + change, "change": change, "change_sem": 0.01}
    best = {**line, "removed": "harmful and suspect rows", "change_sem_tests": over_tests,
            "beyond_random": change, "beyond_random_sem": 0.01}  # fmt: skip
    random = {**line, "removed": "as many random rows", "change": 0.0}
    assert said in proof_in_words(pd.DataFrame([best, random]))[-1]


@pytest.mark.parametrize(("change", "said"), [(-2.9e-19, "(0 ±"), (-0.02, "(-0.02 ±"), (0.02, "(+0.02 ±")])
def test_a_change_that_is_rounding_s_alone_is_none(change: float, said: str) -> None:
    line = {"rows": 3, "metric": "accuracy", "mean": 0.68 + change, "change": change, "change_sem": 0.01}
    best = {**line, "removed": "harmful and suspect rows", "metric": "test loss", "change_sem_tests": 0.02,
            "beyond_random": change, "beyond_random_sem": 0.01}  # fmt: skip
    random = {**line, "removed": "as many random rows", "metric": "test loss", "change": 0.0}
    assert said in proof_in_words(pd.DataFrame([best, random]))[0]


def test_answers_say_what_becomes_of_named_predictions(found: Audit) -> None:
    answers = found.summary["answers"]
    assert [a["test_row"] for a in answers] == [3, 8]
    for answer in answers:
        assert answer["prediction"] in ("no", "yes")
        assert answer["removals"][0]["removed"] == 1
        assert answer["text"].startswith(f"predicted {answer['prediction']} with probability ")
    assert {"screen", "verify", "answers", "proof", "groups"} <= set(found.summary["stages"])


def test_files_read_back(found: Audit, tmp_path: Path) -> None:
    found.save(tmp_path)
    again = Audit.load(tmp_path)
    assert json.loads((tmp_path / "audit.json").read_text())["answers"] == again.summary["answers"]
    assert again.groups["rows"].tolist() == found.groups["rows"].tolist()
    assert again.cleaned is not None
    assert again.cleaned.shape == found.cleaned.shape  # type: ignore[union-attr]
    assert list(again.proof) == list(found.proof)


def test_groups_are_left_out_of_the_full_runs_batches_with_seeds_of_their_own() -> None:
    for rule, expected in (("shift", "mask"), ("every_batch", "every_batch")):
        question = replace(planted(), tests=(), protocol=replace(planted().protocol, leave_out=rule))
        settings = Settings(top=5, seeds=2)
        screened = screen(question, [5, 6], Resources())
        acting = Acting(
            Findings(question, settings, screened), verify(question, screened, settings, Resources()),
            Resources(),
        )  # fmt: skip
        assert acting.removal.protocol.leave_out == expected
        assert not set(acting.removal.seeds) & {0, 1, 5, 6}


def test_nothing_further_is_done_where_it_is_not_asked_for_or_time_is_over() -> None:
    question = replace(planted(), tests=())
    bare = audit(question, Settings(top=5, seeds=2, act=False), Resources())
    assert bare.cleaned is None
    assert bare.groups.empty
    assert "proof" not in bare.summary["stages"]
    late = audit(question, Settings(top=5, seeds=2, minutes=1e-4), Resources())
    assert late.groups.empty
    assert late.cleaned is not None


def test_a_regression_from_a_frame_keeps_its_columns_and_index() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = x.sum(1) + 0.1 * torch.randn(60, generator=generator)
    frame = pd.DataFrame(x.numpy(), columns=["one", "two", "three"], index=[f"k{k}" for k in range(60)])
    model = FinalModel(nn.Linear(3, 1), "mse", accept_poor=True)
    protocol = Protocol(lr=0.05, batch_size=8, epochs=2)
    found = fimo.audit(model, (frame, y), (x[:12], y[:12]), protocol, tests=[2], top=3, seeds=4)
    assert found.cleaned is not None
    assert list(found.cleaned) == list(frame)
    assert set(found.cleaned.index) <= set(frame.index)
    assert set(found.proof["metric"]) <= {"test loss", "error"}
    (answer,) = found.summary["answers"]
    assert answer["target"] == pytest.approx(float(y[2]), rel=1e-5)
    assert {removal["side"] for removal in answer["removals"]} <= {"lowers", "raises"}
