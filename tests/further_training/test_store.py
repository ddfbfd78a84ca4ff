"""Results survive: kills, full disks, two writers; and what is there is reused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from fimo.cost import Cost, measured
from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, evaluation_batch
from fimo.engine.records import Records
from fimo.engine.replicas import Replica
from fimo.errors import InputError
from fimo.further_training import Protocol, Sensitivity, full_runs, further_train
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, mean_squared_error
from fimo.store.files import Store
from tests.cases import CASES, mlp
from tests.further_training.jobs import process, run

NAMES = ["mlp_regression", "transformer"]


def assert_same_bytes(a: Sensitivity, b: Sensitivity) -> None:
    for field in dataclasses.fields(Sensitivity):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert not (x.is_floating_point() and x.isnan().any()), field.name
            assert torch.equal(x, y), field.name


@pytest.fixture
def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replica-steps of each call of Chunk.advance."""
    steps: list[int] = []
    advance = Chunk.advance

    def counting(self: Chunk, to_step: int) -> None:
        steps.append(max(0, to_step - self.step) * len(self.replicas))
        advance(self, to_step)

    monkeypatch.setattr(Chunk, "advance", counting)
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_many_random_moments_it_resumes_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    expected = run(None, name)
    random.seed(0)
    kills, wait = 0, 0.1
    for _ in range(40):
        job = process(tmp_path / "store", tmp_path / "count", name)
        job.join(wait)
        if job.exitcode is not None:
            break
        job.kill()
        job.join()
        kills += 1
        wait = random.uniform(0.05, 0.25) + 0.05 * kills
    assert job.exitcode == 0
    assert kills >= 2
    assert_same_bytes(run(tmp_path / "store", name), expected)
    left = [p.name for p in tmp_path.rglob("*") if p.suffix == ".claim"]
    assert left == []


@pytest.mark.parametrize("name", NAMES)
def test_two_writers_share_the_work_and_do_none_twice(name: str, tmp_path: Path) -> None:
    jobs = [process(tmp_path / "store", tmp_path / f"count{k}", name) for k in range(2)]
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    counts = [int((tmp_path / f"count{k}").read_text()) for k in range(2)]
    alone = process(tmp_path / "alone", tmp_path / "count", name)
    alone.join(60)
    assert sum(counts) == int((tmp_path / "count").read_text())
    assert_same_bytes(run(tmp_path / "store", name), run(None, name))


def test_a_survivor_takes_over_what_a_killed_writer_had_claimed(tmp_path: Path) -> None:
    jobs = [process(tmp_path / "store", tmp_path / f"count{k}", "mlp_regression") for k in range(2)]
    while not list(tmp_path.rglob("*.claim")):
        time.sleep(0.01)
    jobs[0].kill()
    jobs[1].join(60)
    assert jobs[1].exitcode == 0
    assert_same_bytes(run(tmp_path / "store"), run(None))


@pytest.mark.parametrize(
    ("number", "name", "steps"),
    [(signal.SIGINT, "mlp_regression", 2400), (signal.SIGTERM, "mlp_regression", 2400),
     (signal.SIGINT, "transformer", 300)],
)  # fmt: skip
def test_an_interrupt_saves_what_is_under_way_and_no_step_is_taken_twice(
    number: signal.Signals, name: str, steps: int, tmp_path: Path
) -> None:
    # no state is saved but for the signal's sake
    settings = {"save_seconds": 1e9, "steps": steps, "epochs": None, "evaluate_every": 30}

    def job(place: str) -> BaseProcess:
        return process(tmp_path / place, tmp_path / f"{place}.count", name, None, settings)

    def count(place: str) -> int:
        return int((tmp_path / f"{place}.count").read_text())

    def states() -> set[tuple[str, int]]:
        return {(p.name, p.stat().st_mtime_ns) for p in tmp_path.glob("store/*/*/runs-*.state*")}

    whole = job("whole")
    whole.join(120)
    taken = 0
    for _ in range(2):
        before = states()
        for wait in (0.02, 0.1, 0.5):  # a busy machine may not have let it take a step
            interrupted = job("store")
            while not [*tmp_path.glob("store/*/*/runs-*.claim")] and interrupted.exitcode is None:
                time.sleep(0.002)
            time.sleep(wait)
            os.kill(interrupted.pid, number)  # type: ignore[arg-type]
            interrupted.join(60)
            assert interrupted.exitcode not in (0, None)
            assert not [*tmp_path.rglob("*.claim")]
            taken += count("store")
            if states() != before:
                break
        assert states() != before
    assert 0 < taken < count("whole")
    rest = job("store")
    rest.join(120)
    assert rest.exitcode == 0
    assert taken + count("store") == count("whole")
    assert_same_bytes(run(tmp_path / "store", name, **settings), run(tmp_path / "whole", name, **settings))


