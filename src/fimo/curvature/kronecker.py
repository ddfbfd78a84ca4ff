"""K-FAC and EK-FAC: a curvature matrix that is block-diagonal over modules, with Kronecker eigenvectors.

A linear layer's gradient is δ a^T. K-FAC takes E[a a^T ⊗ δ δ^T] as A ⊗ B with A = E[a a^T], B = E[δ δ^T]
(Martens and Grosse, 2015); EK-FAC keeps their eigenvectors and replaces the products of eigenvalues by the
exact second moment along each pair of eigenvectors (George et al., 2018). Biases are the last column of
[W, b], their input being 1; a convolution is a linear layer on its patches, an embedding one on one-hot rows.
Second moments are taken from the true per-instance rows, so that weight sharing, tied weights and modules
used twice only make the eigenvectors less apt, never the moments wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.arranged_rows import ArrangedRows, calls_of
from fimo.curvature.cotangents import Cotangents, DrawnGradients, GradientOf
from fimo.curvature.covariances import Moments, layer_moments
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import FactoredRows, Rows, Shapes, split
from fimo.curvature.module_rows import ModuleRows
from fimo.curvature.module_terms import formed, second_moments
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.final_model import FinalModel

Fisher = Literal["auto", "exact", "sampled", "empirical"]

MAX_EXACT_OUTPUTS = 16
"""Number of outputs up to which ``auto`` takes the Gauss-Newton rows exactly instead of sampling targets."""

MAX_EXACT_OUTPUTS_OF_OWN = 64
"""The same under a loss of the user's own, from whose predictions no targets can be drawn."""

MAX_DENSE = 2048
"""Largest number of parameters of a module outside Kronecker form that gets a dense block of its own."""


