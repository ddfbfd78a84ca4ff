"""Rows: per-instance vectors in parameter space (gradients, Jacobians), n instances with R rows each.

Three forms with one interface, so that methods and solvers never ask which they hold: factors of linear
layers (a gradient is an outer product and is never formed), dense blocks in memory, and a stream of blocks
recomputed (or read from disk) when needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, torch.Size]
"""Parameters by name, in the order in which flat vectors of length P concatenate them."""

PIECE = 2**18
"""Numbers of one layer that products of factored rows make at once, so that a CPU keeps them in its cache."""


STRIP = 512
"""Instances of a strip of a symmetric matrix of inner products, whose other half is its mirror image."""

INSTANCES = 4096
"""Instances of factored rows that are turned, squared or projected together."""


class Rows(ABC):
    """n·R vectors of length P.

    Args of every operation are in the rows' dtype and on their device.

    Attributes:
        n, r: numbers of instances and of rows per instance.
        shapes: the parameters that the P entries belong to.
    """

    n: int
    r: int
    shapes: Shapes

    @property
    def p(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def blocks(self) -> Iterator[Rows]:
        """Yield consecutive instances as rows held in memory."""

    def part(self, start: int, stop: int) -> Rows:
        """Return the rows of instances ``start`` to ``stop`` of rows held in memory."""
        raise NotImplementedError

    def pieces(self, megabytes: float = 256) -> Iterator[Rows]:
        """Yield consecutive instances whose dense form has at most this size (at least one instance)."""
        size = max(1, int(megabytes * 2**20 / (self.r * self.p * self.dtype.itemsize)))
        for block in self.blocks():
            for start in range(0, block.n, size):
                yield block.part(start, start + size)

    @abstractmethod
    def dense(self) -> Tensor:
        """Return ``[n, R, P]``."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Rows:
        """Return the same rows, converted to ``dtype`` before they are used."""

    @abstractmethod
    def squares(self) -> Rows:
        """Return the rows with every entry squared, in the same form."""

    def gram(self, other: Rows, weight: Tensor | None = None) -> Tensor:
        """Return inner products ``[n, R, m, S]`` with the rows of ``other``.

        Args:
            weight: ``[P]``, of the entries of the inner product; ones when None.
        """
        if weight is not None:
            return torch.cat([_weighted_gram(piece, other, weight) for piece in self.pieces()])
        return _by_blocks(self, other, _block_gram, 0)

    def kernel(self) -> Tensor:
        """Return the inner products ``[n R, n R]`` of all rows with each other."""
        return self.gram(self).view(self.n * self.r, -1)

    def grams(self, other: Rows) -> dict[str, Tensor]:
        """Return the inner products ``[n, R, m, S]`` of each parameter's entries, by its name."""
        stacked = _by_blocks(self, other, lambda a, b: torch.stack(list(_block_grams(a, b).values())), 1)
        return dict(zip(self.shapes, stacked, strict=True))

    def grams_with(self, other: Rows) -> dict[str, Tensor] | None:
        """Return :meth:`grams` with other rows in memory where these have a way of their own, else None."""
        return None

    def own_gram(self) -> Tensor:
        """Return each instance's inner products ``[n, R, R]`` of its own rows."""
        if isinstance(self, DenseRows | FactoredRows):
            return _own_gram(self)
        return torch.cat([b.own_gram() for b in self.blocks()])

    def squared_norms(self) -> Tensor:
        """Return ``[n, R]``."""
        return torch.cat([sum_of(b.parameter_norms()) for b in self.blocks()])

    def parameter_norms(self) -> dict[str, Tensor]:
        """Return the squared norm ``[n, R]`` of each parameter's entries, by its name."""
        found = [b.parameter_norms() for b in self.blocks()]
        return {name: torch.cat([f[name] for f in found]) for name in self.shapes}

    def times(self, vectors: Tensor) -> Tensor:
        """Return the products ``[n, R, K]`` with vectors ``[P, K]``."""
        return torch.cat([b.times(vectors) for b in self.blocks()])

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Return the sums ``[P, K]`` of all rows, weighted with ``[n, R, K]``."""
        total = torch.zeros(self.p, weights.shape[2], dtype=self.dtype, device=self.device)
        start = 0
        for block in self.blocks():
            total += block.transposed_times(weights[start : start + block.n])
            start += block.n
        return total

    def add_sums(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Add sums of each parameter's entries of rows in memory, with weights of its own.

        Args:
            weights: ``[n, R, K]`` by parameter.
            into: ``[K, numel]`` by parameter.
        """
        for name, weight in weights.items():
            into[name].add_(split(self.transposed_times(weight).T, self.shapes)[name])


