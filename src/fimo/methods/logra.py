"""LoGra and TrackStar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.jacobian import Rows
from fimo.curvature.layer_projection import LayerProjection, projected_size
from fimo.curvature.spectrum import MAX_DIMENSION
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod, FittedCurvature, Solved
from fimo.models.final_model import FinalModel


class Logra(CurvatureMethod):
    """Influence in a random subspace of each layer's weights (Choe et al., 2024, LoGra).

    With φ = (Q δ) (P a)^T a layer's gradient projected from both sides, P and Q of k orthonormal rows,

        score[j, i] = (1/N) φ_j^T (R + damping I)^-1 φ_i,    R = (1/N) sum_i φ_i φ_i^T,

    which is the influence function of a network whose weights move along Q^T (k x k) P only. With k as large
    as the layers nothing is left out: dense influence with the empirical Fisher (or Gauss-Newton) matrix, of
    each layer by itself or of all together.

    TrackStar (Chang et al., 2024) is ``second_moment`` and ``normalise``: gradients are divided by the root
    of their second moment before they are projected (by a factor for each row and each column of a layer, as
    Adafactor does), and the score is the cosine in (R + damping I)^-1, so that no row wins by its size alone.
    (There the second moment is the training optimizer's, and R may mix in the test task's.)

    Args:
        damping, propagate: see :class:`~fimo.methods.gradient.CurvatureMethod`; ``auto`` is 0.1 times the
            mean eigenvalue of each block's R.
        dimension: k of each side.
        blocks: ``layers``, R of each layer by itself as in the papers, or ``whole``, of all together.
        curvature: ``empirical``, R of the training gradients, or ``gauss_newton``.
        second_moment: divide gradients by the root of their second moment.
        normalise: divide scores by those of j and of i with themselves (by ``loss`` only).
        seed: of the projections.
    """

    needs = "nothing else"
    cost = "one gradient per instance, projected layer by layer, never formed where layers are linear"
    use = "large networks and many training instances, in the memory of k x k numbers a layer"

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        dimension: int = 16,
        blocks: Literal["layers", "whole"] = "layers",
        curvature: Literal["empirical", "gauss_newton"] = "empirical",
        second_moment: bool = False,
        normalise: bool = False,
        seed: int = 0,
        memory_mb: float = 1024,
        storage: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__(damping, propagate, memory_mb, storage, cache)
        if dimension < 1:
            raise InputError("dimension", f"expected at least 1 but got {dimension}")
        if blocks not in ("layers", "whole"):
            raise InputError("blocks", f"expected one of layers, whole but got {blocks!r}")
        if curvature not in ("empirical", "gauss_newton"):
            raise InputError("curvature", f"expected one of empirical, gauss_newton but got {curvature!r}")
        if normalise and propagate == "outputs":
            raise InputError("normalise", "a cosine of gradients changes no outputs; expected propagate=loss")
        self.dimension, self.blocks, self.curvature, self.seed = dimension, blocks, curvature, seed
        self.second_moment, self.normalise = second_moment, normalise

    @property
    def predicts_loss_change(self) -> bool:
        """A subspace shows a part of the change only."""
        return False

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        shapes = {name: p.shape for name, p in final_model.parameters().items()}
        sizes = projected_size(shapes, self.dimension)
        largest = sum(sizes) if self.blocks == "whole" else max(sizes)
        if largest <= MAX_DIMENSION:
            return None
        remedy = "a smaller dimension" if self.blocks == "layers" else "blocks=layers or a smaller dimension"
        return f"its eigenproblem is {largest} x {largest} (at most {MAX_DIMENSION}); choose {remedy}"

    def fit(self, final_model: FinalModel, train: Instances) -> ProjectedCurvature:
        if reason := self.inapplicable(final_model, train):
            raise InputError("dimension", reason)
        gradients = self.gradients(final_model)
        like = torch.zeros((), dtype=gradients.dtype, device=gradients.device)
        projection = LayerProjection.random(gradients.shapes, self.dimension, self.seed, like)
        losses = gradients.losses(train, "layers")
        if self.second_moment:
            ones = torch.ones(losses.n, 1, 1, dtype=losses.dtype, device=losses.device)
            projection = projection.scaled(losses.squares().transposed_times(ones)[:, 0] / losses.n)
        rows = losses if self.curvature == "empirical" else gradients.gauss_newton(train, "layers")
        sizes = projection.sizes if self.blocks == "layers" else [sum(projection.sizes)]
        totals = [torch.zeros(k, k, dtype=torch.float64, device=gradients.device) for k in sizes]
        each = sum(projection.sizes) * rows.r * rows.dtype.itemsize
        keep = self.curvature == "empirical" and rows.n * each <= gradients.memory
        kept: list[Tensor] = []
        for block in projection.blocks(rows):
            if keep:
                kept.append(block)
            for total, part in zip(totals, block.flatten(0, 1).double().split(sizes, 1), strict=True):
                total.addmm_(part.T, part)
        found = [torch.linalg.eigh(total / len(train)) for total in totals]
        values, vectors = [v.clamp(min=0) for v, _ in found], [v for _, v in found]
        relative = self.damping.kind == "auto"
        projected = torch.cat(kept) if keep else None
        return ProjectedCurvature(
            gradients, train, projection, values, vectors, relative, self.normalise, projected
        )

    def solved(
        self, curvature: FittedCurvature, left: Rows, problem: AttributionProblem, dampings: Tensor
    ) -> Solved:
        assert isinstance(curvature, ProjectedCurvature)
        if curvature.projected is None:
            return super().solved(curvature, left, problem, dampings)
        right = curvature.projected[problem.index.to(curvature.projected.device)]
        return curvature.products(curvature.coordinates(left), curvature.turned(right), dampings)

    def sweep(
        self, curvature: FittedCurvature, dampings: Tensor, problem: AttributionProblem
    ) -> tuple[Tensor, tuple[str, ...]]:
        values, notes = super().sweep(curvature, dampings, problem)
        return values * len(problem.train) if self.normalise else values, notes


@dataclass(frozen=True)
class ProjectedCurvature(FittedCurvature):
    """A curvature of projected gradients, in diagonal blocks.

    Args:
        values: eigenvalues of each block, ``[k]``.
        vectors: its eigenvectors ``[k, k]``.
        relative: dampings are multiples of each block's own mean eigenvalue.
        normalise: products are cosines.
        projected: ``[N, 1, K]``, training gradients, where they fit into the memory.
    """

    projection: LayerProjection
    values: list[Tensor]
    vectors: list[Tensor]
    relative: bool
    normalise: bool
    projected: Tensor | None = None

    def mean_eigenvalue(self) -> float:
        return float(torch.cat(self.values).mean())

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        return self.products(self.coordinates(left), self.coordinates(right), dampings)

    def products(self, ours: Tensor, right: Tensor, dampings: Tensor) -> Solved:
        """Return the products of coordinates ``[n, R, K]`` and ``[m, 1, K]`` with each damped inverse."""
        theirs = right[:, 0]
        found = []
        for damping in dampings.tolist():
            inverse = 1 / self.damped(damping)
            products = (ours * inverse) @ theirs.T
            if self.normalise:
                sizes = [(c.square() * inverse).sum(-1).sqrt() for c in (ours, theirs)]
                norms = sizes[0][..., None] * sizes[1]
                products = products / norms.where(norms > 0, 1)
            found.append(products)
        return Solved(torch.stack(found))

    def coordinates(self, rows: Rows) -> Tensor:
        """Return ``[n, R, K]`` (float64), along the eigenvectors of all blocks."""
        return self.turned(self.projection.project(rows))

    def turned(self, projected: Tensor) -> Tensor:
        """Return the coordinates of projected rows ``[n, R, K]``."""
        parts = projected.double().split([len(v) for v in self.values], 2)
        return torch.cat([part @ v for part, v in zip(parts, self.vectors, strict=True)], 2)

    def damped(self, damping: float) -> Tensor:
        """Return the damped eigenvalues ``[K]`` of all blocks."""
        mean = self.mean_eigenvalue()
        found = []
        for values in self.values:
            factor = values.mean().item() / mean if self.relative and mean > 0 else 1.0
            # a block without any curvature (dead units) still gets a finite answer
            found.append(values + damping * max(factor, 1e-6))
        return torch.cat(found)
