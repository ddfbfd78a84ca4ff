"""Steps recorded and replayed: what a CUDA graph does, done here by recording the calls of operations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size, replica_bytes
from fimo.engine.devices import Launched, products
from fimo.engine.graphs import GraphedSteps, cuda_graph
from fimo.engine.leave_out import Batch, BatchStream
from fimo.engine.replicas import Replica, Unit
from fimo.errors import InputError
from fimo.further_training import Protocol
from fimo.models.final_model import FinalModel
from fimo.models.huggingface import causal_lm
from fimo.models.losses import language_modelling
from tests.cases import CASES

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
"""Operations whose value or shape the CPU has to know, so that it waits for a GPU."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.01},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "clipped_adam": {"optimizer": "adam", "lr": 0.02, "clip_norm": 0.1},
    "lion": {"optimizer": "lion", "lr": 0.01},
}


class Recorded(TorchDispatchMode):
    """Operations called on tensors, to be called again on the same tensors, with the same numbers."""

    def __init__(self, operations: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        with self:
            operations()
        for whole, values in self.before.values():  # recording computes nothing
            whole.copy_(values)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        assert name not in WAITING, f"{name} waits for the device"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in function._schema.arguments[len(args) :]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(kwargs.get(argument.name))
        results = function(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in given]
        self.calls.append((function, args, kwargs, fresh))
        return results

    def _keep(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            self.before.setdefault(storage.data_ptr(), (whole, whole.clone()))

    def __call__(self) -> None:
        for function, args, kwargs, fresh in self.calls:
            results = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
            for at, value in zip(fresh, results, strict=False):  # a graph's tensors stay where they are
                at.copy_(value)


def advanced(setting: Setting, units: list[Unit], record: Any, steps: int) -> tuple[Chunk, list[Tensor]]:
    chunk = Chunk(setting, [Replica(3, unit) for unit in units])
    if record is not None:
        chunk._graphs = GraphedSteps(record)
    losses = []
    for step in (1, 2, steps - 3, steps):
        chunk.advance(step)
        losses.append(chunk.evaluate()[0])
    return chunk, losses


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch"])
def test_steps_of_a_language_models_adapters_can_be_recorded(rule: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    added = {"rank": 2, "alpha": 4.0, "layers": ["*c_attn", "*attn.c_proj"]}
    network = causal_lm(13, width=8, heads=2, layers=2, positions=6, adapters=added)
    tokens = torch.randint(13, (13, 7))
    data = Instances({"input_ids": tokens[:, :-1]}, tokens[:, 1:])
    model = FinalModel(network, language_modelling, trainable=("*.up.*", "*.down.*"))
    protocol = Protocol(batch_size=5, epochs=4, leave_out=rule, optimizer="adamw", lr=0.01)
    setting = Setting.build(model, data, data[:3], protocol)
    assert setting.engine == "functional"
    _, expected = advanced(setting, [(1,), (4,)], None, 12)
    graphed, found = advanced(setting, [(1,), (4,)], Recorded, 12)  # refuses what waits for the device
    assert graphed._graphs is not None
    assert all(graphed._graphs._recorded.values())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification", "transformer"])
def test_steps_that_are_replayed_give_the_same_bytes(name: str, rule: str, optimizer: str) -> None:
    """Batches of two sizes (the last of an epoch is short), in an order that every epoch draws anew."""
    case = CASES[name]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=4, leave_out=rule, **OPTIMIZERS[optimizer])
    setting = Setting.build(case.final_model, case.train, case.test, protocol)
    assert setting.repeatable
    steps = protocol.total_steps(len(case.train))
    assert len(case.train) % 5
    assert steps >= 12
    units: list[Unit] = [(1,), (4,), (9,)]
    plain, expected = advanced(setting, units, None, steps)
    graphed, found = advanced(setting, units, Recorded, steps)
    assert graphed._graphs is not None
    assert len(graphed._graphs._recorded) == 2
    assert all(graphed._graphs._recorded.values())
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    for key, state in plain.state().items():
        assert torch.equal(state, graphed.state()[key]), key


def test_a_saved_state_goes_on_in_recorded_steps() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=4, optimizer="adam", lr=0.02)
    setting = Setting.build(case.final_model, case.train, case.test, protocol)
    whole, _ = advanced(setting, [(1,), (2,)], None, 15)
    first = Chunk(setting, [Replica(3, (1,)), Replica(3, (2,))])
    first.advance(7)
    second = Chunk(setting, first.replicas)
    second._graphs = GraphedSteps(Recorded)
    second.advance(4)
    second.restore(first.state(), 7)
    second.advance(15)
    assert all(torch.equal(t, second.state()[name]) for name, t in whole.state().items())


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted", "with_duplicates"])
@pytest.mark.parametrize("seeds", [(3, 3, 3), (0, 1, 2)])
def test_batches_are_made_without_waiting_for_the_device(rule: str, seeds: tuple[int, ...]) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=2, leave_out=rule)
    setting = Setting.build(case.final_model, case.train, case.test, protocol)
    replicas = [Replica(seed, unit) for seed, unit in zip(seeds, [(1, 5), (4, 2), (9, 0)], strict=True)]
    stream = BatchStream(replicas, setting.rule, protocol, torch.float32, "cpu").starting_at(0)
    Recorded(lambda: [next(stream) for _ in range(20)])  # type: ignore[arg-type, return-value]


