"""Several devices: processes of the Trainer share the chunks, with the same bytes as one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fimo.engine.driver import make_trainer
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.store.files import Store
from tests.cases import CASES

PROTOCOL = Protocol(optimizer="adam", lr=0.01, batch_size=5, epochs=2)


@pytest.mark.launcher
def test_two_processes_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    case = CASES["mlp_classification"]().to(torch.float32)
    settings = {"one": None, "two": {"devices": 2, "strategy": "ddp_spawn"}}
    for name, trainer in settings.items():
        found = further_train(
            case.final_model, case.train, case.test, PROTOCOL, [0, 3], [1, 4, 7, [2, 5]],
            store=Store(tmp_path / name), chunk=2, trainer=trainer,
        )  # fmt: skip
        found.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_what_is_stored_needs_no_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp_regression"]()
    arguments = (case.final_model, case.train, case.test, PROTOCOL, [0], [1, 4])
    one = further_train(*arguments, store=Store(tmp_path))
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: pytest.fail("was started"))
    two = further_train(*arguments, store=Store(tmp_path), trainer={"devices": 2})
    assert torch.equal(one.raw, two.raw)


def test_a_loss_that_no_other_process_can_have_is_refused(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]()
    loss = case.final_model.loss
    final_model = dataclasses.replace(case.final_model, loss=lambda outputs, targets: loss(outputs, targets))
    with pytest.raises(InputError, match=r"trainer\.devices: several need a network and losses"):
        further_train(
            final_model,
            case.train,
            case.test,
            PROTOCOL,
            [0],
            [1],
            store=Store(tmp_path),
            trainer={"devices": 2},
        )


def test_every_usual_strategy_of_several_devices_is_taken_and_others_refused() -> None:
    for strategy in ("auto", "ddp", "ddp_spawn"):
        assert make_trainer({"devices": 2, "strategy": strategy}).world_size == 2
    with pytest.raises(InputError, match=r"trainer\.strategy: expected one of auto, ddp, ddp_spawn"):
        make_trainer({"devices": 2, "strategy": "ddp_notebook"})
