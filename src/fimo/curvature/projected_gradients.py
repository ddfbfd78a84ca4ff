"""Projected gradients of many instances: in memory, in files that methods and runs share, or made again.

Those of a set are read in blocks, whichever it is, so that what uses them needs the memory of a block.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.store.files import Store, read_tensors, write_tensors
from fimo.store.fingerprint import Key, folder_of, projected_key
from fimo.store.row_files import EACH, RowFiles

log = logging.getLogger(__name__)

BLOCK = 4096
"""Most rows of a block of those that are held in memory."""

Project = Callable[[Instances], Iterator[Tensor]]
"""Instances -> blocks ``[n, K]`` of their projected gradients, in order."""


class ProjectedGradients(ABC):
    """Rows ``[N, K]`` of N instances.

    Attributes:
        n, width: N and K.
    """

    n: int
    width: int

    @abstractmethod
    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield consecutive rows ``[m, K]``, not to be written, with their lengths ``[m]`` (float32)."""

    @abstractmethod
    def some(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same of the rows at ``index``, in its order."""

    def chosen(self, index: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows at ``index``, or all of them where that is None, with their lengths."""
        return self.blocks() if index is None else self.some(index)

    def second_moments(self, sizes: list[int]) -> list[Tensor]:
        """Return the sums of outer products of the rows' parts of these sizes, ``[k, k]`` float64 each."""
        return summed_squares((rows for rows, _ in self.blocks()), sizes)


@dataclass(frozen=True)
class HeldGradients(ProjectedGradients):
    """Rows in memory.

    Args:
        values: ``[N, K]``.
    """

    values: Tensor

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.values)

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.values.split(BLOCK):
            yield _measured(rows)

    def some(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for at in index.to(self.values.device).split(BLOCK):
            yield _measured(self.values[at])


@dataclass(frozen=True)
class KeptGradients(ProjectedGradients):
    """Rows in files.

    Args:
        files: where they are.
        device: on which they are used.
    """

    files: RowFiles
    device: torch.device

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.files.n

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.files.width

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, lengths in self.files.blocks():
            yield rows.to(self.device), lengths.to(self.device)

    def some(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for at in index.split(BLOCK):
            yield _measured(self.files.some(at).to(self.device))

    def second_moments(self, sizes: list[int]) -> list[Tensor]:
        # beside the rows, whose files have other names
        path = self.files.folder / f"moments-{len(sizes)}-{sum(k * k for k in sizes)}.safetensors"
        if path.exists():
            return list(read_tensors(path, self.device).values())
        found = super().second_moments(sizes)
        write_tensors(path, {f"{k:06d}": total for k, total in enumerate(found)})
        return found


@dataclass(frozen=True)
class RemadeGradients(ProjectedGradients):
    """Rows that are computed whenever they are used.

    Args:
        instances: whose they are.
        project: computes them.
        width: K.
    """

    instances: Instances
    project: Project
    width: int

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.instances)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.project(self.instances):
            yield _measured(rows)

    def some(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.project(self.instances[index.to(self.instances.targets.device)]):
            yield _measured(rows)


def projected_gradients(
    instances: Instances,
    project: Project,
    width: int,
    dtype: torch.dtype,
    memory: float,
    cache: Path | None = None,
    key: Callable[[], Key] | None = None,
) -> ProjectedGradients:
    """Return the projected gradients of a set.

    Args:
        project: computes those of some instances.
        width: K.
        dtype: in which they are held or kept.
        memory: bytes that they may take where they are held.
        cache: a folder that keeps them: those that are there are read, the others made.
        key: what they depend on, see :func:`kept_key`.

    Raises:
        InputError: gradients that are not finite, or that ``dtype`` can't hold.
    """
    device = instances.targets.device
    if cache is not None and key is not None:
        files, _ = kept_files(instances, project, width, dtype, cache, key)
        if files is not None:
            return KeptGradients(files, device)
    size = len(instances) * width * dtype.itemsize
    if size > memory:
        log.info(
            "projected gradients of %d instances take %.1f GiB, more than memory_mb=%.0f: they are computed "
            "again whenever they are used; methods.NAME.cache=FOLDER for the method NAME keeps them",
            len(instances), size / 2**30, memory / 2**20,
        )  # fmt: skip
        return RemadeGradients(instances, project, width)
    values = torch.empty(len(instances), width, dtype=dtype, device=device)
    start = 0
    for rows in project(instances):
        values[start : start + len(rows)] = rows
        start += len(rows)
    return HeldGradients(values)


def kept_files(
    instances: Instances,
    project: Project,
    width: int,
    dtype: torch.dtype,
    cache: Path,
    key: Callable[[], Key],
    part: tuple[int, int] = (0, 1),
) -> tuple[RowFiles | None, int]:
    """Return files of projected gradients, of which the missing ones are made; and how many rows that were.

    None where they can't be kept, which the log explains.

    Args:
        part: make the k-th of n parts only.
        others: as of :func:`projected_gradients`.
    """
    folder = folder_of(Store(cache), "gradients", key)
    if folder is None:
        return None, 0
    files = RowFiles(folder, len(instances), width, dtype)
    made = files.make(lambda start, stop: torch.cat(list(project(instances[start:stop]))), part)
    log.info(
        "projected gradients of %d instances (%d numbers each): %d made now, the others %s %s",
        len(instances), width, made, "read from" if part == (0, 1) else "left to other parts, or in", folder,
    )  # fmt: skip
    return files, made


def kept_tensor(
    cache: Path | None, key: Callable[[], Key], make: Callable[[], Tensor], device: torch.device
) -> Tensor:
    """Return a tensor that is kept beside projected gradients, made where it is not there."""
    folder = None if cache is None else folder_of(Store(cache), "gradients", key)
    path = None if folder is None else folder / "tensor.safetensors"
    if path is not None and path.exists():
        return read_tensors(path, device)["tensor"]
    found = make()
    if path is not None:
        write_tensors(path, {"tensor": found})
    return found


def kept_key(
    final_model: FinalModel,
    instances: Instances,
    kind: str,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    code: Sequence[str],
) -> Callable[[], Key]:
    """Return a function of no arguments: what kept projections depend on, their form included.

    Args:
        kind, settings: say which projection of which gradients it is.
        dtype: in which it is kept.
        code: modules of this package that compute it.
    """
    form = {**settings, "kept": str(dtype).removeprefix("torch."), "file": EACH}
    modules = ("fimo.curvature.projected_gradients", *code)
    return lambda: projected_key(final_model, instances, kind, form, modules)


def _measured(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows with their lengths."""
    return rows, rows.float().norm(dim=1)


def summed_squares(blocks: Iterable[Tensor], sizes: list[int]) -> list[Tensor]:
    """Return the sums of outer products of rows' parts of some sizes, ``[k, k]`` float64 each.

    Args:
        blocks: of at least one row, ``[m, K]``.
        sizes: that add up to K.
    """
    totals: list[Tensor] = []
    for rows in blocks:
        for piece in rows.split(BLOCK):
            parts = piece.double().split(sizes, 1)
            totals = totals or [part.new_zeros(part.shape[1], part.shape[1]) for part in parts]
            for total, part in zip(totals, parts, strict=True):
                total.addmm_(part.T, part)
    return totals