@dataclass(frozen=True)
class DenseRows(Rows):
    """Rows in memory.

    Args:
        values: ``[n, R, P]``.
    """

    values: Tensor
    shapes: Shapes

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def r(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def blocks(self) -> Iterator[Rows]:
        yield self

    def part(self, start: int, stop: int) -> Rows:
        return DenseRows(self.values[start:stop], self.shapes)

    def some(self, at: slice | Tensor) -> DenseRows:
        """Return the rows of some instances."""
        return DenseRows(self.values[at], self.shapes)

    def dense(self) -> Tensor:
        return self.values

    def to(self, dtype: torch.dtype) -> Rows:
        return DenseRows(self.values.to(dtype), self.shapes)

    def squares(self) -> Rows:
        return DenseRows(self.values.square(), self.shapes)

    def parameter_norms(self) -> dict[str, Tensor]:
        return {name: part.square().sum(-1) for name, part in split(self.values, self.shapes).items()}

    def times(self, vectors: Tensor) -> Tensor:
        return self.values @ vectors

    def transposed_times(self, weights: Tensor) -> Tensor:
        return self.values.flatten(0, 1).T @ weights.flatten(0, 1)

    def add_sums(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        parts = split(self.values.flatten(0, 1), self.shapes)
        for name, weight in weights.items():
            into[name].addmm_(weight.flatten(0, 1).T, parts[name])


@dataclass(frozen=True)
class LayerFactors:
    """The rows of one linear layer: row (i, r) of its weight is ``delta[i, r] entering[i]^T``.

    Args:
        weight, bias: names of the layer's parameters among the trainable ones, or None.
        entering: ``[n, in]``, what enters the layer.
        delta: ``[n, R, out]``, derivatives in what leaves it.
    """

    weight: str | None
    bias: str | None
    entering: Tensor
    delta: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """Of its trainable parameters, the weight first."""
        return tuple(name for name in (self.weight, self.bias) if name)

    @property
    def entering_all(self) -> Tensor:
        """``[n, in + 1]``, what the trainable weight and then the bias are multiplied with."""
        parts = [self.entering] if self.weight else []
        parts += [torch.ones_like(self.entering[:, :1])] if self.bias else []
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class FactoredRows(Rows):
    """Rows of a network of linear layers, as factors: memory n·(in + R·out) per layer instead of n·R·P.

    <row, row'> = sum over layers of (a·a' + 1) (delta·delta'), the 1 standing for the bias.
    """

    layers: tuple[LayerFactors, ...]
    shapes: Shapes

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.layers[0].delta.shape[0]

    @property
    def r(self) -> int:  # type: ignore[override]
        return self.layers[0].delta.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].delta.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].delta.device

    def blocks(self) -> Iterator[Rows]:
        yield self

    def parts(self, size: int = INSTANCES) -> Iterator[FactoredRows]:
        """Yield consecutive instances, so that what is made of them is small."""
        for start in range(0, self.n, size):
            yield self.part(start, start + size)

    def part(self, start: int, stop: int) -> FactoredRows:
        layers = tuple(
            LayerFactors(f.weight, f.bias, f.entering[start:stop], f.delta[start:stop]) for f in self.layers
        )
        return FactoredRows(layers, self.shapes)

    def kernel(self) -> Tensor:
        size = self.n * self.r
        found = torch.empty(size, size, dtype=self.dtype, device=self.device)
        for start in range(0, self.n, STRIP):
            stop = min(start + STRIP, self.n)
            strip = self.part(start, stop).gram(self.part(0, stop)).view((stop - start) * self.r, -1)
            found[start * self.r : stop * self.r, : stop * self.r] = strip
            found[: start * self.r, start * self.r : stop * self.r] = strip[:, : start * self.r].T
        return found

    def dense(self) -> Tensor:
        parts: dict[str, Tensor] = {}
        for layer in self.layers:
            if layer.weight:
                parts[layer.weight] = (layer.delta[..., None] * layer.entering[:, None, None, :]).flatten(2)
            if layer.bias:
                parts[layer.bias] = layer.delta
        return torch.cat([parts[name] for name in self.shapes], -1)

    def to(self, dtype: torch.dtype) -> Rows:
        layers = tuple(
            LayerFactors(f.weight, f.bias, f.entering.to(dtype), f.delta.to(dtype)) for f in self.layers
        )
        return FactoredRows(layers, self.shapes)

    def squares(self) -> Rows:
        layers = tuple(
            LayerFactors(f.weight, f.bias, f.entering.square(), f.delta.square()) for f in self.layers
        )
        return FactoredRows(layers, self.shapes)

    def parameter_norms(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            squares = layer.delta.square().sum(-1)
            if layer.weight:
                found[layer.weight] = squares * layer.entering.square().sum(-1)[:, None]
            if layer.bias:
                found[layer.bias] = squares
        return {name: found[name] for name in self.shapes}

    def times(self, vectors: Tensor) -> Tensor:
        parts = split(vectors.T, self.shapes)
        total = torch.zeros(self.n, self.r, vectors.shape[1], dtype=self.dtype, device=self.device)
        for layer in self.layers:
            if layer.bias:
                total += layer.delta @ parts[layer.bias].T
            if not layer.weight:
                continue
            out, width = layer.delta.shape[2], layer.entering.shape[1]
            narrow = self._narrow(layer)
            for some, pieces in self._pieces(self.r * width if narrow else out, vectors.shape[1]):
                matrix = parts[layer.weight][some].reshape(-1, out, width)
                k = len(matrix)
                if narrow:
                    matrix = matrix.transpose(0, 1).reshape(out, k * width)
                else:
                    matrix = matrix.reshape(k * out, width).T
                for at in pieces:
                    delta, entering = layer.delta[at], layer.entering[at]
                    n = len(entering)
                    if narrow:
                        back = (delta.reshape(-1, out) @ matrix).view(n, self.r * k, width)
                        product = (back @ entering[:, :, None]).view(n, self.r, k)
                    else:
                        product = delta @ (entering @ matrix).view(n, k, out).transpose(1, 2)
                    total[at, :, some] += product
        return total

    def transposed_times(self, weights: Tensor) -> Tensor:
        found = torch.empty(weights.shape[2], self.p, dtype=self.dtype, device=self.device)
        parts = split(found, self.shapes)
        for layer in self.layers:
            if layer.bias:
                parts[layer.bias][:] = _bias_sums(layer, weights)
            if layer.weight:
                for some, summed in self._weight_sums(layer, weights):
                    parts[layer.weight][some] = summed
        return found.T

    def add_sums(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for layer in self.layers:
            if layer.bias and layer.bias in weights:
                into[layer.bias].add_(_bias_sums(layer, weights[layer.bias]))
            if layer.weight and layer.weight in weights:
                for some, summed in self._weight_sums(layer, weights[layer.weight]):
                    into[layer.weight][some] += summed

    def _weight_sums(self, layer: LayerFactors, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield weighted sums of a layer's rows: which of K weights ``[n, R, K]``, and ``[k, out in]``."""
        out, width, columns = layer.delta.shape[2], layer.entering.shape[1], weights.shape[2]
        narrow = self._narrow(layer)
        for some, pieces in self._pieces(self.r * width if narrow else out, columns):
            k = len(range(*some.indices(columns)))
            shape = (out, k * width) if narrow else (k * out, width)
            summed = torch.zeros(shape, dtype=self.dtype, device=self.device)
            for at in pieces:
                delta, entering, weight = layer.delta[at], layer.entering[at], weights[at, :, some]
                if narrow:
                    spread = (weight[..., None] * entering[:, None, None, :]).reshape(-1, k * width)
                    summed.addmm_(delta.reshape(-1, out).T, spread)
                else:
                    summed.addmm_((weight.transpose(1, 2) @ delta).reshape(-1, k * out).T, entering)
            if narrow:
                summed = summed.view(out, k, width).transpose(0, 1)
            yield some, summed.reshape(k, -1)

    def _narrow(self, layer: LayerFactors) -> bool:
        """Whether products of vectors with the layer's deltas are smaller than those with what enters it."""
        return self.r * layer.entering.shape[1] < layer.delta.shape[2]

    def _pieces(self, numbers: int, k: int) -> list[tuple[slice, list[slice]]]:
        """Return slices of k vectors, each with slices of instances.

        Args:
            numbers: that are made for each vector and instance.
        """
        piece = PIECE if self.device.type == "cpu" else 256 * PIECE
        # pieces of both, lest one operand is read again and again for a few rows of the other
        vectors = max(1, min(k, int(piece**0.5) * 4 // numbers))
        instances = max(1, piece // (numbers * vectors))
        return [
            (
                slice(first, min(first + vectors, k)),
                [slice(start, start + instances) for start in range(0, self.n, instances)],
            )
            for first in range(0, k, vectors)
        ]


@dataclass(frozen=True)
class StreamedRows(Rows):
    """Rows made block by block, every time they are used.

    Args:
        make_blocks: returns an iterator over the blocks.
        n, r: their totals.
        converted: dtype that the blocks are converted to.
    """

    make_blocks: Callable[[], Iterator[Rows]]
    n: int
    r: int
    shapes: Shapes
    converted: torch.dtype
    on: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.converted

    @property
    def device(self) -> torch.device:
        return self.on

    def blocks(self) -> Iterator[Rows]:
        for block in self.make_blocks():
            yield block if block.dtype == self.converted else block.to(self.converted)

    def dense(self) -> Tensor:
        found = torch.empty(self.n, self.r, self.p, dtype=self.converted, device=self.on)
        start = 0
        for block in self.blocks():
            if block.n == self.n:
                return block.dense()
            found[start : start + block.n] = block.dense()
            start += block.n
        return found

    def to(self, dtype: torch.dtype) -> Rows:
        return StreamedRows(self.make_blocks, self.n, self.r, self.shapes, dtype, self.on)

    def squares(self) -> Rows:
        return StreamedRows(
            lambda: (block.squares() for block in self.blocks()),
            self.n, self.r, self.shapes, self.converted, self.on,
        )  # fmt: skip


def _bias_sums(layer: LayerFactors, weights: Tensor) -> Tensor:
    """Return sums ``[K, out]`` of a bias's rows with weights ``[n, R, K]``."""
    return weights.flatten(0, 1).T @ layer.delta.flatten(0, 1)


def split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Return the parts ``[..., numel]`` of flat vectors ``[..., P]`` by the parameters' names."""
    return dict(zip(shapes, flat.split([s.numel() for s in shapes.values()], -1), strict=True))


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the tensors of a mapping."""
    return torch.stack(list(parts.values())).sum(0)


def _by_blocks(left: Rows, right: Rows, product: Callable[[Rows, Rows], Tensor], axis: int) -> Tensor:
    """Assemble a product of all pairs of blocks; ``axis`` is that of the left instances."""
    strips = [torch.cat([product(a, b) for b in right.blocks()], axis + 2) for a in left.blocks()]
    return strips[0] if len(strips) == 1 else torch.cat(strips, axis)


def _weighted_gram(left: Rows, right: Rows, weight: Tensor) -> Tensor:
    # a diagonal weight breaks the product form of one side; the other keeps it
    vectors = (left.dense() * weight).flatten(0, 1).T
    return right.times(vectors).permute(2, 0, 1).reshape(left.n, left.r, right.n, right.r)


def _block_gram(left: Rows, right: Rows) -> Tensor:
    if isinstance(left, FactoredRows) and isinstance(right, FactoredRows):
        total: Tensor | None = None
        for a, b in zip(left.layers, right.layers, strict=True):
            part = _layer_gram(a, b, bool(a.weight), bool(a.bias))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total
    if (found := _grams_by_layers(left, right)) is not None:
        return sum_of(found)
    products: Tensor = torch.tensordot(left.dense(), right.dense(), dims=([2], [2]))
    return products


def _own_gram(block: Rows) -> Tensor:
    if not isinstance(block, FactoredRows):
        rows = block.dense()
        return rows @ rows.mT
    total: Tensor | None = None
    for layer in block.layers:
        entering = torch.full_like(layer.entering[:, 0], 1.0 if layer.bias else 0.0)
        if layer.weight:
            entering += layer.entering.square().sum(1)
        part = (layer.delta @ layer.delta.mT).mul_(entering[:, None, None])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _block_grams(left: Rows, right: Rows) -> dict[str, Tensor]:
    if isinstance(left, FactoredRows) and isinstance(right, FactoredRows):
        found: dict[str, Tensor] = {}
        for a, b in zip(left.layers, right.layers, strict=True):
            if a.weight:
                found[a.weight] = _layer_gram(a, b, True, False)
            if a.bias:
                found[a.bias] = _layer_gram(a, b, False, True)
        return {name: found[name] for name in left.shapes}
    if (by_layers := _grams_by_layers(left, right)) is not None:
        return by_layers
    ours, theirs = split(left.dense(), left.shapes), split(right.dense(), left.shapes)
    return {name: torch.tensordot(ours[name], theirs[name], dims=([2], [2])) for name in left.shapes}


def _grams_by_layers(left: Rows, right: Rows) -> dict[str, Tensor] | None:
    found = left.grams_with(right)
    if found is not None:
        return found
    turned = right.grams_with(left)
    return None if turned is None else {name: part.permute(2, 3, 0, 1) for name, part in turned.items()}


def _layer_gram(a: LayerFactors, b: LayerFactors, weight: bool, bias: bool) -> Tensor:
    """Return ``[n, R, m, S]``: the delta products, times what enters (and 1 for the bias)."""
    deltas: Tensor = torch.tensordot(a.delta, b.delta, dims=([2], [2]))
    if not weight:
        return deltas
    entering = a.entering @ b.entering.T
    if bias:
        entering += 1
    return deltas.mul_(entering[:, None, :, None])
