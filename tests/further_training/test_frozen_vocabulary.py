"""Runs of language models whose vocabulary is frozen: without the logits of all tokens, the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import IGNORED, Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.replicas import Replica
from fimo.further_training import Protocol
from fimo.models.class_losses import CorrectProbability, LanguageModelling
from fimo.models.final_model import FinalModel
from tests.curvature.test_vocabulary import LASTS, Network, head, rarely, without_sevens
from tests.reference.further_training import plain_run

UNITS: list[tuple[int, ...]] = [(4,), (7,)]


def problem(last: Any = head, total: bool = False, **settings: Any) -> tuple[FinalModel, Instances]:
    torch.manual_seed(0)
    network = Network(last, **settings).double()
    network.vectorisable = False
    tokens = torch.randint(11, (12, 5))
    tokens[0, 3:], tokens[4, :2] = IGNORED, IGNORED
    model = FinalModel(network, LanguageModelling(total), trainable=("mix.*", "token.*"), accept_poor=True)
    return model, Instances(torch.randint(11, (12, 5)), tokens)


def protocol(**settings: Any) -> Protocol:
    given = {"lr": 0.3, "batch_size": 5, "epochs": 2, "dtype": "float64", "leave_out": "mask"}
    return Protocol(**{**given, **settings})


def losses(setting: Setting, units: list[tuple[int, ...]]) -> Tensor:
    """Return the test losses ``[E, R, J]`` of runs without units."""
    chunk, found = Chunk(setting, [Replica(3, unit) for unit in units]), []
    for step in chunk.evaluation_steps:
        chunk.advance(step)
        found.append(chunk.evaluate()[0])
    return torch.stack(found)


def without_logits(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the losses of runs, in which the vocabulary's layer is not called."""
    linear, called = nn.Linear.forward, []

    def counted(layer: nn.Linear, x: Tensor) -> Tensor:
        called.append(layer.out_features)
        return linear(layer, x)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", counted)
        found = losses(setting, UNITS)
    assert set(called) == {4}  # and not the vocabulary's eleven
    return found


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("rule", ["mask", "shift", "every_batch", "reweighted"])
@pytest.mark.parametrize("size", [None, 2])
def test_runs_are_those_of_a_plain_loop(
    rule: str, total: bool, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.models.class_losses.LOGITS", 64 * 8 * 7)  # seven tokens at a time
    model, data = problem(total=total)
    setting = Setting.build(model, data, data, protocol(leave_out=rule, micro_batch_size=size))
    assert setting.engine == "loop"
    assert setting.vocabulary == "head"
    found = without_logits(setting, monkeypatch)
    for k, unit in enumerate(UNITS):
        given = dataclasses.replace(setting.protocol, micro_batch_size=None)
        expected, _, _ = plain_run(model, data, data, given, 3, unit)
        torch.testing.assert_close(found[:, k], expected, rtol=1e-10, atol=1e-13)


def test_masks_are_those_of_runs_with_all_logits() -> None:
    model, data = problem(dropout=0.4)
    setting = Setting.build(model, data, data, protocol())
    assert setting.vocabulary == "head"
    plain = losses(dataclasses.replace(setting, vocabulary=None), UNITS)
    torch.testing.assert_close(losses(setting, UNITS), plain, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(
        plain[0], losses(dataclasses.replace(setting, mode=type(setting.mode)()), UNITS)[0]
    )


def test_layers_called_once_for_all_replicas_come_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = problem(dropout=0.4)
    model = dataclasses.replace(model, trainable=("mix.*",))
    setting = Setting.build(model, data, data, protocol())
    assert setting.once
    assert setting.vocabulary == "head"
    plain = dataclasses.replace(setting, once=(), vocabulary=None)
    found = without_logits(setting, monkeypatch)
    torch.testing.assert_close(found, losses(plain, UNITS), rtol=1e-10, atol=1e-13)


def test_another_measurement_is_read_from_the_logits() -> None:
    model, data = problem()
    model = dataclasses.replace(model, measurement=CorrectProbability())
    setting = Setting.build(model, data, data, protocol())
    assert setting.vocabulary == "head"
    expected, _, _ = plain_run(model, data, data, setting.protocol, 3, (4,))
    torch.testing.assert_close(losses(setting, [(4,)])[:, 0], expected, rtol=1e-10, atol=1e-13)


def test_what_some_instances_alone_do_with_logits_is_seen() -> None:
    model, data = problem(rarely)
    without_sevens(data, slice(6))
    setting = Setting.build(model, data, data, protocol())
    assert setting.vocabulary == "head"
    found = losses(setting, UNITS)
    for k, unit in enumerate(UNITS):
        expected, _, _ = plain_run(model, data, data, setting.protocol, 3, unit)
        torch.testing.assert_close(found[:, k], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", LASTS)
def test_outputs_that_a_layer_does_not_make_alone_are_computed(name: str) -> None:
    model, data = problem(LASTS[name])
    setting = Setting.build(model, data, data, protocol())
    assert setting.engine == "loop"
    assert setting.vocabulary is None
