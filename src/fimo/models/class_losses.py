"""Losses of logits with class labels, of an instance or of each position of a sequence; and measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.data.instances import IGNORED
from fimo.models.loss_function import Loss, LossFunction

LOGITS = 2**26
"""Bytes of tokens' logits that are in memory at once where only what they make of what entered is needed."""

ALIGNED = 64
"""Each token's logits begin at a multiple of so many numbers: products are written half as fast otherwise."""


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy of logits ``[n, C]`` with class indices ``[n]``, per instance ``[n]``.

    Its Hessian is ``diag(p) - p p^T``.
    """

    name = "cross_entropy"
    targets = "classes"
    convex = True
    saturates = True
    draws = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _softmax_residual(outputs.detach(), targets, 1)

    def stacked_gradient(self, outputs: Tensor, targets: Tensor, weight: Tensor, out: Tensor) -> None:
        _softmax_residual(outputs, targets, 1, out).mul_(weight[:, None])

    def changed_gradient(
        self, outputs: Tensor, targets: Tensor, directions: Tensor, change: Tensor
    ) -> Tensor:
        if directions.shape[1:] != (1, 2):
            return super().changed_gradient(outputs, targets, directions, change)
        sign = directions[:, :, 0] - directions[:, :, 1]  # [n, 1]; a sigmoid of the margin
        margin = (outputs[:, :1] - outputs[:, 1:])[:, :, None] + sign[:, :, None] * change
        return sign[:, :, None] * (margin.sigmoid_() - (targets == 0).to(outputs.dtype)[:, None, None])

    def _flat_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _softmax_residual(outputs, targets[:, None], 2)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    def hessian_times(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        return _softmax_curved(outputs.softmax(-1)[:, None], vectors)

    def hessian_root(self, outputs: Tensor, targets: Tensor, tolerance: float = 1e-7) -> Tensor:
        if outputs.shape[1] != 2:
            return super().hessian_root(outputs, targets, tolerance)
        root = outputs.softmax(-1).prod(-1).sqrt()  # p_0 p_1 (1, -1)(1, -1)^T
        return torch.stack([root, -root], -1)[:, None]

    def rank(self, shape: torch.Size) -> int:
        return max(1, shape.numel() - 1)  # softmax ignores a common shift

    def common_directions(self, d: int) -> Tensor | None:
        return torch.tensor([[0.5**0.5, -(0.5**0.5)]], dtype=torch.float64) if d == 2 else None

    def sampled_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        p = outputs.softmax(-1)
        drawn = [torch.multinomial(p, 1, generator=generator)[:, 0] for _ in range(samples)]
        return torch.stack([self.gradient(outputs, y) for y in drawn], 1) / math.sqrt(samples)

    def scalar_output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return logit_margin(outputs, targets)

    def scalar_slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # loss = log(1 + exp(-f)), so dloss/df = -(1 - p)
        return -logit_margin(outputs, targets).neg().sigmoid()

    def best_constant(self, targets: Tensor, width: int) -> Tensor:
        return _log_shares(targets, width)


@dataclass(frozen=True)
class LanguageModelling(Loss):
    """Cross-entropy of each position's token, averaged over an instance's tokens.

    Of logits ``[n, T, V]``, where position t predicts ``targets[:, t]`` (the data set shifts them), and
    token indices ``[n, T]`` int64, -100 where there is nothing to predict: ``[n]``, 0 for an instance without
    tokens. So a batch's mean weighs instances alike, whatever their lengths.

    Args:
        total: the sum over an instance's tokens instead: a batch's mean weighs tokens alike.
    """

    total: bool = False
    targets = "tokens"
    convex = True
    saturates = True
    draws = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return losses.sum(1) if self.total else losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)

    @property
    def name(self) -> str:  # type: ignore[override]
        """In configurations and messages."""
        return "language_modelling_sum" if self.total else "language_modelling"

    def by_token(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        return losses.masked_fill(targets == IGNORED, torch.nan)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        residual = _softmax_residual(outputs.detach(), targets.clamp(min=0), 2)
        return residual.mul_(self._shares(targets, outputs.dtype)[:, :, None])

    def gradient_before(self, layer: nn.Linear, entering: Tensor, targets: Tensor) -> Tensor:
        """Return the gradients ``[n, T, d]`` in what enters a layer whose outputs are the logits.

        Logits of some tokens at a time are turned into their gradients in place. Positions that predict
        nothing are left out.

        Args:
            layer: whose weights are constants.
            entering: ``[n, T, d]``.
        """
        kept = targets != IGNORED
        found, into = torch.zeros_like(entering), torch.empty_like(entering[kept])
        weight = layer.weight.detach()
        for at, logits in _logits(layer, entering[kept]):
            logits[:, len(weight) :] = -torch.inf
            _softmax_residual(logits, targets[kept][at], 1, out=logits)
            torch.mm(logits[:, : len(weight)], weight, out=into[at])
        found[kept] = into.mul_(self._shares(targets, entering.dtype)[kept][:, None])
        return found

    def losses_before(self, layer: nn.Linear, entering: Tensor, targets: Tensor) -> Tensor:
        """Return the losses ``[n]`` by what enters a layer whose outputs are the logits, a few at a time."""
        kept = targets != IGNORED
        tokens, found = targets[kept], entering.new_zeros(targets.shape)
        losses = entering.new_empty(len(tokens))
        for at, logits in _logits(layer, entering[kept]):
            logits = logits[:, : layer.out_features]
            own = logits.gather(1, tokens[at, None])[:, 0]
            most = logits.amax(1)
            losses[at] = logits.sub_(most[:, None]).exp_().sum(1).log_().add_(most).sub_(own)
        found[kept] = losses
        return (found * self._shares(targets, entering.dtype)).sum(1)

    def _flat_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        by_token = outputs.view(*outputs.shape[:2], targets.shape[1], -1)  # [n, C, T, V]
        residual = _softmax_residual(by_token, targets.clamp(min=0)[:, None], 3)
        return residual.mul_(self._shares(targets, outputs.dtype)[:, None, :, None]).flatten(2)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        d = outputs.shape[1:].numel()
        eye = torch.eye(d, dtype=outputs.dtype, device=outputs.device)
        return self.hessian_times(outputs, targets, eye.expand(len(outputs), d, d))

    def hessian_times(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        by_token = vectors.view(*vectors.shape[:2], *outputs.shape[1:])  # [n, K, T, V]
        curved = _softmax_curved(outputs.softmax(-1)[:, None], by_token)
        return curved.mul_(self._shares(targets, outputs.dtype)[:, None, :, None]).flatten(2)

    def rank(self, shape: torch.Size) -> int:
        return shape[0] * max(1, shape[1] - 1)

    def sampled_gradients(
        self, outputs: Tensor, targets: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor:
        p, kept = outputs.flatten(0, 1).softmax(-1), targets != IGNORED
        # averaged over tokens, which are drawn independently: rescaled likewise to be the Hessian
        scale = 1 if self.total else kept.sum(1).clamp(min=1)[:, None, None] ** 0.5
        drawn = [torch.multinomial(p, 1, generator=generator).view(targets.shape) for _ in range(samples)]
        each = [self.gradient(outputs, torch.where(kept, y, IGNORED)) * scale for y in drawn]
        return torch.stack(each, 1) / math.sqrt(samples)

    def best_constant(self, targets: Tensor, width: int) -> Tensor:
        return _log_shares(targets, width)

    def _shares(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return each position's weight ``[n, T]`` in its instance's loss."""
        tokens = targets != IGNORED
        return tokens.to(dtype) if self.total else _token_shares(targets, dtype)


