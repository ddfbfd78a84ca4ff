"""K-FAC and EK-FAC: a curvature matrix that is block-diagonal over modules, with Kronecker eigenvectors.

A linear layer's gradient is δ a^T. K-FAC takes E[a a^T ⊗ δ δ^T] as A ⊗ B with A = E[a a^T], B = E[δ δ^T]
(Martens and Grosse, 2015); EK-FAC keeps their eigenvectors and replaces the products of eigenvalues by the
exact second moment along each pair of eigenvectors (George et al., 2018). Biases are the last column of
[W, b], their input being 1; a convolution is a linear layer on its patches, an embedding one on one-hot rows.
Second moments are taken from the true per-instance rows, so that weight sharing, tied weights and modules
used twice only make the eigenvectors less apt, never the moments wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.covariances import Moments, layer_moments
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import FactoredRows, Rows, split
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
        transposed: the parameters hold the matrix form's transpose, as GPT-2's linear layers do.
    """

    names: tuple[str, ...]
    kind: Literal["kronecker", "dense", "diagonal"]
    rows: int
    left: Tensor | None
    right: Tensor | None
    values: Tensor
    transposed: bool = False

    def gather(self, parts: dict[str, Tensor]) -> Tensor:
        """Return flat parts ``[K, numel]`` as matrices ``[K, rows, columns]``."""
        return torch.cat([self._matrices(parts[name]) for name in self.names], 2)

    def scatter(self, matrices: Tensor, into: dict[str, Tensor], widths: list[int]) -> None:
        """Put matrices back as flat parts ``[K, numel]``."""
        for name, part in zip(self.names, matrices.split(widths, 2), strict=True):
            into[name] = (part.transpose(1, 2) if self.transposed else part).flatten(1)

    def _matrices(self, part: Tensor) -> Tensor:
        if self.transposed:
            return part.reshape(len(part), -1, self.rows).transpose(1, 2)
        return part.reshape(len(part), self.rows, -1)

    def rotate(self, matrices: Tensor) -> Tensor:
        """Return the coordinates along the eigenvectors: ``left^T G right``."""
        found = matrices if self.left is None else self.left.T @ matrices
        return found if self.right is None else found @ self.right

    def rotate_back(self, matrices: Tensor) -> Tensor:
        """Return ``left G right^T``."""
        found = matrices if self.left is None else self.left @ matrices
        return found if self.right is None else found @ self.right.T


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
        solved: list[dict[str, Tensor]] = [{} for _ in dampings]
        for block in self.blocks:
            widths = [self.shapes[name].numel() // block.rows for name in block.names]
            rotated = block.rotate(block.gather(parts))
            factor = (
                block.values.mean().item() / self.mean_eigenvalue
                if relative and self.mean_eigenvalue
                else 1.0
            )
            for into, damping in zip(solved, dampings.tolist(), strict=True):
                # a module without any curvature (dead units) still gets a finite answer
                damped = block.values + damping * max(factor, 1e-6)
                block.scatter(block.rotate_back(rotated / damped**power), into, widths)
        return torch.stack([torch.cat([s[name] for name in self.shapes], 1).T for s in solved])


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
    if fisher == "exact":
        rows = gradients.gauss_newton(train)
    elif fisher == "sampled":
        rows = gradients.sampled(train, samples, seed)
    else:
        rows = gradients.losses(train)
    found = layer_moments(gradients, train, rows, fisher, samples, seed)
    blocks = [_kronecker_block(m, gradients.shapes) for m in found]
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


def _kronecker_block(moments: Moments, shapes: dict[str, torch.Size]) -> Block:
    b_values, b_vectors = torch.linalg.eigh(moments.leaving.double())
    dtype = moments.leaving.dtype
    if moments.entering.dim() == 1:  # a diagonal: an embedding's token frequencies
        a_values, a_vectors = moments.entering.double(), None
        # the embedding's matrix is [tokens, width]: its rows are the tokens
        values = (a_values[:, None] * b_values.clamp(min=0)).to(dtype)
        return Block(moments.names, "kronecker", len(a_values), None, b_vectors.to(dtype), values)
    a_values, a_vectors = torch.linalg.eigh(moments.entering.double())
    values = (b_values.clamp(min=0)[:, None] * a_values.clamp(min=0)).to(dtype)
    left, right = b_vectors.to(dtype), a_vectors.to(dtype)
    return Block(moments.names, "kronecker", len(left), left, right, values, moments.transposed)


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
    if isinstance(rows, FactoredRows):
        by_name = {layer.weight or layer.bias: layer for layer in rows.layers}
        for block, total in zip(blocks, totals, strict=True):
            layer = by_name[block.names[0]]
            ones = torch.ones_like(layer.entering[:, :1])
            entering = [layer.entering] if layer.weight else []
            entering += [ones] if layer.bias else []
            assert block.left is not None
            assert block.right is not None
            a = (torch.cat(entering, 1) @ block.right).square()
            total += (layer.delta @ block.left).square().sum(1).T @ a
    else:
        for piece in rows.pieces():
            parts = split(piece.dense().flatten(0, 1), rows.shapes)
            for k, (block, total) in enumerate(zip(blocks, totals, strict=True)):
                matrices = block.gather(parts)
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
