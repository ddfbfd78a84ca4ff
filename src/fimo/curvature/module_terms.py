"""Matrices of one parameter's derivatives, one for each instance, as sums over positions that are not formed.

A layer that is applied to each of T positions (tokens, patches of an image) has the derivative
sum_t x_t y_t^T in its weights, where one of x and y is what enters it and the other the derivative in what
leaves it. All that is asked of it is formed in slices of its rows, which stay in a processor's cache, or by
inner products between positions where these are fewer than the entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE = 2**20
"""Numbers of a slice of matrices that are formed at once."""

SMALL_TABLE = 16
"""Rows for each position up to which a table's derivatives are formed: reading it row by row takes longer."""


@dataclass(frozen=True)
class Term(ABC):
    """A matrix ``[rows, columns]`` for each of n instances."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """n, rows and columns."""

    @abstractmethod
    def form(self, rows: slice) -> Tensor:
        """Return some rows of the matrices, ``[n, rows, columns]``."""

    @abstractmethod
    def rotated(self, left: Tensor | None, right: Tensor | None) -> Term:
        """Return ``left^T M right``; None stands for the identity."""

    def times(self, vectors: Tensor) -> Tensor:
        """Return inner products ``[n, K]`` with matrices ``[K, rows * columns]``."""
        n, _, columns = self.shape
        total = vectors.new_zeros(n, len(vectors))
        for at in slices([self]):
            entries = vectors[:, at.start * columns : at.stop * columns]
            total.addmm_(self.form(at).flatten(1), entries.T)
        return total

    def add_sums(self, weights: Tensor, total: Tensor) -> None:
        """Add sums of the matrices with weights ``[n, K]`` to ``total`` ``[K, rows * columns]``."""
        columns = self.shape[2]
        for at in slices([self]):
            total[:, at.start * columns : at.stop * columns].addmm_(weights.T, self.form(at).flatten(1))


@dataclass(frozen=True)
class Outer(Term):
    """``sum_t left_t right_t^T``.

    Args:
        left: ``[n, T, rows]``.
        right: ``[n, T, columns]``.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.left), self.left.shape[2], self.right.shape[2]

    def form(self, rows: slice) -> Tensor:
        return self.left[:, :, rows].mT @ self.right

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Term:
        _, rows, columns = self.shape
        t, size = self.left.shape[1], rows * columns
        above, beside = (0 if m is None else m.shape[1] for m in (left, right))
        apart = t * (rows * above + columns * beside + (above or rows) * (beside or columns))
        if apart > t * size + size * (above + (above or rows) * beside // rows):  # many positions
            return Plain(self.form(slice(None))).rotated(left, right)
        return Outer(
            self.left if left is None else self.left @ left,
            self.right if right is None else self.right @ right,
        )

    def add_sums(self, weights: Tensor, total: Tensor) -> None:
        if weights.shape[1] > 1:
            super().add_sums(weights, total)
            return
        left = self.left * weights[:, :, None]
        total.view(self.shape[1:]).addmm_(left.flatten(0, 1).T, self.right.flatten(0, 1))


@dataclass(frozen=True)
class Lookup(Term):
    """An outer product whose left vectors are unit vectors: rows of a table that were looked up.

    Args:
        index: ``[n, T]``, the rows.
        right: ``[n, T, columns]``.
        rows: of the table.
    """

    index: Tensor
    right: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.index), self.rows, self.right.shape[2]

    def form(self, rows: slice) -> Tensor:
        n, _, columns = self.shape
        start, stop, _ = rows.indices(self.rows)
        found = self.right.new_zeros(n * (stop - start), columns)
        instance, position = ((self.index >= start) & (self.index < stop)).nonzero(as_tuple=True)
        at = instance * (stop - start) + self.index[instance, position] - start
        return found.index_add_(0, at, self.right[instance, position]).view(n, -1, columns)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Term:
        turned = self.right if right is None else self.right @ right
        return Lookup(self.index, turned, self.rows) if left is None else Outer(left[self.index], turned)

    def times(self, vectors: Tensor) -> Tensor:
        n, rows, columns = self.shape
        if rows <= SMALL_TABLE * self.index.shape[1]:
            return super().times(vectors)
        table = vectors.view(len(vectors), -1, columns)
        total = vectors.new_empty(n, len(vectors))
        for i in range(n):
            total[i] = table[:, self.index[i]].flatten(1) @ self.right[i].flatten()
        return total

    def distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the instances and rows ``[U]`` that are looked up, and the sums there ``[U, columns]``."""
        n, rows, columns = self.shape
        key = (torch.arange(n, device=self.index.device)[:, None] * rows + self.index).flatten()
        unique, at = key.unique(return_inverse=True)
        sums = self.right.new_zeros(len(unique), columns).index_add_(0, at, self.right.flatten(0, 1))
        return unique // rows, unique % rows, sums

    def add_sums(self, weights: Tensor, total: Tensor) -> None:
        for weight, into in zip(weights.T, total, strict=True):
            weighted = (self.right * weight[:, None, None]).flatten(0, 1)
            into.view(self.rows, -1).index_add_(0, self.index.flatten(), weighted)


@dataclass(frozen=True)
class Plain(Term):
    """Matrices that are formed.

    Args:
        matrices: ``[n, rows, columns]``.
    """

    matrices: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        n, rows, columns = self.matrices.shape
        return n, rows, columns

    def form(self, rows: slice) -> Tensor:
        return self.matrices[:, rows]

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Term:
        found = self.matrices if left is None else left.T @ self.matrices
        return Plain(found if right is None else found @ right)

    def times(self, vectors: Tensor) -> Tensor:
        return self.matrices.flatten(1) @ vectors.T

    def add_sums(self, weights: Tensor, total: Tensor) -> None:
        total.addmm_(weights.T, self.matrices.flatten(1))


def slices(terms: Sequence[Term]) -> Iterator[slice]:
    """Yield slices of the rows of terms that are added up."""
    n, rows, columns = terms[0].shape
    step = max(1, SLICE // max(1, n * columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def formed(terms: Sequence[Term], rows: slice = slice(None)) -> Tensor:
    """Return some rows of the sum of terms, ``[n, rows, columns]``."""
    total = terms[0].form(rows)
    for term in terms[1:]:
        total = total + term.form(rows)
    return total


def inner(left: Sequence[Term], right: Sequence[Term]) -> Tensor:
    """Return inner products ``[n, m]`` of two sums of terms."""
    n, rows, columns = left[0].shape
    m = right[0].shape[0]
    pairs = [(a, b) for a in left for b in right]
    positions = sum(_positions(a) * _positions(b) for a, b in pairs)
    if (
        not any(isinstance(t, Plain) for t in (*left, *right))
        and positions * (rows + columns) < rows * columns
    ):
        found = [_by_positions(a, b) for a, b in pairs]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)
    total = _columns_of(left[0]).new_zeros(n, m)
    for at in slices(left if n > m else right):
        total.addmm_(formed(left, at).flatten(1), formed(right, at).flatten(1).T)
    return total


def squared_norms(terms: Sequence[Term]) -> Tensor:
    """Return the squared norms ``[n]`` of a sum of terms."""
    first = terms[0]
    n, rows, columns = first.shape
    total = _columns_of(first).new_zeros(n)
    if len(terms) == 1 and isinstance(first, Lookup):
        instance, _, sums = first.distinct()
        return total.index_add_(0, instance, sums.square().sum(1))
    if (
        len(terms) == 1
        and isinstance(first, Outer)
        and first.left.shape[1] * (rows + columns) < rows * columns
    ):
        return (first.right @ first.right.mT).mul_(first.left @ first.left.mT).sum((1, 2))
    for at in slices(terms):
        total += formed(terms, at).flatten(1).square().sum(1)
    return total


def second_moments(terms: Sequence[Term], left: Tensor | None, right: Tensor | None, total: Tensor) -> None:
    """Add the squares of ``left^T M right``, summed over instances, to ``total`` ``[rows, columns]``."""
    turned = [term.rotated(left, right) for term in terms]
    first = turned[0]
    if len(turned) == 1 and isinstance(first, Outer) and first.left.shape[1] == 1:
        total.addmm_(first.left[:, 0].square().T, first.right[:, 0].square())
        return
    if len(turned) == 1 and isinstance(first, Lookup):
        _, looked_up, sums = first.distinct()
        total.index_add_(0, looked_up, sums.square_())
        return
    for at in slices(turned):
        total[at] += formed(turned, at).square().sum(0)


def _by_positions(a: Term, b: Term) -> Tensor:
    """Return inner products ``[n, m]`` of two outer products, by those between their positions."""
    if isinstance(a, Lookup) and isinstance(b, Outer):
        return _by_positions(b, a).T
    products: Tensor = torch.tensordot(_columns_of(a), _columns_of(b), dims=([2], [2]))  # [n, T, m, T']
    if isinstance(a, Lookup):
        assert isinstance(b, Lookup)
        products = products * (a.index[:, :, None, None] == b.index)
    else:
        assert isinstance(a, Outer)
        if isinstance(b, Lookup):
            products *= a.left[:, :, b.index]
        else:
            assert isinstance(b, Outer)
            products *= torch.tensordot(a.left, b.left, dims=([2], [2]))
    return products.sum((1, 3))


def _positions(term: Term) -> int:
    return 1 if isinstance(term, Plain) else _columns_of(term).shape[1]


def _columns_of(term: Term) -> Tensor:
    if isinstance(term, Plain):
        return term.matrices
    assert isinstance(term, Outer | Lookup)
    return term.right
