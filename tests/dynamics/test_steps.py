"""Steps against the batches that the engine's runs see."""

from __future__ import annotations

import pytest
import torch

from fimo.dynamics.steps import steps
from fimo.further_training.protocol import LeaveOutRule, Protocol
from fimo.further_training.replicas import Replica
from fimo.further_training.schedule import BatchStream


@pytest.mark.parametrize("size", [4, 5, 23, 30])
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch"])
def test_weights_are_those_of_the_engine_s_batches(rule: LeaveOutRule, size: int) -> None:
    n, left_out = 23, [0, 7, 22]
    protocol = Protocol(batch_size=size, epochs=3, leave_out=rule, schedule="linear")
    full = BatchStream([Replica(3)], n, protocol, torch.float64, "cpu").starting_at(0)
    runs = BatchStream([Replica(3, (i,)) for i in left_out], n, protocol, torch.float64, "cpu").starting_at(0)
    total = protocol.total_steps(n)
    for taken, step in enumerate(steps([5, 3], torch.tensor(left_out), n, protocol, torch.float64)):
        expected = torch.zeros(4, n, dtype=torch.float64)
        for row, batch in ((slice(0, 1), next(full)), (slice(1, 4), next(runs))):
            index = batch.index.expand(len(batch.weight), -1)
            expected[row].scatter_add_(1, index, batch.weight)
            if batch.extra is not None and batch.extra_weight is not None and batch.extra.shape[1]:
                expected[row].scatter_add_(1, batch.extra, batch.extra_weight)
        found = torch.zeros(4, n, dtype=torch.float64)
        weights = torch.cat([step.full[:, None], step.without[1]], 1).T
        found.scatter_add_(1, step.index[1].expand(4, -1), weights)
        torch.testing.assert_close(found, expected)
        assert step.lr == protocol.learning_rate(taken, total)
    assert taken == total - 1


def test_an_epoch_that_shift_makes_shorter_ends_with_an_empty_step() -> None:
    protocol = Protocol(batch_size=4, epochs=2, leave_out="shift")
    found = list(steps([0], torch.tensor([2]), 9, protocol, torch.float64))
    assert len(found) == 6
    assert [bool(step.without.any()) for step in found] == [True, True, False] * 2
