"""LoGra and TrackStar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import Rows
from fimo.curvature.layer_projection import LayerProjection, projected_size
from fimo.curvature.projected_gradients import ProjectedGradients, summed_squares
from fimo.curvature.spectrum import MAX_DIMENSION
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.damping import DampingValue
from fimo.methods.gradient import CurvatureMethod, FittedCurvature, Solved
from fimo.methods.projected import Projected, ProjectedRowsMethod
from fimo.models.final_model import FinalModel
from fimo.scores import Scores
from fimo.validation import choices

LARGEST = 64
"""Of a dimension that is chosen by memory."""

CODE = ("fimo.curvature.gradients", "fimo.curvature.layer_projection")
"""That computes projected gradients."""


class Logra(ProjectedRowsMethod, CurvatureMethod):
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
        dimension: k of each side; ``auto``, the largest power of two up to 64 with which the projected
            training gradients fit into half of ``memory_mb``.
        blocks: ``layers``, R of each layer by itself as in the papers, or ``whole``, of all together.
        curvature: ``empirical``, R of the training gradients, or ``gauss_newton``.
        second_moment: divide gradients by the root of their second moment.
        normalise: divide scores by those of j and of i with themselves (by ``loss`` only).
        seed: of the projections.
        storage: type in which projected gradients are held or kept; the model's when None.
        cache: a folder that keeps the projected training gradients, for other runs, test instances, dampings,
            blocks and for TrackStar's cosines. They are searched there, whatever their number.
    """

    needs = "nothing else"
    cost = "one gradient per instance, projected layer by layer, never formed where layers are linear"
    use = "large networks and many training instances, in the memory of k x k numbers a layer"

    def __init__(
        self,
        damping: DampingValue = "auto",
        propagate: Literal["loss", "outputs"] = "loss",
        dimension: int | Literal["auto"] = 16,
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
        if dimension != "auto":
            dimension = choices.count(dimension, "dimension", ", or auto,")
        if blocks not in ("layers", "whole"):
            raise InputError("blocks", f"expected one of layers, whole but got {blocks!r}")
        if curvature not in ("empirical", "gauss_newton"):
            raise InputError("curvature", f"expected one of empirical, gauss_newton but got {curvature!r}")
        if normalise and propagate == "outputs":
            raise InputError("normalise", "a cosine of gradients changes no outputs; expected propagate=loss")
        self.dimension: int | Literal["auto"] = dimension
        self.blocks, self.curvature, self.seed = blocks, curvature, seed
        self.second_moment, self.normalise = second_moment, normalise

    @property
    def predicts_loss_change(self) -> bool:
        """A subspace shows a part of the change only."""
        return False

    def inapplicable(self, final_model: FinalModel, train: Instances) -> str | None:
        sizes = projected_size(_shapes(final_model), self.dimension_of(final_model, len(train)))
        largest = sum(sizes) if self.blocks == "whole" else max(sizes)
        if largest <= MAX_DIMENSION:
            return None
        remedy = "a smaller dimension" if self.blocks == "layers" else "blocks=layers or a smaller dimension"
        return f"its eigenproblem is {largest} x {largest} (at most {MAX_DIMENSION}); choose {remedy}"

    def dimension_of(self, final_model: FinalModel, n: int) -> int:
        """Return k for n training instances."""
        if self.dimension != "auto":
            return self.dimension
        k, shapes = LARGEST, _shapes(final_model)
        each = self._kept_dtype(final_model).itemsize * n
        while k > 1 and (
            sum(projected_size(shapes, k)) * each > self.memory_mb * 2**20 / 2
            or (self.blocks == "whole" and sum(projected_size(shapes, k)) > MAX_DIMENSION)
        ):
            k //= 2
        return k

    def fit(self, final_model: FinalModel, train: Instances) -> ProjectedCurvature:
        if reason := self.inapplicable(final_model, train):
            raise InputError("dimension", reason)
        gradients = self.gradients(final_model)
        projection = self._layers(gradients, train)
        projected = self.rows(gradients, train, self._by(projection, gradients, train))
        sizes = projection.sizes if self.blocks == "layers" else [sum(projection.sizes)]
        if self.curvature == "empirical":
            totals = projected.second_moments(sizes)
        else:
            rows = gradients.gauss_newton(train, "layers")
            whole = (block.flatten(0, 1) for block in projection.blocks(rows))
            totals = summed_squares(whole, sizes)
        found = [torch.linalg.eigh(total / len(train)) for total in totals]
        values, vectors = [v.clamp(min=0) for v, _ in found], [v for _, v in found]
        relative = self.damping.kind == "auto"
        return ProjectedCurvature(
            gradients, train, projection, values, vectors, relative, self.normalise, projected
        )

    def projected(self, gradients: InstanceGradients, train: Instances, checkpoint: int) -> Projected:
        return self._by(self._layers(gradients, train), gradients, train)

    def _by(self, projection: LayerProjection, gradients: InstanceGradients, train: Instances) -> Projected:
        def project(instances: Instances) -> Iterator[Tensor]:
            for block in projection.blocks(gradients.losses(instances, "layers")):
                yield block[:, 0]

        dimension = self.dimension_of(gradients.final_model, len(train))
        settings = {"dimension": dimension, "seed": self.seed, "second_moment": self.second_moment}
        return Projected(project, sum(projection.sizes), "layers", settings, CODE)

    def _layers(self, gradients: InstanceGradients, train: Instances) -> LayerProjection:
        like = torch.zeros((), dtype=gradients.dtype, device=gradients.device)
        dimension = self.dimension_of(gradients.final_model, len(train))
        projection = LayerProjection.random(gradients.shapes, dimension, self.seed, like)
        return projection.scaled(self._second_moment(gradients, train)) if self.second_moment else projection

    def _second_moment(self, gradients: InstanceGradients, train: Instances) -> Tensor:
        """Return the mean squares ``[P]`` of the training gradients."""

        def made() -> Tensor:
            losses = gradients.losses(train, "layers")
            ones = torch.ones(losses.n, 1, 1, dtype=losses.dtype, device=losses.device)
            return losses.squares().transposed_times(ones)[:, 0] / losses.n

        return self.kept(gradients, train, "second_moment", {}, CODE, made)

    def solved(
        self, curvature: FittedCurvature, left: Rows, problem: AttributionProblem, dampings: Tensor
    ) -> Solved:
        assert isinstance(curvature, ProjectedCurvature)
        right = (rows for rows, _ in curvature.projected.chosen(problem.left_out))
        return curvature.products(curvature.coordinates(left), right, len(problem.index), dampings)

    def extreme_scores(self, problem: AttributionProblem, k: int) -> Scores | None:
        if self.propagate != "loss" or self.follows_further_training:
            return None
        curvature = self.fit(problem.final_model, problem.train)
        dampings = self.dampings(curvature, problem.further_training)
        inverse = 1 / curvature.damped(dampings.item())
        left = curvature.gradients.measurements(problem.test)
        queries = curvature.query(curvature.coordinates(left), inverse)[:, 0]
        lengths = (lambda rows: curvature.inverse_lengths(rows, inverse)) if self.normalise else None
        blocks = curvature.projected.chosen(problem.left_out)
        some = self.at_the_ends(problem, queries, blocks, k, lengths)
        values, notes = self.sweep(curvature, dampings, some)
        evaluations = curvature.gradients.evaluations
        return self.result(
            some, values[0], gradient_evaluations=evaluations, notes=(*curvature.notes, *notes), ranks=k
        )

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
        projected: training gradients.
    """

    projection: LayerProjection
    values: list[Tensor]
    vectors: list[Tensor]
    relative: bool
    normalise: bool
    projected: ProjectedGradients

    def mean_eigenvalue(self) -> float:
        return float(torch.cat(self.values).mean())

    def solve(self, left: Rows, right: Rows, dampings: Tensor) -> Solved:
        blocks = (block[:, 0] for block in self.projection.blocks(right))
        return self.products(self.coordinates(left), blocks, right.n, dampings)

    def products(self, ours: Tensor, right: Iterable[Tensor], count: int, dampings: Tensor) -> Solved:
        """Return the products with each damped inverse.

        Args:
            ours: coordinates ``[n, R, K]``.
            right: blocks of projected rows, ``[m, K]`` each.
            count: how many rows they are.
            dampings: ``[E]``.
        """
        inverses = [1 / self.damped(damping) for damping in dampings.tolist()]
        queries = [self.query(ours, inverse) for inverse in inverses]
        found = torch.empty(len(inverses), *ours.shape[:2], count, dtype=self.gradients.dtype).to(ours.device)
        start = 0
        for rows in right:
            at = slice(start, start + len(rows))
            start += len(rows)
            exact = rows.double()
            for e, (query, inverse) in enumerate(zip(queries, inverses, strict=True)):
                products = query @ exact.T
                if self.normalise:
                    products *= self.inverse_lengths(exact, inverse)
                found[e, :, :, at] = products
        return Solved(found)

    def query(self, ours: Tensor, inverse: Tensor) -> Tensor:
        """Return what to multiply projected rows with, ``[n, R, K]``, for coordinates ``[n, R, K]``."""
        if self.normalise:
            norms = (ours.square() * inverse).sum(-1, keepdim=True).sqrt()
            ours = ours / norms.where(norms > 0, 1)
        parts = (ours * inverse).split([len(v) for v in self.values], 2)
        return torch.cat([part @ v.T for part, v in zip(parts, self.vectors, strict=True)], 2)

    def inverse_lengths(self, rows: Tensor, inverse: Tensor) -> Tensor:
        """Return ``[m]``: one over the length in the inverse of projected rows ``[m, K]``; 1 for zeros."""
        norms = (self.turned(rows).square() * inverse).sum(-1).sqrt()
        return 1 / norms.where(norms > 0, 1)

    def coordinates(self, rows: Rows) -> Tensor:
        """Return ``[n, R, K]`` (float64), along the eigenvectors of all blocks."""
        return self.turned(self.projection.project(rows))

    def turned(self, projected: Tensor) -> Tensor:
        """Return the coordinates of projected rows ``[..., K]``."""
        parts = projected.double().split([len(v) for v in self.values], -1)
        return torch.cat([part @ v for part, v in zip(parts, self.vectors, strict=True)], -1)

    def damped(self, damping: float) -> Tensor:
        """Return the damped eigenvalues ``[K]`` of all blocks."""
        mean = self.mean_eigenvalue()
        found = []
        for values in self.values:
            factor = values.mean().item() / mean if self.relative and mean > 0 else 1.0
            # a block without any curvature (dead units) still gets a finite answer
            found.append(values + damping * max(factor, 1e-6))
        return torch.cat(found)


def _shapes(final_model: FinalModel) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in final_model.parameters().items()}
