"""Jobs that tests run in processes of their own, to kill them."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from pathlib import Path
from typing import Any

import torch

from fimo.further_training import Protocol, Sensitivity, further_train
from fimo.store.files import Store
from fimo.store.fingerprint import Problem, runs_key
from tests.cases import CASES

SEEDS = [0, 1]
UNITS = [0, 2, 3, 5, 7, [8, 9], [11, 12]]

for _name in ("mlp_regression", "transformer"):  # sources are read before processes are forked, not in each
    _case = CASES[_name]()
    runs_key(Problem.of(_case.final_model, _case.train), _case.test, Protocol(epochs=1))


def run(
    store: Path | None, name: str = "mlp_regression", save_seconds: float = 0.0, **protocol: Any
) -> Sensitivity:
    """Run a small job whose chunks save their state after nearly every step, or more seldom."""
    from fimo.engine import driver, records

    before = driver.BLOCK_SECONDS, records.SAVE_SECONDS, driver.POLL_SECONDS
    driver.BLOCK_SECONDS, records.SAVE_SECONDS, driver.POLL_SECONDS = 1e-4, save_seconds, 0.01
    torch.set_num_threads(1)
    case = CASES[name]().to(torch.float32)
    settings = {"batch_size": 5, "epochs": 6, "optimizer": "adam", "lr": 0.01, **protocol}
    try:
        return further_train(
            case.final_model, case.train, case.test, Protocol(**settings), SEEDS, UNITS,
            store=None if store is None else Store(store), chunk=3,
        )  # fmt: skip
    finally:
        driver.BLOCK_SECONDS, records.SAVE_SECONDS, driver.POLL_SECONDS = before


def run_and_count(
    store: Path,
    counted: Path,
    name: str,
    largest_file: int | None = None,
    protocol: dict[str, Any] | None = None,
) -> None:
    """Run a job and write down how many replica-steps this process took, also when it is interrupted."""
    # a shell's background jobs ignore it, and so would their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from fimo.engine.chunk import Chunk

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    taken, advance = 0, Chunk.advance

    def counting(self: Chunk, to_step: int) -> None:
        nonlocal taken
        taken += max(0, to_step - self.step) * len(self.replicas)
        advance(self, to_step)

    Chunk.advance = counting  # type: ignore[method-assign]
    try:
        run(store, name, **(protocol or {}))
    finally:
        counted.write_text(str(taken))


def process(*arguments: Any) -> multiprocessing.process.BaseProcess:
    """Return a started process that runs :func:`run_and_count`; a server with all imports forks it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.further_training.jobs", "fimo.engine.driver"])
    started = context.Process(target=run_and_count, args=arguments)
    started.start()
    return started
