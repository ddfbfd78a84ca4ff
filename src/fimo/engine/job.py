"""A job: the runs that were asked for, what the store has of them, and which chunk comes next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from filelock import FileLock
from torch import Tensor

from fimo.engine.chunk import Chunk, shared_steps
from fimo.engine.context import Setting
from fimo.engine.records import Record, Records
from fimo.engine.replicas import Replica, Unit, next_chunk

log = logging.getLogger(__name__)


@dataclass
class Work:
    """A claimed chunk under way.

    Args:
        full_losses: ``[R, E, J]`` of each replica's full run, from which changes are taken; None where the
            replicas are full runs themselves.
        values: ``[R, E, J]``, test losses (float64) of full runs, else their changes (float32); NaN where
            not yet evaluated.
        distance: ``[R, E]`` from the final model (float64); all three on the CPU, or a GPU that runs are on.
        done: evaluation points recorded so far.
        sound: no optimizer step is half made.
    """

    chunk: Chunk
    lock: FileLock
    full_losses: Tensor | None
    values: Tensor
    distance: Tensor
    done: int = 0
    sound: bool = True
    seconds: float = 0.0
    saved: float = field(default_factory=time.monotonic)


class Job:
    """All runs of the given seeds and units, in chunks.

    Args:
        units: what is left out; the full run of each seed comes besides.
        points: ``[E]``, optimizer steps of the full run at evaluation points.
        size: replicas of a chunk.
        keep_states: keep the runs' last states, so that more evaluation points can be added later.

    Attributes:
        found: how many of the runs the store had when the job began.
        found_seconds, found_memory_mb: what making those took, and states that were continued from: its share
            of the time of the chunk for each run, and the largest memory of a process.
    """

    def __init__(
        self,
        setting: Setting,
        seeds: Sequence[int],
        units: Sequence[Unit],
        points: Sequence[int],
        records: Records,
        size: int,
        keep_states: bool,
    ) -> None:
        self.setting, self.points, self.records = setting, tuple(points), records
        self.size, self.keep_states = size, keep_states
        self.full = [Replica(seed) for seed in seeds]
        self.runs = [Replica(r.seed, u) for r in self.full for u in self._by_occurrence(r.seed, units)]
        self._done: dict[Replica, Record] = {}
        # in order; what is done is taken out, and its files' names kept: neither is gone through again, so
        # that planning a chunk does not take longer the more there are
        self._waiting_full, self._waiting_runs = dict.fromkeys(self.full), dict.fromkeys(self.runs)
        self._settled: set[str] = set()
        done = self._finished()
        found = [done[r] for r in [*self.full, *self.runs] if r in done]
        self.found = len(found)
        # of a run that went on for longer, the part that is used
        self.found_seconds = sum(
            record.seconds / len(record.replicas) * min(1.0, self.points[-1] / max(record.points))
            for record in found
        )
        self.found_memory_mb = max((record.memory_mb for record in found), default=0.0)
        self._full_losses: dict[int, Tensor] = {}
        self._one_thread, self._losses_lock = threading.Lock(), threading.Lock()
        self._say_what_starts_again(done)

    def _by_occurrence(self, seed: int, units: Sequence[Unit]) -> list[Unit]:
        """Return units by where they first occur, so that a chunk's replicas share most with the full run."""
        rule = self.setting.rule
        order = torch.randperm(rule.instances, generator=torch.Generator().manual_seed(seed))
        position: list[int] = torch.argsort(order).tolist()

        def first(unit: Unit) -> int:
            return min(position[i] for i in rule.members(unit))

        return sorted(units, key=lambda unit: (len(unit), first(unit), unit))

    def _finished(self) -> dict[Replica, Record]:
        """Return the record of each finished replica."""
        for record in self.records.finished(self._settled):
            if record.holds(self.points):
                self._settled.add(record.path.name)
                for replica in record.replicas:
                    self._done[replica] = record
                    self._waiting_full.pop(replica, None)
                    self._waiting_runs.pop(replica, None)
        return self._done

    def _say_what_starts_again(self, done: dict[Replica, Record]) -> None:
        shorter = {r for record in self.records.finished() for r in record.replicas} - set(done)
        saved = {r for record in self.records.states() for r in record.replicas}
        if again := (shorter - saved) & {*self.full, *self.runs}:
            log.warning(
                "%d runs in the store lack evaluation points and have no saved state: they start again",
                len(again),
            )

    @property
    def replicas(self) -> int:
        """The number of runs asked for."""
        return len(self.full) + len(self.runs)

    @property
    def is_finished(self) -> bool:
        """Whether the store holds all runs."""
        self._finished()
        return not self._waiting_full and not self._waiting_runs

    def next_work(self) -> Work | None:
        """Claim and set up the next chunk; None where all is finished or under way."""
        with self._one_thread, self.records.planning():
            self._finished()
            busy, full = self.records.claimed(self._settled), self._waiting_full
            # changes are taken from the full run, so it comes first
            waiting = full if any(r not in busy for r in full) else self._waiting_runs

            def is_free(replica: Replica) -> bool:
                ready = not replica.left_out or Replica(replica.seed) not in full
                return ready and replica in waiting and replica not in busy

            state = self._adoptable(is_free)
            if state:
                chosen = list(state.replicas)
                self.found_seconds += state.seconds
            else:
                one_seed_each = self.setting.stochastic  # its replicas share their masks
                free = filter(is_free, waiting)
                chosen = next_chunk(free, self.size, self.setting.rule.width, one_seed_each)
            if not chosen:
                return None
            lock = self.records.claim(chosen)
        return self._set_up(chosen, lock, state)

    def _adoptable(self, is_free: Callable[[Replica], bool]) -> Record | None:
        """Return a saved state to continue from, if its replicas are all free."""
        for record in self.records.states(self._settled):
            if all(map(is_free, record.replicas)):
                return record
            if any(r in self._done for r in record.replicas):
                self._settled.add(record.path.name)
        return None

    def _set_up(self, replicas: Sequence[Replica], lock: FileLock, state: Record | None) -> Work:
        full = not replicas[0].left_out
        shape = (len(replicas), len(self.points), len(self.setting.test))
        # a GPU keeps them until the chunk is finished, so that no evaluation waits for a copy
        where = self.setting.device if self.setting.device.type == "cuda" else torch.device("cpu")
        wide = torch.float64
        values = torch.full(shape, torch.nan, dtype=wide if full else torch.float32, device=where)
        distance = torch.full(shape[:2], torch.nan, dtype=wide, device=where)
        losses = None
        if not full:
            seeds = sorted({r.seed for r in replicas})
            each = torch.stack([self.full_losses(seed) for seed in seeds]).to(where)
            losses = each[torch.tensor([seeds.index(r.seed) for r in replicas], device=where)]
        start = 0 if state else shared_steps(replicas, self.setting.rule, self.setting.protocol)
        work = Work(Chunk(self.setting, replicas), lock, losses, values, distance)
        if state:
            self._resume(work, state)
        elif start:
            work.chunk.start_from_full_run(start)
            while work.done < len(self.points) and work.chunk.evaluation_steps[work.done] <= start:
                values[:, work.done] = 0.0  # the same runs up to here
                distance[:, work.done] = self._full_record(replicas[0].seed)["distance"][work.done]
                work.done += 1
        return work

    def _resume(self, work: Work, record: Record) -> None:
        tensors = self.records.read(record)
        step = int(tensors["step"])
        for done, point in enumerate(self.points):
            if work.chunk.evaluation_steps[done] > step:
                break
            if point not in record.points:
                log.warning("a saved state has other evaluation points; its runs start again")
                return
            at = record.points.index(point)
            work.values[:, done] = tensors["values"][:, at]
            work.distance[:, done] = tensors["distance"][:, at]
            work.done = done + 1
        state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
        work.chunk.restore(state, step)
        work.seconds = record.seconds

    def save(self, work: Work) -> None:
        """Save a chunk's state."""
        chunk = work.chunk
        tensors = {
            "values": work.values[:, : work.done],
            "distance": work.distance[:, : work.done],
            "step": torch.tensor(chunk.step),
            **{f"state.{name}": t[: len(chunk.replicas)] for name, t in chunk.state().items()},
        }
        self.records.write(chunk.replicas, self.points[: work.done], tensors, work.seconds, state=True)
        work.saved = time.monotonic()

    def finish(self, work: Work) -> None:
        """Write a chunk's results and give up its claim."""
        if self.keep_states:
            self.save(work)
        tensors = {"values": work.values, "distance": work.distance}
        self.records.write(work.chunk.replicas, self.points, tensors, work.seconds)
        if not self.keep_states:
            self.records.drop_state(work.chunk.replicas)
        with self._one_thread:
            self.records.release(work.chunk.replicas, work.lock)

    def full_losses(self, seed: int) -> Tensor:
        """Return the test losses ``[E, J]`` (float64) of a seed's finished full run."""
        with self._losses_lock:  # several workers set up chunks
            if seed not in self._full_losses:
                if len(self._full_losses) >= 16:  # memory stays flat in the number of seeds
                    self._full_losses.clear()
                self._full_losses[seed] = self._full_record(seed)["values"]
            return self._full_losses[seed]

    def _full_record(self, seed: int) -> dict[str, Tensor]:
        return self.row(Replica(seed))

    def is_done(self, replica: Replica) -> bool:
        """Whether a run was finished when the store was last looked at."""
        return replica in self._done

    def finished_seeds(self) -> int:
        """Return of how many seeds, from the first on, all runs are."""
        first = next(iter(self._waiting_runs or self._waiting_full), None)
        return len(self.full) if first is None else self.full.index(Replica(first.seed))

    def row(self, replica: Replica) -> dict[str, Tensor]:
        """Return a finished replica's ``values [E, J]`` and ``distance [E]``."""
        return self.rows({replica: self._done[replica]})[replica]

    def rows(self, which: dict[Replica, Record]) -> dict[Replica, dict[str, Tensor]]:
        """Return finished replicas' ``values [E, J]`` and ``distance [E]`` at the job's evaluation points."""
        rows: dict[Replica, dict[str, Tensor]] = {}
        for record in {rec.path: rec for rec in which.values()}.values():
            tensors = self.records.read(record)
            at = torch.tensor([record.points.index(p) for p in self.points])
            for r, replica in enumerate(record.replicas):
                if which.get(replica) == record:
                    rows[replica] = {k: tensors[k][r, at] for k in ("values", "distance")}
        return rows

    def seed_rows(self, seed: int) -> dict[Replica, dict[str, Tensor]]:
        """Return the finished rows of one seed's replicas."""
        wanted = [Replica(seed), *(r for r in self.runs if r.seed == seed)]
        return self.rows({r: self._done[r] for r in wanted})
