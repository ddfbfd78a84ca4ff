"""The batches of replicas that are advanced together, against one replica's made by a plain loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fimo.engine import leave_out
from fimo.engine.leave_out import BatchStream, make_rule
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica

N = 23


def plain(replica: Replica, rule: str, size: int, epochs: int) -> list[list[tuple[int, float]]]:
    """Return the batches of one replica as (instance, weight) of those that weigh anything."""
    generator, found = torch.Generator().manual_seed(replica.seed), []
    for _ in range(epochs):
        order = torch.randperm(N, generator=generator).tolist()
        if rule == "shift":
            order = [i for i in order if i not in replica.left_out]
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            out = replica.left_out if rule == "mask" else ()
            found.append([(i, 1 / len(batch)) for i in batch if i not in out])
    return found


REPLICAS = {
    "full": [Replica(0, ()), Replica(1, ())],
    "single": [Replica(s, (i,)) for s in (0, 3) for i in (0, 7, 22)],
    "one seed": [Replica(2, (i,)) for i in (1, 2, 3)],
    "groups": [Replica(s, (i, i + 1, 20)) for s in (0, 1) for i in (0, 11)],
    "half": [Replica(4, tuple(range(0, N, 2)))],
}


@pytest.mark.parametrize("at_once", [1, 40, 2**21])
@pytest.mark.parametrize("size", [1, 5, 23, 40])
@pytest.mark.parametrize("rule", ["shift", "mask"])
@pytest.mark.parametrize("replicas", REPLICAS.values(), ids=REPLICAS)
def test_each_replica_sees_what_it_would_alone(
    replicas: list[Replica], rule: Any, size: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leave_out, "AT_ONCE", at_once)
    protocol = Protocol(leave_out=rule, batch_size=size, epochs=2)
    stream = BatchStream(replicas, make_rule(protocol, N), protocol, torch.float64, "cpu")
    expected = [plain(replica, rule, size, 2) for replica in replicas]
    for begin in (0, 1, len(expected[0]) - 1):
        batches = itertools.islice(stream.starting_at(begin), len(expected[0]) - begin)
        for step, batch in enumerate(batches, begin):
            index = batch.index.expand(len(replicas), -1).tolist()
            for r, (row, weights) in enumerate(zip(index, batch.weight.tolist(), strict=True)):
                seen = [(i, w) for i, w in zip(row, weights, strict=True) if w]
                assert seen == expected[r][step]


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor has."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize("rule", ["shift", "mask", "reweighted"])
def test_no_epoch_of_all_replicas_is_held_at_once(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave_out, "AT_ONCE", 1000)
    rows, replicas = 5000, [Replica(0, (i,)) for i in range(40)]
    protocol = Protocol(leave_out=rule, batch_size=10, epochs=1)
    stream = BatchStream(replicas, make_rule(protocol, rows), protocol, torch.float32, "cpu")
    with Largest() as largest:
        for _ in itertools.islice(stream.starting_at(0), rows // 10):
            pass
    assert largest.entries <= rows + 1
