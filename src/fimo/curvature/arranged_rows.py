"""Rows of a block of instances that were made in another order: texts of about the same length together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.jacobian import DenseRows, Rows, Shapes, StreamedRows, split
from fimo.curvature.module_rows import SQUARED_MB, ModuleRows


@dataclass(frozen=True)
class ArrangedRows(Rows):
    """Rows in memory, in parts whose instances are out of order.

    Args:
        parts: of at least one instance each.
        places: ``[n]``, where each instance is among those of the parts in turn.
    """

    parts: tuple[ModuleRows | DenseRows, ...]
    places: Tensor

    @property
    def n(self) -> int:  # type: ignore[override]
        return len(self.places)

    @property
    def r(self) -> int:  # type: ignore[override]
        return self.parts[0].r

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.parts[0].shapes

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def blocks(self) -> Iterator[Rows]:
        yield self

    def in_order(self, of_parts: list[Tensor]) -> Tensor:
        """Return tensors of the parts' instances ``[., ...]`` as one of all in order."""
        return torch.cat(of_parts)[self.places]

    def part(self, start: int, stop: int) -> Rows:
        places = self.places[start:stop]
        first, chosen, found = 0, [], []
        for part in self.parts:
            inside = (places >= first) & (places < first + part.n)
            if inside.any():
                found.append(part.some(places[inside] - first))
                chosen.append(inside.nonzero()[:, 0])
            first += part.n
        return ArrangedRows(tuple(found), torch.cat(chosen).argsort())

    def dense(self) -> Tensor:
        found = torch.empty(self.n, self.r, self.p, dtype=self.dtype, device=self.device)
        for part, at in parts_of(self):
            found[at] = part.dense()
        return found

    def to(self, dtype: torch.dtype) -> Rows:
        return ArrangedRows(tuple(p.to(dtype) for p in self.parts), self.places)  # type: ignore[misc]

    def squares(self) -> Rows:
        def blocks() -> Iterator[Rows]:
            for piece in self.pieces(SQUARED_MB):
                yield DenseRows(piece.dense().square_(), self.shapes)

        return StreamedRows(blocks, self.n, self.r, self.shapes, self.dtype, self.device)

    def parameter_norms(self) -> dict[str, Tensor]:
        norms = [p.parameter_norms() for p in self.parts]
        return {name: self.in_order([n[name] for n in norms]) for name in self.shapes}

    def own_gram(self) -> Tensor:
        return self.in_order([p.own_gram() for p in self.parts])

    def times(self, vectors: Tensor) -> Tensor:
        return self.in_order([p.times(vectors) for p in self.parts])

    def add_sums(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for part, at in parts_of(self):
            part.add_sums({name: weight[at] for name, weight in weights.items()}, into)

    def transposed_times(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros(weights.shape[2], self.p)
        self.add_sums(dict.fromkeys(self.shapes, weights), split(total, self.shapes))
        return total.T

    def grams_with(self, other: Rows) -> dict[str, Tensor]:
        found = [p.grams(other) for p in self.parts]
        return {name: self.in_order([f[name] for f in found]) for name in self.shapes}


def parts_of(block: Rows) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the parts of a block in memory, each with where its instances ``[n]`` are in the block."""
    if not isinstance(block, ArrangedRows):
        yield block, torch.arange(block.n, device=block.device)
        return
    order = block.places.argsort().split([part.n for part in block.parts])
    yield from zip(block.parts, order, strict=True)


def calls_of(block: Rows) -> tuple[ModuleRows, ...] | None:
    """Return the parts of a block in memory, in any order, where all are by what enters and leaves layers."""
    parts = block.parts if isinstance(block, ArrangedRows) else (block,)
    found = tuple(p for p in parts if isinstance(p, ModuleRows))
    return found if len(found) == len(parts) else None