def test_test_losses_are_measured_without_waiting_for_the_device() -> None:
    for name in ("mlp_regression", "mlp_classification", "transformer"):
        case = CASES[name]().to(torch.float32)
        setting = Setting.build(case.final_model, case.train, case.test, Protocol(epochs=1))
        chunk = Chunk(setting, [Replica(0, (1,)), Replica(0, (2,))])
        Recorded(lambda chunk=chunk: chunk.measured())  # type: ignore[misc]


def test_what_differs_from_step_to_step_otherwise_than_in_tensors_is_not_recorded() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    data = (case.final_model, case.train, case.test)
    assert Setting.build(*data, Protocol(epochs=2)).repeatable
    assert not Setting.build(*data, Protocol(epochs=2, schedule="linear")).repeatable
    dropout = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
    model = replace(case.final_model, network=dropout)
    assert not Setting.build(model, case.train, case.test, Protocol(epochs=2)).repeatable
    assert Setting.build(*data, Protocol(epochs=2)).record is None  # on a CPU


def test_a_gpu_records_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(epochs=2))
    monkeypatch.setattr(Setting, "device", torch.device("cuda"))
    assert setting.record is cuda_graph
    assert replace(setting, protocol=Protocol(epochs=2, graphs=False)).record is None
    assert replace(setting, protocol=Protocol(epochs=2, schedule="cosine")).record is None


def test_a_network_that_cannot_be_recorded_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=2))

    def refuse(operations: Callable[[], None]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    _, expected = advanced(setting, [(1,), (2,)], None, 8)
    _, found = advanced(setting, [(1,), (2,)], refuse, 8)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [r.getMessage() for r in caplog.records].count(
        "steps are not recorded as CUDA graphs (operation not permitted when stream is capturing)"
    ) == 1


def test_a_chunk_that_is_left_alone_gives_its_memory_back_at_once() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=2))
    chunk = Chunk(setting, [Replica(0, (1,)), Replica(0, (2,))])
    chunk._graphs = GraphedSteps(lambda operations: lambda: None)
    chunk.advance(6)
    kept = weakref.ref(chunk.network)
    gc.disable()
    try:
        del chunk
        assert kept() is None
    finally:
        gc.enable()


def test_tensor_float_is_refused_where_there_is_no_gpu() -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    setting = Setting.build(case.final_model, case.train, case.test, Protocol(epochs=1, autocast="tf32"))
    with pytest.raises(InputError, match=r"further_training\.autocast: tf32 is a GPU's, but .* cpu"):
        Chunk(setting, [Replica(0)])


def test_how_steps_are_launched_is_no_part_of_a_runs_key() -> None:
    assert Protocol(epochs=1, graphs=False).key() == Protocol(epochs=1).key()
    assert Protocol(epochs=1, autocast="tf32").key() != Protocol(epochs=1).key()


def test_a_batch_of_no_extra_instances_is_another_shape_than_one_with_them() -> None:
    taken: list[Batch] = []
    graphs = GraphedSteps(lambda operations: lambda: taken.append("replayed"))  # type: ignore[arg-type]
    index, weight = torch.zeros(1, 2, dtype=torch.int64), torch.ones(3, 2)
    for batch in (Batch(index, weight), Batch(index, weight, torch.zeros(3, 1), torch.ones(3, 1))):
        graphs.take(taken.append, batch)
        assert taken[-1] is batch
        graphs.take(taken.append, batch)
        assert taken[-1] == "replayed"


def test_a_device_has_a_block_ahead_of_it_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def record(self, stream: object) -> None: ...

        def synchronize(self) -> None:
            waited.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    launched = Launched(torch.device("cuda"), 10)
    found = []
    for step in (11, 15, 30):
        launched.block(step)
        found.append((launched.done, list(waited)))
    assert found == [(10, []), (11, [1]), (15, [1, 2])]
    launched.finish()
    assert (launched.done, waited) == (30, [1, 2, 3])
    here = Launched(torch.device("cpu"), 10)
    here.block(11)
    assert here.done == 11


def test_a_chunk_on_a_gpu_fits_half_of_what_is_free_with_its_test_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=100)
    setting = Setting.build(case.final_model, case.train, case.test, protocol)
    monkeypatch.setattr(Setting, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    steps = replica_bytes(setting.final_model, protocol, setting.activations, setting.engine)
    one = steps + 100 * len(case.test) * (4 + 8)  # changes, and the full run's losses
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 7 * one - 3000, 0))
    assert chunk_size(setting, 7) == 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 7 * one - 3001, 0))
    assert chunk_size(setting, 7) == 4  # two even parts


def test_products_are_put_back_as_they_were() -> None:
    def state() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    with products(torch.device("cuda"), True):
        assert state() == ("high", True)
        with products(torch.device("cuda"), False):
            assert state() == ("highest", False)
        assert state() == ("high", True)
    assert state() == before
    with products(torch.device("cpu"), True):
        assert state() == before
