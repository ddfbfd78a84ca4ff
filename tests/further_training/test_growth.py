"""What a job takes per chunk does not grow with the number of its runs."""

from __future__ import annotations

import itertools
import sys
import weakref
from pathlib import Path

import pytest
import torch

from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting
from fimo.engine.job import Job
from fimo.engine.records import Records
from fimo.further_training import Protocol, further_train
from tests.cases import CASES

PAIRS = list(itertools.combinations(range(23), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_holds_one_chunk_for_each_worker_however_many_runs_there_are(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.engine.driver.BLOCK_SECONDS", 600)  # all in one step of the Trainer
    case = CASES["mlp_regression"]().to(torch.float32)
    alive: weakref.WeakSet[Chunk] = weakref.WeakSet()
    most, build = 0, Chunk.__init__

    def counting(self: Chunk, *arguments: object) -> None:
        nonlocal most
        build(self, *arguments)  # type: ignore[arg-type]
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(Chunk, "__init__", counting)
    # steps shared with the full run would be another chunk for a moment
    protocol = Protocol(batch_size=5, epochs=1, lr=0.01, leave_out="every_batch")
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        further_train(case.final_model, case.train, case.test, protocol, [0, 1], PAIRS[:60], chunk=3)
    finally:
        torch.set_num_threads(before)
    assert 1 <= most <= workers
    assert len(alive) == 0


@pytest.mark.parametrize("keep_states", [False, True])
def test_planning_a_chunk_takes_as_many_calls_however_many_runs_there_are(
    keep_states: bool, tmp_path: Path
) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=1, lr=0.01, leave_out="every_batch")
    setting = Setting.build(case.final_model, case.train, case.test, protocol)

    def most_calls(runs: int, folder: Path) -> int:
        folder.mkdir()
        job = Job(setting, [0], PAIRS[:runs], [5], Records(folder), 2, keep_states)
        counts = []
        while True:
            calls = 0

            def count(frame: object, event: str, argument: object) -> None:
                nonlocal calls
                calls += event in ("call", "c_call")

            sys.setprofile(count)
            try:
                work = job.next_work()
            finally:
                sys.setprofile(None)
            if work is None:
                break
            counts.append(calls)
            work.values.zero_()
            work.distance.zero_()
            job.finish(work)
        assert job.is_finished
        assert len(counts) == 1 + runs // 2
        return max(counts[1:])

    few, many = most_calls(10, tmp_path / "few"), most_calls(240, tmp_path / "many")
    assert many <= 1.01 * few


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_runs_come_to_their_end_in_blocks_that_are_over_before_they_begin(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers: one with a chunk that is not finished, one that waits for what it needs of it."""
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=1, lr=0.01)
    data = (case.final_model, case.train, case.test, protocol, [0, 1], range(6))
    expected = further_train(*data, chunk=2)
    monkeypatch.setattr("fimo.engine.driver.BLOCK_SECONDS", seconds)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(further_train(*data, chunk=2).raw, expected.raw)
    finally:
        torch.set_num_threads(threads)
