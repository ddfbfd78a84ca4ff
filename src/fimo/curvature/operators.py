"""Curvature matrices of the mean training loss as linear operators: products with vectors, never the matrix.

Solvers see only :class:`Operator`, so they don't know which matrix they solve with. Where the Gauss-Newton
rows fit into memory, :class:`RowsOperator` multiplies by them (two products); where the outputs are many
(language models), :class:`GaussNewton` goes forward and backward through the network instead.

curvlinops has the same operators at the same speed where both go through the network (figures in
``benchmarks/methods.py``); ours are used because products by rows take a half to a twentieth of that time,
and because they take any per-instance loss, dictionaries of inputs and a choice of parameters.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from fimo.curvature.jacobian import Rows, Shapes
from fimo.data.instances import Instances
from fimo.models.attention import plain_attention
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.forward_mode import jvp

log = logging.getLogger(__name__)

Parameters = dict[str, Tensor]

MAX_PROJECTED = 512
"""Outputs up to which a loss of the user's own is looked at for negative curvature in them."""

SIGNS = 32
"""Random vectors of a trace's estimate."""


class Operator(ABC):
    """A symmetric P x P matrix in the order of ``FinalModel.parameters()``.

    Attributes:
        shapes: of the parameters, in that order.
    """

    shapes: Shapes
    dtype: torch.dtype
    device: torch.device

    @property
    def p(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @abstractmethod
    def times(self, vectors: Tensor) -> Tensor:
        """Return the products ``[P, K]`` with vectors ``[P, K]``."""

    def dense(self) -> Tensor:
        """Return the matrix ``[P, P]``, by products with unit vectors."""
        return self.times(torch.eye(self.p, dtype=self.dtype, device=self.device))

    def trace(self) -> float:
        """Return the trace, estimated from 32 random signs (Hutchinson) where no closed form is known."""
        generator = torch.Generator(self.device).manual_seed(0)
        signs = torch.randint(0, 2, (self.p, SIGNS), generator=generator, device=self.device)
        signs = (2 * signs - 1).to(self.dtype)
        found = (signs * self.times(signs)).sum(0).double()
        trace, error = found.mean().item(), found.std().item() / SIGNS**0.5
        log.info(
            "trace of the curvature: %.4g, with a standard error of %.1g from random vectors", trace, error
        )
        return trace


class RowsOperator(Operator):
    """``A^T A / N``: Gauss-Newton, empirical or sampled Fisher, by the kind of its rows A.

    Args:
        rows: n·R vectors of length P.
        n: N, what the sum is divided by; the rows' own number of instances when None.
    """

    def __init__(self, rows: Rows, n: int | None = None) -> None:
        self.rows, self.n = rows, n or rows.n
        self.shapes, self.dtype, self.device = rows.shapes, rows.dtype, rows.device

    def times(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for block in self.rows.blocks():
            total += block.transposed_times(block.times(vectors))
        return total / self.n

    def trace(self) -> float:
        return self.rows.squared_norms().sum().item() / self.n


class AutogradOperator(Operator):
    """What the matrix-free operators share: batches of instances, and blocks of vectors.

    Args:
        final_model: at whose parameters.
        instances: over which the loss is averaged.
        batch_size: instances per pass; the sum over batches is exact, so it changes no result.
        vectors_at_once: vectors per pass.
        count: called with the number of products of one instance and one vector, as they are made.
    """

    def __init__(
        self,
        final_model: FinalModel,
        instances: Instances,
        batch_size: int = 256,
        vectors_at_once: int = 32,
        count: Callable[[int], None] | None = None,
    ) -> None:
        self.count = count
        self.final_model, self.instances = final_model, instances
        self.batch_size, self.vectors_at_once = batch_size, vectors_at_once
        self.parameters, self.buffers = final_model.parameters(), final_model.buffers()
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device

    def times(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        if self.count is not None:
            self.count(len(self.instances) * vectors.shape[1])
        with plain_attention():  # the fused kernels have no second derivative
            for batch in self.instances.batches(self.batch_size):
                product = self._product(batch)
                for start in range(0, vectors.shape[1], self.vectors_at_once):
                    part = slice(start, start + self.vectors_at_once)
                    total[:, part] += vmap(product)(vectors[:, part].T).T
        return total / len(self.instances)

    @abstractmethod
    def _product(self, batch: Instances) -> Callable[[Tensor], Tensor]:
        """Return the function from a vector ``[P]`` to its product with the batch's summed matrix ``[P]``."""

    def _outputs(self, parameters: Parameters, batch: Instances) -> Tensor:
        return functional_apply(self.final_model.network, {**self.buffers, **parameters}, batch.inputs)

    def _unflatten(self, vector: Tensor) -> Parameters:
        parts = vector.split([s.numel() for s in self.shapes.values()])
        return {name: v.view(s) for (name, s), v in zip(self.shapes.items(), parts, strict=True)}

    def _flatten(self, parameters: Parameters) -> Tensor:
        return torch.cat([parameters[name].flatten() for name in self.shapes])


class GaussNewton(AutogradOperator):
    """``(1/N) sum_i J_i^T H_i J_i`` with H_i the loss's Hessian in the outputs (Schraudolph, 2002).

    Of a loss that is not convex in its outputs, the part of positive curvature of each H_i, as by rows; that
    is looked for up to ``MAX_PROJECTED`` outputs, beyond which a loss is taken as convex.
    """

    def __init__(self, final_model: FinalModel, instances: Instances, *args: Any, **kwargs: Any) -> None:
        super().__init__(final_model, instances, *args, **kwargs)
        self.convex = final_model.loss.convex
        d = 0 if self.convex else final_model.outputs(instances[:1])[0].numel()
        if not self.convex and d > MAX_PROJECTED:
            log.info("with %d outputs, the loss is taken to be convex in them", d)
            self.convex = True
        if not self.convex:
            self.batch_size = max(1, min(self.batch_size, 2**24 // d**2))
            self.convex = all(self._is_convex(b) for b in instances.batches(self.batch_size))

    def _is_convex(self, batch: Instances) -> bool:
        at = self.final_model.outputs(batch)
        values = torch.linalg.eigvalsh(self.final_model.loss.hessian(at, batch.targets).double())
        return bool((values[:, 0] >= -1e-7 * values.abs().amax(1)).all())

    def _product(self, batch: Instances) -> Callable[[Tensor], Tensor]:
        roots: Tensor | None = None
        if not self.convex:
            at = self.final_model.outputs(batch)
            roots = self.final_model.loss.hessian_root(at, batch.targets).flatten(2)  # [n, R, D]

        def outputs(parameters: Parameters) -> Tensor:
            return self._outputs(parameters, batch)

        def loss(values: Tensor) -> Tensor:
            return self.final_model.loss(values, batch.targets).sum()

        def product(vector: Tensor) -> Tensor:
            at, pushed = jvp(outputs, (self.parameters,), (self._unflatten(vector),))
            if roots is None:
                curved = jvp(grad(loss), (at,), (pushed,))[1]
            else:
                along = torch.einsum("nrd,nd->nr", roots, pushed.flatten(1))
                curved = torch.einsum("nrd,nr->nd", roots, along).view_as(at)
            pullback = vjp(outputs, self.parameters)[1]
            return self._flatten(pullback(curved)[0])

        return product


class Hessian(AutogradOperator):
    """The Hessian of the mean training loss, which may be indefinite."""

    def _product(self, batch: Instances) -> Callable[[Tensor], Tensor]:
        def loss(parameters: Parameters) -> Tensor:
            return self.final_model.loss(self._outputs(parameters, batch), batch.targets).sum()

        def product(vector: Tensor) -> Tensor:
            return self._flatten(jvp(grad(loss), (self.parameters,), (self._unflatten(vector),))[1])

        return product