@dataclass(frozen=True)
class LogitMargin(Loss):
    """Log-odds of the correct class, ``log p / (1 - p)`` (Park et al., 2023): ``[n, C], [n] -> [n]``.

    Sequences ``[n, T, V], [n, T]`` are averaged over their tokens. It rises as the loss falls, so a training
    instance that helps has a negative score.
    """

    name = "logit_margin"
    targets = "labels"
    better = -1

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        def margin(logits: Tensor, correct: Tensor) -> Tensor:
            own = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, correct[..., None], True)
            others = logits.masked_fill(own, -torch.inf).logsumexp(-1)
            return logits.gather(-1, correct[..., None])[..., 0] - others

        return _over_tokens(margin, outputs, targets)


@dataclass(frozen=True)
class CorrectProbability(Loss):
    """Probability of the correct class: ``[n, C], [n] -> [n]``, or averaged over tokens, as in a margin."""

    name = "correct_probability"
    targets = "labels"
    better = -1

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        def probability(logits: Tensor, correct: Tensor) -> Tensor:
            return logits.softmax(-1).gather(-1, correct[..., None])[..., 0]

        return _over_tokens(probability, outputs, targets)


logit_margin = LogitMargin()


@torch.no_grad()
def _logits(layer: nn.Linear, entering: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a layer's outputs, to be written over, in a buffer of more columns.

    Args:
        entering: ``[N, d]``.
    """
    width = -(-layer.out_features // ALIGNED) * ALIGNED
    parts = max(1, math.ceil(len(entering) * width * entering.element_size() / LOGITS))
    most = max(1, math.ceil(len(entering) / parts))
    buffer = entering.new_empty(most, width)
    for start in range(0, len(entering), most):
        at = slice(start, min(start + most, len(entering)))
        rows = buffer[: at.stop - start]
        made = torch.mm(entering[at], layer.weight.T, out=rows[:, : layer.out_features])
        if layer.bias is not None:
            made += layer.bias
        yield at, rows


def _softmax_residual(logits: Tensor, classes: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """Return softmax along ``dim``, less one at the class; classes lack that axis and may be broadcast."""
    p = torch.softmax(logits, dim, out=out)
    shape = [1 if axis == dim else size for axis, size in enumerate(logits.shape)]
    at = classes.unsqueeze(dim).expand(shape)
    return p.scatter_add_(dim, at, p.new_full((), -1.0).expand(shape))


def _softmax_curved(p: Tensor, vectors: Tensor) -> Tensor:
    """Return ``(diag(p) - p p^T) v`` along the last axis."""
    curved = p * vectors
    return curved.sub_(p * curved.sum(-1, keepdim=True))


def _token_shares(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each position's share ``[n, T]`` of its instance's loss."""
    tokens = targets != IGNORED
    return tokens.to(dtype) / tokens.sum(1, keepdim=True).clamp(min=1)


def _log_shares(targets: Tensor, width: int) -> Tensor:
    """Return the logits of the classes' frequencies."""
    share = torch.bincount(targets[targets != IGNORED], minlength=width).double() + 1e-12
    return (share / share.sum()).log()


def _over_tokens(value: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return ``value`` per instance, averaged over the tokens of sequences; 0 without a label."""
    kept = targets != IGNORED
    values = torch.where(kept, value(outputs, targets.masked_fill(~kept, 0)), 0)
    return values if outputs.dim() == 2 else values.sum(1) / kept.sum(1).clamp(min=1)
