"""Which directions of the training outputs are followed, and the loss's derivatives in them."""

from __future__ import annotations

from collections.abc import Callable
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
        sample: that the last ones are, where there are too many to follow all; None: all are followed.
    """

    kept: Tensor
    directions: Tensor
    sample: Sample | None = None

    @classmethod
    def choose(
        cls, loss: Loss, outputs: Tensor, targets: Tensor, needed: Tensor, max_rows: int
    ) -> OutputSpace:
        """Choose the directions in which the loss is curved or steep.

        All of them where N·R <= ``max_rows`` allows it: one for a scalar output, D - 1 for cross-entropy
        (which ignores a common shift of the logits), else D. If not, each instance's leading ones. If even
        one each is too many, that of the instances with the largest curvature and gradient, where these hold
        nearly all of it; else those of the left-out instances and of a :class:`Sample` of all.

        Args:
            outputs: ``[K, N, ...]``, D values each, at K points of the trajectory.
            needed: instances that must be kept, since they are left out.
        """
        n, d = outputs.shape[1], outputs.shape[2:].numel()
        if d > MAX_OUTPUTS:
            raise InputError("method.response", f"expected at most {MAX_OUTPUTS} outputs but got {d}")
        rank = loss.rank(outputs.shape[2:])
        if n <= max_rows:
            every = torch.arange(n, device=outputs.device)
            return cls(every, _leading(loss, outputs, targets, max(1, min(rank, max_rows // n))))
        needed = needed.to(outputs.device)
        energy = _by_blocks(lambda *some: _energy(loss, *some), outputs, targets)
        first = energy.index_fill(0, needed, torch.inf).topk(max(max_rows, len(needed))).indices.sort().values
        if energy[first].sum() >= NEARLY_ALL * energy.sum():
            return cls(first, _leading(loss, outputs[:, first], targets[first], 1))
        r = max(1, min(rank, OWN_DIRECTIONS, max_rows // 2 // max(1, len(needed))))
        own = _leading(loss, outputs[:, needed], targets[needed], r).reshape(-1, 1, d)
        sample = Sample.draw(loss, outputs, targets, needed, max(1, max_rows // 2))
        kept = torch.cat([sample.left_out.repeat_interleave(r), sample.kept])
        return cls(kept, torch.cat([own, sample.directions]), sample)

    def gradient(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's derivatives ``[M, R]`` along the directions, from outputs ``[M, ...]``."""
        found = loss.gradient(outputs, targets)
        return torch.einsum("nrd,nd->nr", self.directions, _flat(found))

    def hessian(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's second derivatives ``[M, R, R]`` between the directions."""
        return loss.hessian_between(outputs, targets, self.directions)


@dataclass(frozen=True)
class Sample:
    """A sample of N instances, with one direction each, whose mean curvature is theirs.

    An instance is drawn with a probability in proportion to the trace of its loss's Hessian, or surely; of
    its Hessian's eigenvectors one, in proportion to the eigenvalues. Divided by these probabilities (Horvitz
    and Thompson, 1952) the sample's sums are unbiased for sums over all.

    Args:
        left_out: ``[U]``, instances whose own directions come before the sample's, R each.
        kept: ``[M]``, which are drawn.
        directions: ``[M, 1, D]``.
        weight: ``[M]``, what each stands for: its mean times something is that thing's mean over all N.
    """

    left_out: Tensor
    kept: Tensor
    directions: Tensor
    weight: Tensor

    @classmethod
    def draw(cls, loss: Loss, outputs: Tensor, targets: Tensor, left_out: Tensor, most: int) -> Sample:
        """Draw at most about ``most`` instances.

        Args:
            outputs: ``[K, N, ...]``, D values each, at K points of the trajectory.
        """
        generator = torch.Generator().manual_seed(0)
        n, rank = outputs.shape[1], loss.rank(outputs.shape[2:])
        trace = _by_blocks(lambda *some: _trace(_hessian(loss, *some)), outputs, targets).double().cpu().abs()
        chance = _inclusion(trace + FLOOR * trace.mean() + 1e-300, most)
        ends = chance.cumsum(0) + torch.rand((), generator=generator, dtype=torch.float64)
        drawn = (ends.floor() > (ends - chance).floor()).nonzero()[:, 0]
        kept, found, shares = drawn.to(outputs.device), [], []
        for some in kept.split(_block(outputs)):
            values, vectors = torch.linalg.eigh(_hessian(loss, outputs[:, some], targets[some]).double())
            size = values[:, -rank:].cpu().abs()
            size = size + FLOOR * size.mean(1, keepdim=True) + 1e-300
            share = size / size.sum(1, keepdim=True)
            chosen = torch.multinomial(share, 1, generator=generator)[:, 0]
            found.append(vectors[:, :, -rank:].transpose(1, 2)[torch.arange(len(some)), chosen][:, None])
            shares.append(share[torch.arange(len(some)), chosen])
        weight = len(drawn) / n / (chance[drawn] * torch.cat(shares))
        return cls(left_out, kept, torch.cat(found).to(outputs), weight.to(outputs))


NEARLY_ALL = 0.9
"""Of the curvature and gradients: a model that fits most of its training set has them in few instances."""

OWN_DIRECTIONS = 3
"""Most directions of a left-out instance beside a sample of all: the first is nearly its gradient."""

FLOOR = 0.1
"""Of the mean curvature, added to each one's for drawing: it may be larger elsewhere on the trajectory."""

AT_ONCE = 2**24
"""Elements of Hessians that are held at once."""


def _inclusion(size: Tensor, most: int) -> Tensor:
    """Return probabilities ``[N]`` in proportion to sizes, at most 1, that add up to ``most`` (at most N)."""
    sure = torch.zeros_like(size, dtype=torch.bool)
    while True:
        rest = torch.where(sure, 0.0, size)
        chance = rest * ((most - int(sure.sum())) / rest.sum().clamp(min=1e-300))
        if not (chance > 1).any():
            return torch.where(sure, 1.0, chance)
        sure |= chance > 1


def _leading(loss: Loss, outputs: Tensor, targets: Tensor, r: int) -> Tensor:
    """Return the R directions ``[n, R, D]`` of each instance in which its loss is most curved or steep."""
    n, d = outputs.shape[1], outputs.shape[2:].numel()
    if r == d:
        return torch.eye(d, dtype=outputs.dtype, device=outputs.device).expand(n, d, d)
    common = loss.common_directions(d)
    if common is not None and len(common) == r:
        return common.to(outputs).expand(n, r, d)
    gradient = _gradients(loss, outputs, targets)
    outer = torch.einsum("knd,kne->nde", gradient, gradient) / len(outputs)
    vectors: Tensor = torch.linalg.eigh((_hessian(loss, outputs, targets) + outer).double())[1]
    return vectors[:, :, -r:].transpose(1, 2).to(outputs.dtype)


def _block(outputs: Tensor) -> int:
    """Return how many instances' Hessians are held at once."""
    return max(1, AT_ONCE // outputs.shape[2:].numel() ** 2)


def _by_blocks(of: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a value of each instance ``[N]``, from outputs ``[K, N, ...]`` and targets of some at once."""
    places = torch.arange(outputs.shape[1], device=outputs.device).split(_block(outputs))
    return torch.cat([of(outputs[:, some], targets[some]) for some in places])


def _energy(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``[n]``, the mean over points of the Hessian's trace and the gradient's square."""
    squares = _gradients(loss, outputs, targets).square().sum(2).mean(0)
    return squares + _trace(_hessian(loss, outputs, targets))


def _trace(hessian: Tensor) -> Tensor:
    return hessian.diagonal(dim1=1, dim2=2).sum(1)


def _gradients(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``[K, n, D]``."""
    return torch.stack([_flat(loss.gradient(at, targets)) for at in outputs])


def _hessian(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``[n, D, D]``, the mean over points."""
    total = loss.hessian(outputs[0], targets)
    for at in outputs[1:]:
        total = total + loss.hessian(at, targets)
    return total / len(outputs)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