@dataclass
class Block:
    """One block: symmetric, with eigenvectors ``left[:, b] right[:, a]^T`` in its gradient's matrix form.

    Args:
        names: its parameters.
        kind: ``kronecker``, ``dense`` (exact), or ``diagonal``.
        rows: number of rows of the matrix form; the columns are those of each parameter in turn.
        left, right: orthonormal eigenvectors, or None for the identity.
        values: eigenvalues, of the shape of the matrix form.
        stacked: parameters are rows of the matrix form, not columns: a bias is the last row.
    """

    names: tuple[str, ...]
    kind: Literal["kronecker", "dense", "diagonal"]
    rows: int
    left: Tensor | None
    right: Tensor | None
    values: Tensor
    stacked: bool = False

    def gather(self, parts: dict[str, Tensor]) -> Tensor:
        """Return flat parts ``[K, numel]`` as matrices ``[K, rows, columns]``."""
        if self.stacked:
            columns = self.values.shape[1]
            return torch.cat([parts[n].reshape(len(parts[n]), -1, columns) for n in self.names], 1)
        return torch.cat([parts[n].reshape(len(parts[n]), self.rows, -1) for n in self.names], 2)

    def scatter(self, matrices: Tensor, into: dict[str, Tensor], shapes: Shapes) -> None:
        """Put matrices back as flat parts ``[K, numel]``."""
        across = self.values.shape[1] if self.stacked else self.rows
        sizes = [shapes[name].numel() // across for name in self.names]
        for name, part in zip(self.names, matrices.split(sizes, 1 if self.stacked else 2), strict=True):
            into[name] = part.flatten(1)

    def rotate(self, matrices: Tensor) -> Tensor:
        """Return the coordinates along the eigenvectors: ``left^T G right``."""
        found = matrices if self.left is None else self.left.T.to(matrices) @ matrices
        return found if self.right is None else found @ self.right.to(matrices)

    def rotate_back(self, matrices: Tensor) -> Tensor:
        """Return ``left G right^T``."""
        found = matrices if self.left is None else self.left.to(matrices) @ matrices
        return found if self.right is None else found @ self.right.T.to(matrices)


class KroneckerFactors:
    """The eigendecomposed blocks of all trainable parameters.

    Attributes:
        blocks: that make up the matrix.
        coverage: share of the parameters in Kronecker or dense blocks.
        uncovered: names of the others, which have a diagonal.
    """

    def __init__(self, blocks: list[Block], shapes: dict[str, torch.Size]) -> None:
        self.blocks, self.shapes = blocks, shapes
        self.uncovered = [n for b in blocks if b.kind == "diagonal" for n in b.names]
        p = sum(s.numel() for s in shapes.values())
        self.coverage = 1 - sum(shapes[n].numel() for n in self.uncovered) / p
        self.mean_eigenvalue = sum(b.values.sum().item() for b in blocks) / p

    def solve(self, vectors: Tensor, dampings: Tensor, relative: bool = False, power: float = 1.0) -> Tensor:
        """Return ``(C + damping)^-power vectors`` for each damping.

        Args:
            vectors: ``[P, K]``.
            dampings: ``[E]``.
            relative: each block's damping is multiplied by its mean eigenvalue over that of all.
            power: 1/2 for the inverse's root.

        Returns:
            ``[E, P, K]``.
        """
        parts = split(vectors.T, self.shapes)
        found = self._solved(lambda block: block.rotate(block.gather(parts)), dampings, relative, power)
        return found.to(vectors.dtype)  # layers may have several

    def solve_rows(self, rows: Rows, dampings: Tensor, relative: bool = False) -> Tensor:
        """Return the same of rows in memory, ``[E, P, n R]``, turned before they are formed."""
        parts = calls_of(rows)
        if parts is None:
            return self.solve(rows.dense().flatten(0, 1).T, dampings, relative).to(rows.dtype)

        def rotated(block: Block) -> Tensor:
            each = [_rotated(part, block).unflatten(0, (part.n, part.r)) for part in parts]
            return (rows.in_order(each) if isinstance(rows, ArrangedRows) else each[0]).flatten(0, 1)

        return self._solved(rotated, dampings, relative).to(rows.dtype)

    def _solved(
        self,
        rotated: Callable[[Block], Tensor],
        dampings: Tensor,
        relative: bool = False,
        power: float = 1.0,
    ) -> Tensor:
        """Return :meth:`solve` of vectors by their coordinates ``[K, rows, columns]`` in each block."""
        solved: list[dict[str, Tensor]] = [{} for _ in dampings]
        for block in self.blocks:
            at = rotated(block)
            factor = (
                block.values.mean().item() / self.mean_eigenvalue
                if relative and self.mean_eigenvalue
                else 1.0
            )
            for into, damping in zip(solved, dampings.tolist(), strict=True):
                # a module without any curvature (dead units) still gets a finite answer
                damped = block.values + damping * max(factor, 1e-6)
                block.scatter(block.rotate_back(at / damped**power), into, self.shapes)
        return torch.stack([torch.cat([s[name] for name in self.shapes], 1).T for s in solved])


def _rotated(rows: ModuleRows, block: Block) -> Tensor:
    """Return the coordinates ``[n R, rows, columns]`` of rows along a block's eigenvectors."""
    if block.kind == "kronecker":
        found = [
            formed([term.rotated(block.left, block.right) for term in terms])
            for terms in rows.terms(block.names, biased=len(block.names) > 1)
        ]
        return torch.stack(found, 1).flatten(0, 1)
    parts = {}
    for name in block.names:
        each = [formed(terms).flatten(1) for terms in rows.terms((name,))]
        none = torch.zeros(rows.n, rows.r, rows.shapes[name].numel(), dtype=rows.dtype, device=rows.device)
        parts[name] = (torch.stack(each, 1) if each else none).flatten(0, 1)
    return block.rotate(block.gather(parts))


def fit_factors(
    gradients: InstanceGradients,
    train: Instances,
    corrected: bool = True,
    fisher: Fisher = "auto",
    samples: int = 1,
    seed: int = 0,
) -> KroneckerFactors:
    """Fit the factors on training instances.

    Args:
        gradients: of the final model.
        corrected: EK-FAC's second moments along the eigenvectors, else K-FAC's products of eigenvalues.
        fisher: whose factors: the exact Gauss-Newton matrix, targets ``sampled`` from the model,
            the ``empirical`` Fisher of the training targets; ``auto`` is exact for up to 16 outputs (64 under
            a loss of the user's own), else sampled.
        samples, seed: of sampled targets.

    Raises:
        InputError: a gradient is not finite, or there are no such factors, see :func:`no_factors`.
    """
    if reason := no_factors(gradients.final_model, train, fisher):
        raise InputError("fisher", reason)
    fisher = chosen_fisher(gradients.final_model, train, fisher)
    loss = gradients.final_model.loss
    drawn = DrawnGradients(loss, samples, seed, gradients.device)
    cotangents: Cotangents
    if fisher == "exact":
        rows, cotangents = gradients.gauss_newton(train, form="calls"), loss.hessian_root
    elif fisher == "sampled":
        rows, cotangents = gradients.sampled(train, samples, seed, form="calls"), drawn
    else:
        rows, cotangents = gradients.losses(train, form="calls"), GradientOf(loss)

    def kronecker_blocks() -> tuple[Block, ...]:
        drawn.restart()
        found, eigenvectors = layer_moments(gradients, train, rows, cotangents), Eigenvectors()
        return tuple(_kronecker_block(m, eigenvectors) for m in found)

    kind = ("kronecker", fisher, samples, seed, *gradients.arrangement(train))
    found = gradients.kept(f"Kronecker factors of {len(train)} instances", train, kind, kronecker_blocks)
    blocks = [replace(block) for block in found]
    blocks += _other_blocks(gradients, {name for b in blocks for name in b.names})
    needs_rows = [b for b in blocks if corrected or b.kind != "kronecker"]
    if needs_rows:
        _second_moments(rows, needs_rows, len(train))
    return KroneckerFactors(blocks, gradients.shapes)


def chosen_fisher(final_model: FinalModel, train: Instances, fisher: Fisher) -> Fisher:
    """Return what ``auto`` is: exact, or sampled where outputs are many and targets can be drawn."""
    if fisher != "auto":
        return fisher
    outputs = final_model.outputs(train[:1])[0].numel()
    return "sampled" if outputs > MAX_EXACT_OUTPUTS and final_model.loss.draws else "exact"


def no_factors(final_model: FinalModel, train: Instances, fisher: Fisher) -> str | None:
    """Return why there are no such factors, or None: targets can be drawn under known losses only."""
    if final_model.loss.draws or fisher in ("exact", "empirical"):
        return None
    outputs = final_model.outputs(train[:1])[0].numel()
    if fisher == "auto" and outputs <= MAX_EXACT_OUTPUTS_OF_OWN:
        return None
    others = "exact or " if outputs <= MAX_EXACT_OUTPUTS_OF_OWN else ""
    return (
        "no targets can be drawn from the model's prediction under a loss of one's own, and its Gauss-Newton "
        f"matrix has {outputs} rows for each instance; fisher={others}empirical does without"
    )


class Eigenvectors:
    """Eigendecompositions of symmetric matrices, equal ones (of layers that share what enters them) once."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def of(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (float64), without those below zero, and the eigenvectors."""
        for known, values, vectors in self.found:
            if known.shape == matrix.shape and torch.equal(known, matrix):
                return values, vectors
        values, vectors = torch.linalg.eigh(matrix.double())
        self.found.append((matrix, values.clamp(min=0), vectors.to(matrix.dtype)))
        return self.found[-1][1:]


def _kronecker_block(moments: Moments, eigenvectors: Eigenvectors) -> Block:
    b_values, b_vectors = eigenvectors.of(moments.leaving)
    dtype = moments.leaving.dtype
    if moments.entering.dim() == 1:  # a diagonal: an embedding's token frequencies
        # the embedding's matrix is [tokens, width]: its rows are the tokens
        values = (moments.entering.double()[:, None] * b_values).to(dtype)
        return Block(moments.names, "kronecker", len(values), None, b_vectors, values)
    a_values, a_vectors = eigenvectors.of(moments.entering)
    if moments.transposed:
        values = (a_values[:, None] * b_values).to(dtype)
        return Block(moments.names, "kronecker", len(values), a_vectors, b_vectors, values, stacked=True)
    values = (b_values[:, None] * a_values).to(dtype)
    return Block(moments.names, "kronecker", len(values), b_vectors, a_vectors, values)


def _other_blocks(gradients: InstanceGradients, covered: set[str]) -> list[Block]:
    """Return dense blocks for small modules outside Kronecker form, diagonals for large ones, unset."""
    groups: dict[str, list[str]] = {}
    for name in gradients.shapes:
        if name not in covered:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    blocks = []
    for names in groups.values():
        size = sum(gradients.shapes[n].numel() for n in names)
        unset = torch.zeros(1, size, dtype=gradients.dtype, device=gradients.device)
        kind: Literal["dense", "diagonal"] = "dense" if size <= MAX_DENSE else "diagonal"
        blocks.append(Block(tuple(names), kind, 1, None, None, unset))
    return blocks


def _second_moments(rows: Rows, blocks: list[Block], n: int) -> None:
    """Set the blocks' eigenvalues (and the dense ones' eigenvectors) from the rows."""
    totals = [torch.zeros_like(b.values) for b in blocks]
    dense = {
        k: torch.zeros(b.values.numel(), b.values.numel(), dtype=rows.dtype, device=rows.device)
        for k, b in enumerate(blocks)
        if b.kind == "dense"
    }
    for stretch in rows.blocks():
        if isinstance(stretch, FactoredRows):
            for some in stretch.parts():
                _moments_of_factors(some, blocks, totals)
            continue
        if (parts := calls_of(stretch)) is not None:
            for part in parts:
                _moments_of_calls(part, blocks, totals, dense)
            continue
        for piece in stretch.pieces():
            split_up = split(piece.dense().flatten(0, 1), rows.shapes)
            for k, (block, total) in enumerate(zip(blocks, totals, strict=True)):
                matrices = block.gather(split_up)
                if k in dense:
                    dense[k].addmm_(matrices[:, 0].T, matrices[:, 0])
                else:
                    total += block.rotate(matrices).square().sum(0)
    for k, (block, total) in enumerate(zip(blocks, totals, strict=True)):
        if k in dense:
            values, vectors = torch.linalg.eigh(dense[k].double() / n)
            block.values, block.right = values.clamp(min=0).to(rows.dtype)[None], vectors.to(rows.dtype)
        else:
            block.values = total / n


def _moments_of_factors(rows: FactoredRows, blocks: list[Block], totals: list[Tensor]) -> None:
    """Add the second moments of rows of linear layers to those of blocks."""
    by_name = {layer.names[0]: layer for layer in rows.layers}
    for block, total in zip(blocks, totals, strict=True):
        layer = by_name[block.names[0]]
        assert block.left is not None
        assert block.right is not None
        a = (layer.entering_all @ block.right).square()
        total += (layer.delta @ block.left).square().sum(1).T @ a


def _moments_of_calls(
    rows: ModuleRows, blocks: list[Block], totals: list[Tensor], dense: dict[int, Tensor]
) -> None:
    """Add the second moments of rows to those of blocks."""
    for k, (block, total) in enumerate(zip(blocks, totals, strict=True)):
        if block.kind == "kronecker":
            for terms in rows.terms(block.names, biased=len(block.names) > 1):
                second_moments(terms, block.left, block.right, total)
            continue
        flat = _rotated(rows, replace(block, right=None))[:, 0]
        if k in dense:
            dense[k].addmm_(flat.T, flat)
        else:
            total += flat.square().sum(0)
