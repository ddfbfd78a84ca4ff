"""How fast replicas advance here, and so how long further training will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, evaluation_batch, worker_threads
from fimo.engine.replicas import Replica

LEAST_SECONDS = 1.0
"""A job that might be shorter than this is not worth a measurement."""

QUICK = {"linear": 2e-6, "functional": 3e-5, "loop": 5e-4}
"""Seconds of a replica's step that hardly a machine undercuts, by engine: the calls of its operations."""

MOST_OPERATIONS = {"cpu": 1e11, "cuda": 5e13}
"""Floating-point operations per second that hardly a core, or a device, exceeds in such networks."""


@dataclass(frozen=True)
class Pace:
    """Seconds of wall time, all workers being busy.

    Args:
        step: of a replica's optimizer step.
        evaluation: of a replica's test losses at one evaluation point.
    """

    step: float
    evaluation: float

    def seconds(self, steps: float, evaluations: float) -> float:
        """Return the time of so many replica-steps and evaluations of a replica."""
        return self.step * steps + self.evaluation * evaluations


def measure_pace(setting: Setting, size: int, seconds: float, pool: ThreadPoolExecutor | None = None) -> Pace:
    """Advance chunks on all workers for about the given time.

    Args:
        size: replicas of a chunk.
        pool: of :func:`~fimo.engine.context.worker_threads` workers; one of its own when None.
    """
    n, workers = len(setting.train), worker_threads(setting)
    replicas = [Replica(0, (i % n,)) for i in range(size)]
    with _workers(setting, workers, pool) as (threads, counts):
        found = list(threads.map(lambda _: _advance(setting, replicas, seconds), range(counts)))
    return Pace(
        sum(step for step, _ in found) / counts**2, sum(evaluation for _, evaluation in found) / counts**2
    )


def _advance(setting: Setting, replicas: list[Replica], seconds: float) -> tuple[float, float]:
    """Return a worker's seconds for a replica's step, and for its test losses."""
    chunk = Chunk(setting, replicas)
    began, taken = time.monotonic(), 0
    chunk.advance(1)  # allocates, and is counted only where it takes all the time
    first = now = _after(setting)
    while now - began < 0.7 * seconds:
        chunk.advance(chunk.step + 1)
        now, taken = _after(setting), taken + 1
    step = (now - first) / taken if taken else first - began

    part = setting.test[: min(len(setting.test), evaluation_batch(setting))]
    few = Chunk(replace(setting, test=part), replicas[:2] if taken < 2 else replicas)
    began = time.monotonic()
    few.evaluate()
    evaluation = (_after(setting) - began) * len(setting.test) / max(1, len(part)) / len(few.replicas)
    return step / len(replicas), evaluation


def _after(setting: Setting) -> float:
    if setting.device.type == "cuda":  # launches return at once
        torch.cuda.synchronize(setting.device)
    return time.monotonic()


@contextmanager
def _workers(
    setting: Setting, workers: int, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    if pool is not None:
        yield pool, workers
        return
    threads = torch.get_num_threads()
    own = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(1 if workers > 1 else threads,)
    )
    try:
        with own:
            yield own, workers
    finally:
        torch.set_num_threads(threads)  # workers' setting reaches the matrix library's own


def expected_seconds(setting: Setting, pace: Pace, seeds: int, units: int, points: int, size: int) -> float:
    """Return how long all runs of a job will take.

    Args:
        seeds, units: S and L.
        points: E.
        size: replicas of a chunk.
    """
    runs = seeds * (units + 1)
    steps = runs * setting.protocol.total_steps(len(setting.train))
    chunks = -(-units // max(1, size))
    return pace.seconds(steps - saved_steps(setting, seeds * units, chunks), runs * points)


def least_seconds(setting: Setting, steps: int) -> float:
    """Return a time that so many replica-steps will hardly undercut, measuring nothing."""
    protocol, device = setting.protocol, setting.device.type
    operations = 6 * setting.final_model.size * min(protocol.batch_size, len(setting.train))
    most = MOST_OPERATIONS.get(device, MOST_OPERATIONS["cuda"])
    quick = QUICK[setting.engine] if device == "cpu" else 1e-6
    return steps * max(quick, operations / most) / worker_threads(setting)


def saved_steps(setting: Setting, runs: int, chunks: int) -> float:
    """Return about how many replica-steps of a seed's leave-one-out runs are those of its full run.

    Runs are in the order in which what they leave out occurs, so the k-th of c chunks starts k/c of an
    epoch late.

    Args:
        chunks: c, that a seed's runs are in.
    """
    if not setting.rule.until_occurrence:
        return 0.0
    n = len(setting.train)
    epoch = min(setting.protocol.total_steps(n), setting.protocol.batches_per_epoch(n))
    return runs * epoch * (1 - 1 / chunks) / 2


def about(seconds: float) -> str:
    """Return a foretold length of time: "about 3 min", or "less than a second"."""
    return f"about {as_time(seconds)}" if seconds >= 1 else as_time(seconds)


def as_time(seconds: float) -> str:
    """Return a length of time as a person says it."""
    if seconds < 1:
        return "less than a second"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
