"""Steps against the batches that the engine's runs see."""

from __future__ import annotations

import pytest
import torch

from fimo.engine.leave_out import BatchStream, make_rule
from fimo.engine.protocol import LeaveOutRule, Protocol
from fimo.engine.replicas import Replica
from fimo.linear_response.leave_out_weights import steps


@pytest.mark.parametrize("size", [4, 5, 23, 30])
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
def test_weights_are_those_of_the_engine_s_batches(rule: LeaveOutRule, size: int) -> None:
    n, left_out = 23, [0, 7, 22]
    protocol = Protocol(batch_size=size, epochs=3, leave_out=rule, schedule="linear")
    removal = make_rule(protocol, n)
    full = BatchStream([Replica(3)], removal, protocol, torch.float64, "cpu").starting_at(0)
    runs = BatchStream(
        [Replica(3, (i,)) for i in left_out], removal, protocol, torch.float64, "cpu"
    ).starting_at(0)
    total = protocol.total_steps(n)
    for taken, step in enumerate(steps([5, 3], torch.tensor(left_out), removal, protocol, torch.float64)):
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


def test_an_epoch_that_shift_makes_shorter_ends_with_a_step_of_the_full_runs_alone() -> None:
    protocol = Protocol(batch_size=4, epochs=2, leave_out="shift", schedule="linear")
    found = list(steps([0], torch.tensor([2]), make_rule(protocol, 9), protocol, torch.float64))
    assert [bool(step.without.any()) for step in found] == [True, True, False] * 2
    assert [step.evaluated for step in found] == [False, False, True] * 2
    rates = [protocol.learning_rate(t, 6) for t in range(6)]
    assert [step.lr for step in found] == rates
    assert [step.lr_without for step in found] == [*rates[:2], None, *rates[2:4], None]


@pytest.mark.parametrize(("horizon", "alone"), [({"epochs": 3, "evaluate_every": 2}, 0), ({"steps": 8}, 2)])
def test_runs_that_are_compared_after_as_many_steps_each_see_their_own_batches(
    horizon: dict[str, int], alone: int
) -> None:
    """Of 9 instances in batches of 4 a full run's epoch has three steps, without one it has two."""
    protocol = Protocol(batch_size=4, leave_out="shift", **horizon)  # type: ignore[arg-type]
    found = list(steps([3], torch.tensor([2]), make_rule(protocol, 9), protocol, torch.float64))
    streams = [
        BatchStream(
            [Replica(3, left_out)], make_rule(protocol, 9), protocol, torch.float64, "cpu"
        ).starting_at(0)
        for left_out in ((), (2,))
    ]
    for step in found:
        weights = [step.full.expand(step.index.shape), step.without[..., 0]]
        for lr, weight, stream in zip((step.lr, step.lr_without), weights, streams, strict=True):
            own = torch.zeros(1, 9, dtype=torch.float64).scatter_add_(1, step.index, weight)
            expected = torch.zeros_like(own)
            if lr is not None:
                batch = next(stream)
                expected.scatter_add_(1, batch.index, batch.weight)
            torch.testing.assert_close(own, expected)
    assert [step.lr for step in found].count(None) == alone
    assert [step.lr_without for step in found].count(None) == alone
