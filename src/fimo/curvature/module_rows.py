"""Rows of any network whose parameters belong to layers of known form, by what enters and leaves these.

A linear layer's derivatives are products of what entered it and the derivatives in what left it, summed over
positions; a convolution is a linear layer on patches, an embedding one on unit vectors; those of a
normalisation's scale and shift are formed. A module that is called twice, or whose parameters another one
shares, has two calls, whose derivatives add up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.curvature import module_terms
from fimo.curvature.jacobian import DenseRows, Rows, Shapes, StreamedRows, split
from fimo.curvature.module_terms import Lookup, Outer, Plain, Term, formed

HELD = 2**23
"""Numbers of one parameter's derivatives that are formed and held; more leave a processor's cache, and are
formed anew for each use in slices that don't."""

SQUARED_MB = 24
"""Of rows that are formed to square their entries."""


@dataclass(frozen=True)
class Call(ABC):
    """One call of a module.

    Args:
        names: of its trainable parameters.
        owner: number of the module among the network's; -1 for none.
    """

    names: tuple[str, ...]
    owner: int

    @property
    @abstractmethod
    def rows(self) -> tuple[int, int]:
        """Numbers of instances and of rows for each."""

    @abstractmethod
    def terms(self, names: tuple[str, ...], biased: bool) -> list[Term]:
        """Return each row's matrix of some of its parameters.

        Args:
            names: one of the module's parameters, or all of them side by side.
            biased: a weight and a bias are one matrix, the bias beside that axis of the weight that leaves.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it holds, with an axis of instances first."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def part(self, at: slice | Tensor) -> Call:
        """Return the same of some instances."""
        some: dict[str, Any] = {name: t[at] for name, t in self.tensors().items()}
        return replace(self, **some)

    def to(self, dtype: torch.dtype) -> Call:
        """Return the same in another dtype."""
        found: dict[str, Any] = {n: t.to(dtype) for n, t in self.tensors().items() if t.is_floating_point()}
        return replace(self, **found)


@dataclass(frozen=True)
class LinearCall(Call):
    """A linear layer on each of T positions.

    Args:
        weight, bias: names of its parameters among the trainable ones.
        entering: ``[n, T, in]``.
        delta: ``[n, R, T, out]``.
        transposed: the weight is ``[in, out]``, as GPT-2 has it.
    """

    weight: str | None
    bias: str | None
    entering: Tensor
    delta: Tensor
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    @property
    def larger(self) -> bool:
        """Whether it holds more numbers than the derivatives in its weight that they make up."""
        _, r, t, out = self.delta.shape
        width = self.positions_width
        return t * (width + r * out) > r * out * width

    @property
    def positions_width(self) -> int:
        return self.entering.shape[2]

    def positions(self) -> Tensor:
        """Return what enters each position, ``[n, T, in]``."""
        return self.entering

    def terms(self, names: tuple[str, ...], biased: bool) -> list[Term]:
        if self.weight not in names:
            return [Plain(d.sum(1)[:, :, None]) for d in self.delta.unbind(1)]
        entering = self.positions()
        if self.bias in names:
            entering = torch.cat([entering, torch.ones_like(entering[..., :1])], 2)
        elif biased:
            entering = F.pad(entering, (0, 1))
        if self.transposed:
            return [Outer(entering, d) for d in self.delta.unbind(1)]
        return [Outer(d, entering) for d in self.delta.unbind(1)]


@dataclass(frozen=True)
class ConvolutionCall(LinearCall):
    """A convolution: a linear layer on patches.

    Args:
        entering: ``[n, channels, *sizes]``, padded.
        delta: ``[n, R, T, out]``, of positions in turn.
        kernel, dilation, stride: as of the convolution.
        groups: of channels that are mapped apart.
    """

    kernel: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1

    @property
    def positions_width(self) -> int:
        return self.entering.shape[1] // self.groups * math.prod(self.kernel)

    def positions(self) -> Tensor:
        axes = len(self.kernel)
        places, offsets = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        patches = self._windows.permute(0, 1, *offsets, *places)
        return patches.flatten(1, 1 + axes).flatten(2).mT

    def entries(self) -> Tensor:
        """Return the patches of all instances, ``[in, n T]``."""
        axes = len(self.kernel)
        places, offsets = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        return self._windows.permute(1, *offsets, 0, *places).flatten(0, axes).flatten(1)

    @property
    def _windows(self) -> Tensor:
        return windows(self.entering, self.kernel, self.dilation, self.stride)

    def terms(self, names: tuple[str, ...], biased: bool) -> list[Term]:
        if self.groups == 1 or self.weight not in names:
            return super().terms(names, biased)
        entering = self.positions().unflatten(2, (self.groups, -1)).transpose(1, 2)  # [n, G, T, in]
        found: list[Term] = []
        for delta in self.delta.unbind(1):
            matrices = delta.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1) @ entering
            columns = [matrices.flatten(1, 2)]
            if self.bias in names:
                columns.append(delta.sum(1)[:, :, None])
            found.append(Plain(torch.cat(columns, 2)))
        return found


def windows(x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return a view ``[n, channels, *positions, *kernel]`` of padded images ``[n, channels, *sizes]``.

    Copies of it take a third of the time of ``F.unfold``.
    """
    for axis, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x


