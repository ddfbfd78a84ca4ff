"""Projections of each layer's gradient from both sides: from what enters and what leaves it, never formed.

The gradient of a linear layer is δ a^T, so that its projection to a k x k matrix is the outer product of two
projected vectors, (Q δ) (P a)^T (LoGra; Choe et al., 2024): it costs k (in + out) numbers where a projection
of the whole gradient costs k^2 in out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.arranged_rows import ArrangedRows
from fimo.curvature.jacobian import FactoredRows, LayerFactors, Rows, Shapes, split
from fimo.curvature.module_rows import ModuleRows
from fimo.curvature.module_terms import formed


@dataclass(frozen=True)
class Side:
    """The projection of one module's gradient, as a matrix ``[out, in]``: ``leaving M entering^T``.

    Args:
        names: the module's parameters; each is some columns of the matrix, a bias one of them.
        leaving: ``[k, out]``, orthonormal rows (before any scale).
        entering: ``[k', in]``, likewise.
    """

    names: tuple[str, ...]
    leaving: Tensor
    entering: Tensor

    @property
    def size(self) -> int:
        return len(self.leaving) * len(self.entering)

    def of_matrices(self, matrices: Tensor) -> Tensor:
        """Return ``[..., size]`` of matrices ``[..., out, in]``."""
        return (self.leaving @ matrices @ self.entering.T).flatten(-2)

    def of_factors(self, layer: LayerFactors) -> Tensor:
        """Return ``[n, R, size]`` of a linear layer's rows."""
        entering, leaving = layer.entering_all @ self.entering.T, layer.delta @ self.leaving.T
        return (leaving[..., None] * entering[:, None, None]).flatten(2)

    def of_calls(self, rows: ModuleRows) -> Tensor:
        """Return ``[n, R, size]`` of rows by what enters and leaves layers."""
        total = torch.zeros(rows.n, rows.r, self.size, dtype=rows.dtype, device=rows.device)
        start = 0
        for name in self.names:
            columns = self.entering[:, start : start + _columns(rows.shapes[name])].T
            start += len(columns)
            for r, terms in enumerate(rows.terms((name,))):
                for term in terms:
                    total[:, r] += formed([term.rotated(self.leaving.T, columns)]).flatten(1)
        return total


@dataclass(frozen=True)
class LayerProjection:
    """A projection of rows in parameter space, module by module.

    A module's parameters make up a matrix with the first axis of each as rows: ``[W, b]`` of a linear layer,
    a convolution's filters, an embedding's table, the two columns of a LayerNorm.

    Args:
        shapes: of all trainable parameters.
        sides: of each module.
    """

    shapes: Shapes
    sides: tuple[Side, ...]

    @classmethod
    def random(cls, shapes: Shapes, dimension: int, seed: int, like: Tensor) -> LayerProjection:
        """Draw orthonormal projections, on the CPU: they are the same on every device.

        Args:
            dimension: k, of each side; a side that is not longer stays as it is.
            like: whose dtype and device the projections have.
        """
        generator = torch.Generator().manual_seed(seed)
        sides = [
            Side(
                names,
                _orthonormal(dimension, rows, generator).to(like),
                _orthonormal(dimension, sum(_columns(shapes[n]) for n in names), generator).to(like),
            )
            for names, rows in _modules(shapes)
        ]
        return cls(shapes, tuple(sides))

    @property
    def sizes(self) -> list[int]:
        """Of each module's projected gradient."""
        return [side.size for side in self.sides]

    def scaled(self, second_moment: Tensor) -> LayerProjection:
        """Return the projection of gradients divided by the root of their second moment.

        That of a module, V, is taken as r c^T / mean(V) with its mean along rows and columns, as Adafactor
        does (Shazeer and Stern, 2018), so that the division is one of each side.

        Args:
            second_moment: ``[P]``.
        """
        sides = []
        parts = split(second_moment[None], self.shapes)
        for side in self.sides:
            moment = _matrices(parts, side.names, self.shapes)[0]
            rows, columns, mean = moment.mean(1), moment.mean(0), moment.mean()
            leaving = side.leaving * _inverse_root(rows) * mean.sqrt()
            sides.append(Side(side.names, leaving, side.entering * _inverse_root(columns)))
        return LayerProjection(self.shapes, tuple(sides))

    def project(self, rows: Rows) -> Tensor:
        """Return the projected rows ``[n, R, sum of sizes]``; memory beyond that is bounded by one block."""
        return torch.cat(list(self.blocks(rows)))

    def blocks(self, rows: Rows) -> Iterator[Tensor]:
        """Yield the projected rows of consecutive instances."""
        for block in rows.blocks():
            if isinstance(block, FactoredRows):
                for part in block.parts():
                    by_name = {layer.names[0]: layer for layer in part.layers}
                    yield torch.cat([side.of_factors(by_name[side.names[0]]) for side in self.sides], 2)
                continue
            if isinstance(block, ModuleRows):
                yield torch.cat([side.of_calls(block) for side in self.sides], 2)
            elif isinstance(block, ArrangedRows):
                yield block.in_order([self.project(part) for part in block.parts])
            else:
                yield from self._dense_blocks(block)

    def _dense_blocks(self, block: Rows) -> Iterator[Tensor]:
        for piece in block.pieces():
            parts = split(piece.dense().flatten(0, 1), block.shapes)
            found = [side.of_matrices(_matrices(parts, side.names, self.shapes)) for side in self.sides]
            yield torch.cat(found, 1).view(piece.n, piece.r, -1)


def projected_size(shapes: Shapes, dimension: int) -> list[int]:
    """Return the sizes of the modules' projected gradients."""
    return [
        min(dimension, rows) * min(dimension, sum(_columns(shapes[n]) for n in names))
        for names, rows in _modules(shapes)
    ]


def _modules(shapes: Shapes) -> list[tuple[tuple[str, ...], int]]:
    """Return the names of each module's parameters, and the rows that they share, in order."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, shape in shapes.items():
        found.setdefault((name.rpartition(".")[0], shape[0] if shape else 1), []).append(name)
    return [(tuple(names), rows) for (_, rows), names in found.items()]


def _columns(shape: torch.Size) -> int:
    return shape[1:].numel()


def _matrices(parts: Mapping[str, Tensor], names: tuple[str, ...], shapes: Shapes) -> Tensor:
    """Return flat parts ``[K, numel]`` as matrices ``[K, rows, columns]``."""
    return torch.cat([parts[n].reshape(len(parts[n]), -1, _columns(shapes[n])) for n in names], 2)


def _orthonormal(k: int, n: int, generator: torch.Generator) -> Tensor:
    """Return orthonormal rows ``[min(k, n), n]`` of random directions; the identity where k >= n."""
    if k >= n:
        return torch.eye(n, dtype=torch.float64)
    drawn = torch.randn(n, k, generator=generator, dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(drawn)[0]
    return columns.T


def _inverse_root(moments: Tensor, negligible: float = 1e-8) -> Tensor:
    """Return 1 / sqrt(moments), a negligible share of their mean added to each; 0 where all are."""
    least = negligible * moments.mean()
    return (moments + least).rsqrt() if least > 0 else torch.zeros_like(moments)