def test_a_trainer_that_stops_early_is_an_error_and_a_rerun_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted_steps: list[int]
) -> None:
    monkeypatch.setattr("fimo.engine.driver.BLOCK_SECONDS", 1e-4)
    case = CASES["mlp_classification"]().to(torch.float32)
    protocol = Protocol(lr=0.01, batch_size=5, epochs=3, leave_out="every_batch")
    arguments = (case.final_model, case.train, case.test, protocol, [0], [1, 4, 6])
    expected = further_train(*arguments)
    once = sum(counted_steps)
    counted_steps.clear()
    with pytest.raises(InputError, match="trainer: stopped before all runs were finished"):
        further_train(*arguments, store=Store(tmp_path), trainer={"limit_train_batches": 4})
    assert sum(counted_steps) < once
    assert_same_bytes(further_train(*arguments, store=Store(tmp_path)), expected)
    assert sum(counted_steps) == once


def test_what_reused_runs_cost_is_counted_once_for_each_run_that_is_asked_for(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)
    protocol = Protocol(batch_size=5, epochs=2)

    def cost(seeds: list[int], units: list[int]) -> Cost:
        found = Cost("further_training")
        further_train(case.final_model, case.train, case.test, protocol, seeds, units,
                      store=Store(tmp_path), chunk=4, cost=found)  # fmt: skip
        return found

    cost([0, 1], [2, 4, 6, 8])
    records = Records(next(tmp_path.glob("further_training/*"))).finished()
    total = sum(r.seconds for r in records)
    whole = cost([0, 1], [2, 4, 6, 8])
    assert whole.reused == 1
    assert whole.seconds == pytest.approx(total)
    assert whole.peak_memory_mb == max(r.memory_mb for r in records) > 0
    halves = [cost([seed], [2, 4, 6, 8]) for seed in (0, 1)]
    assert sum(half.seconds for half in halves) == pytest.approx(total)
    assert 0 < cost([1], [6]).seconds < cost([1], [4, 6]).seconds < total


def test_of_runs_that_went_on_for_longer_the_part_that_is_used_is_charged(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)

    def cost(epochs: int) -> Cost:
        found = Cost("further_training")
        further_train(case.final_model, case.train, case.test, Protocol(batch_size=5, epochs=epochs), [0, 1],
                      [2, 4, 6], store=Store(tmp_path), chunk=4, cost=found)  # fmt: skip
        return found

    cost(10)
    total = sum(r.seconds for r in Records(next(tmp_path.glob("further_training/*"))).finished())
    assert cost(10).seconds == pytest.approx(total)
    assert cost(2).seconds == pytest.approx(total / 5)
    assert cost(2).reused == 1


def test_whoever_uses_full_runs_that_are_there_is_charged_for_as_much_of_them(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)

    def used(epochs: int, seeds: int = 3, of: int = 3) -> Cost:
        with measured("response") as cost:
            runs = full_runs(
                case.final_model, case.train, Protocol(batch_size=5, epochs=epochs), range(of),
                store=Store(tmp_path), cost=cost,
            )  # fmt: skip
            assert len(list(itertools.islice(runs, seeds))) == seeds
        return cost

    made = used(10)
    assert made.reused == 0, "they were made here, and their time measured"
    kept = [json.loads(p.read_text()) for p in tmp_path.glob("trajectory/*/cost.json")]
    total = sum(k["seconds"] for k in kept)
    assert len(kept) == 3
    assert 0 < total <= made.seconds
    for epochs, seeds, share in ((10, 3, 1), (2, 3, 1 / 5), (10, 1, 1 / 3)):
        again = used(epochs, seeds)
        assert again.reused_seconds == pytest.approx(share * total)
        assert again.reused == pytest.approx(share * total / again.seconds)
    some = used(10, seeds=5, of=5)
    assert some.reused_seconds == pytest.approx(total), "two more were made"
    assert 0 < some.reused < 1


def test_a_full_disk_is_an_error_and_leaves_nothing_false_behind(tmp_path: Path) -> None:
    for largest_file in (100, 1000, 2500):
        job = process(tmp_path / "store", tmp_path / "count", "mlp_regression", largest_file)
        job.join(60)
        assert job.exitcode == 1
    assert_same_bytes(run(tmp_path / "store"), run(None))


class _StopAt(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: pl.Trainer, module: object, *arguments: object) -> None:
        if arguments[-1] == self.batch:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_after_an_error_the_claims_are_given_up_and_a_rerun_resumes(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted_steps: list[int]
) -> None:
    monkeypatch.setattr("fimo.engine.driver.BLOCK_SECONDS", 1e-4)
    monkeypatch.setattr("fimo.engine.records.SAVE_SECONDS", 0.0)
    case = CASES["mlp_classification"]().to(torch.float32)
    protocol = Protocol(optimizer, lr=0.01, batch_size=5, epochs=3, momentum=0.5)
    arguments = (case.final_model, case.train, case.test, protocol, [0, 1], [1, 4, 6])
    expected = further_train(*arguments, chunk=2)
    once = sum(counted_steps)
    counted_steps.clear()
    for batch in (0, 1, 5, 9):
        with pytest.raises(RuntimeError, match="stopped"):
            further_train(*arguments, chunk=2, store=Store(tmp_path), trainer={"callbacks": [_StopAt(batch)]})
    found = further_train(*arguments, chunk=2, store=Store(tmp_path))
    assert_same_bytes(found, expected)
    # what is lost each time is at most the block under way (and steps shared with the full run)
    assert once <= sum(counted_steps) <= 2 * once