@dataclass(frozen=True)
class EmbeddingCall(Call):
    """Rows of a table that are looked up.

    Args:
        index: ``[n, T]``.
        delta: ``[n, R, T, width]``.
        size: of the table.
    """

    index: Tensor
    delta: Tensor
    size: int

    @property
    def rows(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    def terms(self, names: tuple[str, ...], biased: bool) -> list[Term]:
        return [Lookup(self.index, d, self.size) for d in self.delta.unbind(1)]


@dataclass(frozen=True)
class FormedCall(Call):
    """Derivatives of one parameter that are formed.

    Args:
        values: ``[n, R, numel]``.
        length: of the parameter's first axis.
    """

    values: Tensor
    length: int

    @property
    def rows(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def terms(self, names: tuple[str, ...], biased: bool) -> list[Term]:
        return [Plain(v.unflatten(1, (self.length, -1))) for v in self.values.unbind(1)]


@dataclass(frozen=True)
class ModuleRows(Rows):
    """Rows of a network's calls of its modules.

    Args:
        calls: of all modules with trainable parameters.
        shapes: of all trainable parameters; one without a call has derivatives of zero.
        mask: ``[n, T]``, true for positions that count; None where there is no padding.
    """

    calls: tuple[Call, ...]
    shapes: Shapes
    mask: Tensor | None = None

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.calls[0].rows[0]

    @property
    def r(self) -> int:  # type: ignore[override]
        return self.calls[0].rows[1]

    @property
    def _any(self) -> Tensor:
        return next(t for t in self.calls[0].tensors().values() if t.is_floating_point())

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def bytes(self) -> int:
        """What they hold; a tensor that several modules share counts once."""
        held = {t.data_ptr(): t.numel() * t.element_size() for c in self.calls for t in c.tensors().values()}
        return sum(held.values())

    def blocks(self) -> Iterator[Rows]:
        yield self

    def part(self, start: int, stop: int) -> Rows:
        return self.some(slice(start, stop))

    def some(self, at: slice | Tensor) -> ModuleRows:
        """Return the rows of some instances."""
        mask = None if self.mask is None else self.mask[at]
        return ModuleRows(tuple(c.part(at) for c in self.calls), self.shapes, mask)

    def to(self, dtype: torch.dtype) -> Rows:
        return replace(self, calls=tuple(c.to(dtype) for c in self.calls))

    def terms(self, names: tuple[str, ...], biased: bool = False) -> list[list[Term]]:
        """Return the terms of each of R rows' matrices of some parameters; none where they have no call."""
        found = [c.terms(names, biased) for c in self.calls if set(names) & set(c.names)]
        return [list(terms) for terms in zip(*found, strict=True)]

    def dense(self) -> Tensor:
        total = torch.zeros(self.n, self.r, self.p, dtype=self.dtype, device=self.device)
        for name, part in split(total, self.shapes).items():
            for r, terms in enumerate(self.terms((name,))):
                part[:, r] = formed(terms).flatten(1)
        return total

    def squares(self) -> Rows:
        def blocks() -> Iterator[Rows]:
            for piece in self.pieces(SQUARED_MB):
                yield DenseRows(piece.dense().square_(), self.shapes)

        return StreamedRows(blocks, self.n, self.r, self.shapes, self.dtype, self.device)

    def parameter_norms(self) -> dict[str, Tensor]:
        found = {}
        for name in self.shapes:
            norms = [module_terms.squared_norms(terms) for terms in self.terms((name,))]
            found[name] = torch.stack(norms, 1) if norms else self._any.new_zeros(self.n, self.r)
        return found

    def times(self, vectors: Tensor) -> Tensor:
        return torch.stack(list(self.times_by_name(vectors).values())).sum(0)

    def times_by_name(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the products ``[n, R, K]`` with each parameter's entries of vectors ``[P, K]``."""
        found = {}
        for name, part in split(vectors.T, self.shapes).items():
            total = vectors.new_zeros(self.n, self.r, vectors.shape[1])
            for r, terms in enumerate(self.terms((name,))):
                for term in terms:
                    total[:, r] += term.times(part)
            found[name] = total
        return found

    def held(self, name: str) -> list[Term]:
        """Return the terms of one parameter's derivatives in the only row.

        They are formed where that is little memory, so that several uses share it; not those of a table.
        """
        if not (found := self.terms((name,))):
            return []
        (terms,) = found
        apart = len(terms) == 1 and isinstance(terms[0], Lookup | Plain)
        if apart or self.n * self.shapes[name].numel() > HELD:
            return terms
        return [Plain(formed(terms))]

    def transposed_times(self, weights: Tensor) -> Tensor:
        total = weights.new_zeros(weights.shape[2], self.p)
        self.add_sums(dict.fromkeys(self.shapes, weights), split(total, self.shapes))
        return total.T

    def add_sums(self, weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            for r, terms in enumerate(self.terms((name,))):
                for term in terms:
                    term.add_sums(weight[:, r], into[name])

    def grams_with(self, other: Rows) -> dict[str, Tensor] | None:
        if isinstance(other, DenseRows):
            products = self.times_by_name(other.dense().flatten(0, 1).T)
            return {name: part.unflatten(2, (other.n, other.r)) for name, part in products.items()}
        if not isinstance(other, ModuleRows):
            return None
        found = {}
        for name in self.shapes:
            ours, theirs = self.terms((name,)), other.terms((name,))
            total = self._any.new_zeros(self.n, self.r, other.n, other.r)
            for r, left in enumerate(ours):
                for s, right in enumerate(theirs):
                    total[:, r, :, s] = module_terms.inner(left, right)
            found[name] = total
        return found

    def formed(self) -> ModuleRows:
        """Return the same with matrices formed where these are smaller than what enters and leaves."""
        calls: list[Call] = []
        for call in self.calls:
            if isinstance(call, LinearCall) and call.weight and call.larger:
                for name in call.names:
                    matrices = [formed([term]).flatten(1) for term in call.terms((name,), False)]
                    calls.append(
                        FormedCall((name,), call.owner, torch.stack(matrices, 1), self.shapes[name][0])
                    )
            else:
                calls.append(call)
        return replace(self, calls=tuple(calls))

    def own_gram(self) -> Tensor:
        total = self._any.new_zeros(self.n, self.r, self.r)
        for name in self.shapes:
            terms = self.terms((name,))
            for at in module_terms.slices(terms[0]) if terms else ():
                rows = torch.stack([formed(t, at).flatten(1) for t in terms], 1)
                total += rows @ rows.mT
        return total


def normalised(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what a normalisation scales and shifts, or None for another module."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and not module.training:
        mean, var = module.running_mean, module.running_var
        return None if mean is None else F.batch_norm(x, mean, var, None, None, False, 0.0, module.eps)
    return None


def norm_calls(
    module: nn.Module, names: Sequence[tuple[str, str]], owner: int, x: Tensor, delta: Tensor
) -> list[Call]:
    """Return the calls of a normalisation's scale and shift.

    Args:
        names: (attribute, parameter) of those that are trained.
        x: what enters, ``[n, ...]``.
        delta: ``[n, R, ...]``.
    """
    scaled = normalised(module, x)
    assert scaled is not None
    found: list[Call] = []
    for attribute, name in names:
        values = delta * scaled[:, None] if attribute == "weight" else delta
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape = module.normalized_shape
            values = values.reshape(*values.shape[:2], -1, *shape).sum(2)
            length = shape[0]
        else:  # channels come first
            values = values.reshape(*values.shape[:3], -1).sum(3)
            length = values.shape[2]
        found.append(FormedCall((name,), owner, values.flatten(2), length))
    return found
