"""``mode=audit`` from the command line ends with its page and its answer, under the file's own names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from fimo.app.audited import audited
from fimo.app.show import shown
from fimo.audit.acting import Acting
from fimo.audit.question import Question
from fimo.data.instances import Instances
from fimo.data.origin import Origin
from fimo.engine.protocol import Protocol
from fimo.models.final_model import FinalModel
from fimo.reporting.audit_run import AuditRun
from tests.reporting.test_report import page_data
from tests.test_experiment import run


def houses(path: Path) -> pd.DataFrame:
    """Write and return a table with identifiers, a column that is no feature, and one wild price."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.normal(size=(70, 2)).round(3), columns=["size", "age"])
    frame["price"] = frame["size"] * 2 + frame["age"]
    frame.loc[5, "price"] += 30
    frame["house"] = [f"H{k:02d}" for k in range(70)]
    frame["street"] = [f"street {k}" for k in range(70)]
    frame.to_csv(path, index=False)
    return frame


@pytest.mark.parametrize("report", [True, False])
def test_an_audit_ends_with_its_answer_and_a_page_where_one_is_asked_for(
    tmp_path: Path, report: bool
) -> None:
    frame, folder = houses(tmp_path / "houses.csv"), tmp_path / "run"
    data = [f"dataset.path={tmp_path}/houses.csv", "dataset.target=price", "dataset.id=house"]
    asked = ["mode=audit", "audit.top=4", "audit.seeds=3", f"report={str(report).lower()}", "dataset=csv"]
    done = run(*asked, *data, "dataset.drop=[street]", f"hydra.run.dir={folder}", folder=tmp_path)
    assert shown(folder, 80) in done.stdout
    assert ("report.html" in done.stdout) == report
    assert "H05" in shown(folder)
    assert (folder / "report.html").exists() == report
    again = AuditRun.load(folder)
    assert len(again.audit.rows) == 63
    for row, display in again.shown["train"].items():
        assert display.id == frame["house"][row]
        assert display.row is not None
        assert display.row["street"] == f"street {row}"
        assert display.row["size"] == pytest.approx(frame["size"][row])
    rows = again.audit.rows
    removed = set(rows.loc[(rows["verdict"] == "harmful") | (rows["suspect_q"] <= 0.1), "id"])
    assert "H05" in removed
    lines = (tmp_path / "houses.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[3] not in removed]
    assert (folder / "cleaned.csv").read_text().splitlines() == kept  # cell by cell as it was written
    if report:
        names = {cells[0] for cells in page_data(folder / "report.html")["tables"]["rows"]["rows"]}
        assert names == set(again.audit.rows["id"])


def test_rows_are_the_same_by_what_the_whole_network_takes_not_by_what_enters_its_trained_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Question] = []
    found = SimpleNamespace(summary={"stages": {}})
    monkeypatch.setattr("fimo.app.audited.audit", lambda question, *_: asked.append(question) or found)
    inputs = torch.linspace(-2, 2, 12)[:, None]
    whole = Instances(inputs, torch.arange(12) % 2)
    parts: dict[str, Any] = {
        "class_names": (), "original": None, "unit": "", "named": lambda *_: None, "table": None,
        "origin": lambda split: Origin.counted(12), "shown_targets": lambda split: whole.targets.tolist(),
    }  # fmt: skip
    data = SimpleNamespace(train=whole, test=whole, **parts)
    entered = Instances(inputs.relu(), whole.targets)
    run = SimpleNamespace(
        data=SimpleNamespace(train=entered, test=entered), plan=SimpleNamespace(protocol=Protocol(epochs=1)),
        final_model=FinalModel(nn.Linear(1, 2), "cross_entropy", accept_poor=True), store=None,
        device=torch.device("cpu"), trainer={}, problem=None,
    )  # fmt: skip
    settings = {"top": 2, "q": 0.1, "verify": True, "minutes": None, "seeds": 2, "controls": None, "test": []}
    config = OmegaConf.create({"audit": {**settings, "certain_labels": False, "act": True}})
    stages = SimpleNamespace(begin=lambda *_: None, ended=lambda *_: None)
    log = SimpleNamespace(stage=lambda *_: None)
    audited(run, data, config, SimpleNamespace(log=log, ahead=stages, costs=[]))  # type: ignore[arg-type]
    (question,) = asked
    assert question.train is entered
    compared: list[Instances] = []
    monkeypatch.setattr("fimo.audit.acting.find_groups", lambda train, *_: compared.append(train) or [])
    monkeypatch.setattr(Acting, "_of_tests", lambda self: ([], None))
    monkeypatch.setattr(Acting, "removal", None)
    screened = SimpleNamespace(score=torch.zeros(1, 12))
    findings = SimpleNamespace(question=question, screened=screened, settings=SimpleNamespace(q=0.1))
    assert not len(Acting(findings, None, None).groups())  # type: ignore[arg-type]
    assert compared == [whole]
