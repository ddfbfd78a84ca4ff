"""Records of chunks in the store: results, saved states, and who is working on what.

A job's folder holds, for each chunk of replicas, named after their content:

- ``NAME.safetensors``: finished results ``[R, E, ...]``;
- ``NAME.state.safetensors``: the state to continue from, with the results so far; written at most every
  ``SAVE_SECONDS`` while the chunk runs, and kept afterwards if more evaluation points may be asked for;
- ``NAME.claim``: locked by the process that works on the chunk, and listing its replicas. The lock ends
  with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from fimo.cost import peak_memory_mb
from fimo.engine.replicas import Replica
from fimo.store.files import read_tensors, write_tensors

STATE = ".state.safetensors"

SAVE_SECONDS = 30.0
"""Longest time of a chunk's work that a kill can lose, but for the last block of steps."""


@dataclass(frozen=True)
class Record:
    """What a file says of itself: its replicas, and the evaluation points (full-run steps) that it holds.

    Args:
        seconds: that the chunk took, on all workers of a process.
        memory_mb: the largest memory of the process; 0 where it was not written down.
    """

    path: Path
    replicas: tuple[Replica, ...]
    points: tuple[int, ...]
    seconds: float
    memory_mb: float = 0.0

    def holds(self, points: Sequence[int]) -> bool:
        return set(points) <= set(self.points)


class Records:
    """The records of one job's folder, shared by processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str, int, int], Record] = {}
        self._held: dict[str, tuple[Replica, ...]] = {}

    def finished(self, known: Set[str] = frozenset()) -> list[Record]:
        """Return all results but those in files of known names, in order of their names."""
        return self._read_all([n for n in self._names(".safetensors", known) if not n.endswith(STATE)])

    def states(self, known: Set[str] = frozenset()) -> list[Record]:
        """Return all saved states but those in files of known names, in order of their names."""
        return self._read_all(self._names(STATE, known))

    def write(
        self,
        replicas: Sequence[Replica],
        points: Sequence[int],
        tensors: Mapping[str, Tensor],
        seconds: float,
        state: bool = False,
    ) -> None:
        """Write results (or a state, with the results so far) of a chunk."""
        metadata = {
            "replicas": _text(replicas),
            "points": json.dumps(list(points)),
            "seconds": str(seconds),
            "memory_mb": f"{peak_memory_mb():.1f}",
        }
        write_tensors(self._path(replicas, state), tensors, metadata)

    def drop_state(self, replicas: Sequence[Replica]) -> None:
        """Delete a chunk's saved state."""
        self._path(replicas, state=True).unlink(missing_ok=True)

    def read(self, record: Record) -> dict[str, Tensor]:
        """Return a record's tensors."""
        return read_tensors(record.path)

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Keep other processes from claiming replicas."""
        with FileLock(self.folder / ".planning.lock").acquire(poll_interval=0.005):
            yield

    def claimed(self, known: Set[str] = frozenset()) -> set[Replica]:
        """Return the replicas that living processes work on (call while planning).

        Args:
            known: names of files that are no claims.
        """
        busy: set[Replica] = set()
        for replicas in self._held.values():
            busy |= set(replicas)
        for path in [self.folder / n for n in self._names(".claim", known) if n not in self._held]:
            lock = FileLock(path.with_suffix(".lock"), blocking=False)
            try:
                lock.acquire()
            except Timeout:
                with contextlib.suppress(OSError, ValueError):
                    busy |= set(_replicas(path.read_text()))
            else:  # left by a process that ended
                path.unlink(missing_ok=True)
                lock.release()
        return busy

    def claim(self, replicas: Sequence[Replica]) -> FileLock:
        """Claim a chunk (call while planning); its lock is to be released by :meth:`release`."""
        path = self.folder / f"{_name(replicas)}.claim"
        lock = FileLock(
            path.with_suffix(".lock"), thread_local=False
        )  # a worker claims, another thread releases
        lock.acquire()
        path.write_text(_text(replicas))  # in place: it is read while planning, and void without its lock
        self._held[path.name] = tuple(replicas)
        return lock

    def release(self, replicas: Sequence[Replica], lock: FileLock) -> None:
        """Give up a claim."""
        with self.planning():  # a lock's file may only vanish while nobody opens it
            path = self.folder / f"{_name(replicas)}.claim"
            path.unlink(missing_ok=True)
            self._held.pop(path.name, None)
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _path(self, replicas: Sequence[Replica], state: bool) -> Path:
        return self.folder / f"{_name(replicas)}{STATE if state else '.safetensors'}"

    def _names(self, ending: str, known: Set[str] = frozenset()) -> list[str]:
        return sorted(n for n in set(os.listdir(self.folder)) - known if n.endswith(ending))

    def _read_all(self, names: Sequence[str]) -> list[Record]:
        records = []
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # replaced or dropped by another process meanwhile
                records.append(self._read(name))
        return records

    def _read(self, name: str) -> Record:
        about_file = os.stat(f"{self.folder}/{name}")
        # files that replace one another within a tick of the clock differ otherwise
        key = (name, about_file.st_mtime_ns, about_file.st_ino)
        if key not in self._known:
            path = self.folder / name
            with safe_open(path, "pt") as file:
                about = file.metadata()
            self._known[key] = Record(
                path,
                _replicas(about["replicas"]),
                tuple(json.loads(about["points"])),
                float(about["seconds"]),
                float(about.get("memory_mb", 0.0)),
            )
        return self._known[key]


def _text(replicas: Sequence[Replica]) -> str:
    return json.dumps([[r.seed, list(r.left_out)] for r in replicas])


def _replicas(text: str) -> tuple[Replica, ...]:
    return tuple(Replica(seed, tuple(left_out)) for seed, left_out in json.loads(text))


def _name(replicas: Sequence[Replica]) -> str:
    kind = "runs" if replicas[0].left_out else "full"
    return f"{kind}-{hashlib.sha256(_text(replicas).encode()).hexdigest()[:20]}"
