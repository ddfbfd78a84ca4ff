"""Many rows of numbers in files of consecutive ones, made by any processes in any order, mapped to be read.

A file is whole or absent. Whoever makes rows claims one file at a time by a lock, so that processes with one
folder share the work, and a killed one loses the file that it was at. Which process made a file, and in which
part, changes none of its bytes; folders of several machines are joined by copying their files together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from fimo.errors import InputError
from fimo.store.files import write_tensors

log = logging.getLogger(__name__)

EACH = 1024
"""Rows of a file: little is lost with one that was being made, and a million rows are a thousand files."""

LOST = 0.02
"""Largest relative change of a row's length that its kept type may make."""

WAIT = 0.2
"""Seconds between looks at files that other processes are making."""


@dataclass(frozen=True)
class RowFiles:
    """Rows ``[n, width]`` in a folder.

    Args:
        folder: that holds nothing else but ``key.json``.
        n, width: numbers of rows, and of entries of each.
        dtype: in which entries are kept; ``bfloat16`` has 8 bits and float32's range, ``float16`` 11 bits and
            a range of 6e-8 to 65504.
    """

    folder: Path
    n: int
    width: int
    dtype: torch.dtype

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """Return the first rows of the files that are not there, of the k-th of n parts."""
        k, n = part
        there = {path.name for path in self.folder.glob("*.safetensors")}
        starts = range(0, self.n, EACH)[k::n]
        return [start for start in starts if self._path(start).name not in there]

    def make(self, rows: Callable[[int, int], Tensor], part: tuple[int, int] = (0, 1)) -> int:
        """Make the files that are missing, but for those that other processes make meanwhile.

        Args:
            rows: of a start and a stop, the rows ``[stop - start, width]`` between.
            part: the k-th of n parts of the files.

        Returns:
            How many rows were made here.

        Raises:
            InputError: a row that is not finite, or that the kept type can't hold.
            OSError: the disk is full or not writable; whole files stay.
        """
        made, waiting = 0, self.missing(part)
        self.folder.mkdir(parents=True, exist_ok=True)
        while waiting:
            others = []
            for start in waiting:
                stop = min(start + EACH, self.n)
                lock = FileLock(self.folder / f"{start:012d}.lock", blocking=False)
                try:
                    lock.acquire()
                except Timeout:
                    others.append(start)
                    continue
                try:
                    if not self._path(start).exists():
                        self._write(start, rows(start, stop))
                        made += stop - start
                finally:
                    if self._path(start).exists():  # whoever gets the lock later sees the rows
                        Path(lock.lock_file).unlink(missing_ok=True)
                    lock.release()
            if len(others) == len(waiting):
                time.sleep(WAIT)
            waiting = [start for start in others if not self._path(start).exists()]
        return made

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield consecutive rows ``[m, width]`` and their lengths ``[m]`` float32, mapped: not to be written.

        Raises:
            InputError: a file is missing, or holds rows of another shape or type.
        """
        for start in range(0, self.n, EACH):
            yield self._read(start)

    def some(self, index: Tensor) -> Tensor:
        """Return the rows at ``index`` ``[m]`` as ``[m, width]`` in memory."""
        found = torch.empty(len(index), self.width, dtype=self.dtype)
        file = index.cpu() // EACH
        for which in file.unique().tolist():
            places = (file == which).nonzero()[:, 0]
            rows, _ = self._read(which * EACH)
            found[places] = rows[index.cpu()[places] - which * EACH]
        return found

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012d}.safetensors"

    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        path = self._path(start)
        try:
            with safe_open(path, "pt") as file:
                rows, lengths = file.get_tensor("rows"), file.get_tensor("lengths")
        except FileNotFoundError:
            raise InputError("store", f"{path} is missing; make the rows again") from None
        if rows.shape != (min(EACH, self.n - start), self.width) or rows.dtype != self.dtype:
            raise InputError("store", f"{path} holds {list(rows.shape)} {rows.dtype}; delete its folder")
        return rows, lengths

    def _write(self, start: int, rows: Tensor) -> None:
        exact = rows.detach().cpu()
        kept = exact.to(self.dtype)
        sizes, lengths = exact.float().norm(dim=1), kept.float().norm(dim=1)
        lost = ~((sizes - lengths).abs() <= LOST * sizes)
        if lost.any():
            at = int(lost.nonzero()[0, 0])
            what = f"row {start + at} has the length {sizes[at]:.3g}"
            if not torch.isfinite(sizes[at]):
                raise InputError("gradients", f"{what}, which is not finite")
            raise InputError("storage", f"{what}, and {lengths[at]:.3g} in {self.dtype}; choose bfloat16")
        write_tensors(self._path(start), {"rows": kept, "lengths": lengths})
