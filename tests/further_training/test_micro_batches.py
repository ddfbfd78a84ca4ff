"""A batch's gradient in parts: the batch's own, with the activations of a part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size, replica_bytes
from fimo.engine.replicas import Replica
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from fimo.store.fingerprint import Problem, runs_key
from tests.cases import CASES
from tests.further_training.test_graphs import Recorded, advanced
from tests.models.test_padding import Trimming, sentences
from tests.reference.further_training import plain_run

SIZES: list[int] = []
"""Instances of each call of a network in train mode."""


class Convolutional(nn.Module):
    """A small network of layers that are not all linear.

    Args:
        vectorisable: by ``torch.func``.
        dropout: a rate.
    """

    def __init__(self, vectorisable: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(27, 3),
        )  # fmt: skip
        self.vectorisable = vectorisable

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            SIZES.append(len(x))
        if not self.vectorisable:
            assert float(x.detach().abs().max()) < 100
        return self.layers(x)


def images(n: int = 30) -> Instances:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 5, 5, generator=generator, dtype=torch.float64)
    return Instances(x, torch.arange(n) % 3)


def model(**settings: Any) -> FinalModel:
    return FinalModel(Convolutional(**settings).double(), cross_entropy, accept_poor=True)


def protocol(size: int | None, **settings: Any) -> Protocol:
    given = {"lr": 0.1, "batch_size": 9, "epochs": 2, "dtype": "float64", "leave_out": "mask", **settings}
    return Protocol(micro_batch_size=size, **given)


def runs(setting: Setting, units: list[tuple[int, ...]]) -> Tensor:
    """Return the test losses ``[R, J]`` of runs without units, at their end."""
    chunk = Chunk(setting, [Replica(3, unit) for unit in units])
    chunk.advance(chunk.evaluation_steps[-1])
    return chunk.evaluate()[0]


@pytest.mark.parametrize("vectorisable", [True, False])
@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("rule", ["mask", "shift", "every_batch", "reweighted"])
def test_runs_in_parts_of_a_batch_are_those_of_a_plain_loop(vectorisable: bool, size: int, rule: str) -> None:
    net, data, tested = model(vectorisable=vectorisable), images(), images(5)
    given = protocol(size, leave_out=rule, optimizer="adamw", lr=0.01, clip_norm=0.5)
    setting = Setting.build(net, data, tested, given)
    assert setting.engine == ("functional" if vectorisable else "loop")
    units = [(0, 2, 5, 7, 11), (3, 4, 20, 21, 22)]
    SIZES.clear()
    found = runs(setting, units)
    assert max(SIZES) == min(size, 9)  # of the batch, and of what a rule adds to it
    expected = torch.stack([plain_run(net, data, tested, given, 3, unit)[0][-1] for unit in units])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [3, 20])
def test_parts_of_like_length_are_split_too(size: int) -> None:
    data = sentences(60)
    net = FinalModel(Trimming().double(), cross_entropy)
    setting = Setting.build(net, data[:40], data[40:], protocol(size, batch_size=24))
    assert setting.engine == "loop"
    calls: list[int] = []
    chunk = Chunk(setting, [Replica(3, (3,)), Replica(3, (7,))])
    chunk.network.network.layer.register_forward_hook(lambda *given: calls.append(len(given[2])))  # type: ignore[attr-defined]
    chunk.advance(4)
    assert max(calls) <= size
    for row, unit in zip(chunk.evaluate()[0], [(3,), (7,)], strict=True):
        expected = plain_run(net, data[:40], data[40:], protocol(None, batch_size=24), 3, unit)[0][-1]
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["mask", "shift", "every_batch"])
def test_a_step_in_parts_can_be_recorded(rule: str) -> None:
    case = CASES["transformer"]().to(torch.float32)
    given = protocol(2, batch_size=5, epochs=4, dtype="float32", leave_out=rule)
    setting = Setting.build(case.final_model, case.train, case.test, given)
    _, expected = advanced(setting, [(1,), (4,)], None, 12)
    graphed, found = advanced(setting, [(1,), (4,)], Recorded, 12)
    assert graphed._graphs is not None
    assert all(graphed._graphs._recorded.values())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_memory_of_a_replica_is_counted_by_its_parts() -> None:
    net, data = model(), images()
    whole, parts = (Setting.build(net, data, data[:2], protocol(size, batch_size=24)) for size in (None, 3))
    sizes = [
        replica_bytes(s.final_model, s.protocol, s.activations, s.engine) - replica_bytes(
            s.final_model, s.protocol, 0, s.engine
        )
        for s in (whole, parts)
    ]  # fmt: skip
    assert sizes[0] == 8 * sizes[1]
    assert chunk_size(parts, 10**6) >= chunk_size(whole, 10**6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: protocol(0), "expected at least 1 but got 0"),
        (lambda: protocol(2.5), "expected a whole number but got 2.5"),  # type: ignore[arg-type]
        (
            lambda: further_train(model(dropout=0.2), images(), images(5), protocol(3), [0], [1]),
            r"training steps draw random numbers \(dropout\)",
        ),
        (
            lambda: further_train(*mlp(), protocol(3), [0], [1]),
            "a network of linear layers is run by products of whole batches",
        ),
    ],
)
def test_what_can_not_be_had_in_parts_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=rf"^further_training\.micro_batch_size: {said}"):
        call()


def mlp() -> tuple[FinalModel, Instances, Instances]:
    case = CASES["mlp_regression"]()
    return case.final_model, case.train, case.test


def test_parts_that_hold_whole_batches_are_no_other_protocol() -> None:
    net, data = model(), images()
    problem = Problem.of(net, data)
    whole, larger, parts = (runs_key(problem, data, protocol(size)) for size in (None, 9, 3))
    assert whole == larger != parts
    assert "micro_batch_size" not in protocol(None).key()  # whose results are found under their earlier key