def test_a_run_does_not_depend_on_the_runs_beside_it() -> None:
    """Bit for bit, with sizes that are no multiples of anything."""
    torch.manual_seed(0)
    case = CASES["mlp_regression"]().to(torch.float32)
    model = FinalModel(mlp(4, (37, 70), 1, torch.nn.Tanh), mean_squared_error)
    for rule in ("shift", "mask", "every_batch", "reweighted"):
        protocol = Protocol("adam", batch_size=7, epochs=2, leave_out=rule)
        results = [
            further_train(model, case.train, case.test, protocol, [0, 1], units, chunk=chunk)
            for chunk, units in [
                (1, [0, 3, 9, 11]),
                (3, [9, 11, 0, 3]),
                (5, [11, 0, 9, 3]),
                (64, [0, 3, 9, 11]),
            ]
        ]
        for chosen in results[1:]:
            columns = [results[0].left_out.tolist().index(i) for i in chosen.left_out.tolist()]
            assert torch.equal(chosen.raw, results[0].raw[..., columns])


def test_test_losses_do_not_depend_on_the_number_of_replicas() -> None:
    """Bit for bit, with more test instances than are evaluated at a time."""
    torch.manual_seed(0)
    data = Instances(torch.randn(1200, 23), torch.randint(2, (1200,)))
    model = FinalModel(mlp(23, (128, 128), 2, torch.nn.ReLU), cross_entropy)
    setting = Setting.build(model, data[:150], data[150:], Protocol(batch_size=50, epochs=1))
    assert evaluation_batch(setting) < len(setting.test)
    losses = []
    for replicas in (1, 2, 5, 26):
        chunk = Chunk(setting, [Replica(0, (i,)) for i in range(replicas)])
        chunk.advance(2)
        losses.append(chunk.evaluate()[0][0])
    assert all(torch.equal(other, losses[0]) for other in losses)


def test_what_is_there_is_reused(tmp_path: Path, counted_steps: list[int]) -> None:
    case = CASES["mlp_regression"]().to(torch.float32)

    def job(
        seeds: list[int], units: list[int], store: bool = True, **horizon: int
    ) -> tuple[Sensitivity, int]:
        counted_steps.clear()
        protocol = Protocol(batch_size=5, lr=0.02, leave_out="every_batch", **horizon)
        place = Store(tmp_path) if store else None
        cost = Cost("further_training")
        found = further_train(case.final_model, case.train, case.test, protocol, seeds, units,
                              store=place, chunk=4, cost=cost)  # fmt: skip
        expected_share = 1 - sum(counted_steps) / (
            5 * horizon.get("epochs", 0) * len(seeds) * (len(units) + 1) or 1
        )
        if "epochs" in horizon and horizon["epochs"] == 2:
            assert cost.reused == pytest.approx(expected_share)
        return found, sum(counted_steps)

    _, taken = job([0, 1], [2, 4, 6, 8], epochs=2)
    assert taken == 2 * 5 * 2 * 5
    assert job([0, 1], [2, 4, 6, 8], epochs=2)[1] == 0
    assert job([1], [8, 4], epochs=1)[1] == 0, "fewer of everything"
    assert job([0, 1, 2], [2, 4, 6, 8], epochs=2)[1] == 2 * 5 * 5, "one more seed"
    assert job([0, 1], [1, 2, 4, 6, 8], epochs=2)[1] == 2 * 5 * 2, "one more instance"
    longer, taken = job([0, 1], [1, 2, 4, 6, 8], epochs=5)
    assert taken == 3 * 5 * 2 * 6, "three more epochs from the saved states"
    assert_same_bytes(longer, job([0, 1], [1, 2, 4, 6, 8], epochs=5, store=False)[0])
    assert job([0, 1, 2], [2, 4, 6, 8], epochs=2)[1] == 0, "the shorter job is still there"


def test_without_saved_states_more_epochs_start_again_and_say_so(
    tmp_path: Path, counted_steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["mlp_regression"]()

    def job(epochs: int, store: Store | None) -> Sensitivity:
        protocol = Protocol(batch_size=5, epochs=epochs, leave_out="every_batch")
        return further_train(
            case.final_model, case.train, case.test, protocol, [0], [2, 4], store=store, keep_states=False
        )

    job(1, Store(tmp_path))
    counted_steps.clear()
    longer = job(2, Store(tmp_path))
    assert sum(counted_steps) == 2 * 5 * 3
    assert "start again" in caplog.text
    assert_same_bytes(longer, job(2, None))
