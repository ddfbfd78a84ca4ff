"""Which directions of the training outputs are followed, and the loss's derivatives in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.errors import InputError
from fimo.models.loss_function import Loss

MAX_OUTPUTS = 512


@dataclass(frozen=True)
class OutputSpace:
    """R orthonormal directions in the outputs of each of the training instances that are followed.

    Args:
        kept: ``[M]``, the followed instances among all N.
        directions: ``[M, R, D]``.
    """

    kept: Tensor
    directions: Tensor

    @classmethod
    def choose(
        cls, loss: Loss, outputs: Tensor, targets: Tensor, needed: Tensor, max_rows: int
    ) -> OutputSpace:
        """Choose the directions in which the loss is curved or steep.

        All of them where N·R <= ``max_rows`` allows it: one for a scalar output, D - 1 for cross-entropy
        (which ignores a common shift of the logits), else D. If not, each instance's leading ones, and if
        even one each is too many, the instances with the largest curvature and gradient.

        Args:
            outputs: ``[K, N, ...]``, D values each, at K points of the trajectory.
            needed: instances that must be kept, since they are left out.
        """
        n, d = outputs.shape[1], outputs.shape[2:].numel()
        if d > MAX_OUTPUTS:
            raise InputError("method.response", f"expected at most {MAX_OUTPUTS} outputs but got {d}")
        rank = loss.rank(outputs.shape[2:])
        r = max(1, min(rank, max_rows // n))
        if r == d:
            eye = torch.eye(d, dtype=outputs.dtype, device=outputs.device)
            return cls(torch.arange(n, device=outputs.device), eye.expand(n, d, d))._within(
                max_rows, needed, lambda: _energy(loss, outputs, targets)
            )
        common = loss.common_directions(d)
        if common is not None and len(common) == r:
            return cls(torch.arange(n, device=outputs.device), common.to(outputs).expand(n, r, d))._within(
                max_rows, needed, lambda: _energy(loss, outputs, targets)
            )
        energy = _energy(loss, outputs, targets)
        vectors = torch.linalg.eigh(energy.double())[1][:, :, -r:].transpose(1, 2).to(outputs.dtype)
        return cls(torch.arange(n, device=outputs.device), vectors)._within(max_rows, needed, lambda: energy)

    def _within(self, max_rows: int, needed: Tensor, energy) -> OutputSpace:  # type: ignore[no-untyped-def]
        n, r, _ = self.directions.shape
        if n * r <= max_rows:
            return self
        weight = energy().diagonal(dim1=1, dim2=2).sum(1)
        weight[needed] = torch.inf
        most = max(max_rows // r, len(needed))
        kept = weight.topk(min(most, n)).indices.sort().values
        return OutputSpace(kept, self.directions[kept])

    def gradient(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's derivatives ``[M, R]`` along the directions, from outputs ``[N, ...]``."""
        found = loss.gradient(outputs[self.kept], targets[self.kept])
        return torch.einsum("nrd,nd->nr", self.directions, _flat(found))

    def hessian(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's second derivatives ``[M, R, R]`` between the directions."""
        return loss.hessian_between(outputs[self.kept], targets[self.kept], self.directions)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _energy(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``[N, D, D]``, the mean over points of H + g g^T."""
    d = outputs.shape[2:].numel()
    total = torch.zeros(outputs.shape[1], d, d).to(outputs)
    for at in outputs:
        g = _flat(loss.gradient(at, targets))
        total += loss.hessian(at, targets) + g[:, :, None] * g[:, None, :]
    return total / len(outputs)
