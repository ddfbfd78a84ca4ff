"""Steps in which a sample of the training instances stands for all of them.

Where there are too many instances to follow all, the terms of a batch are taken apart. What leaving an
instance out removes or adds acts where and when it does, through the instance's own directions. What all runs
have in common, the curvature along their way, is that of draws from the sample instead of the batch's own
instances: the same on average over steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.linear_response.leave_out_weights import Step
from fimo.linear_response.output_space import OutputSpace, Sample

DRAWS = 64
"""Most draws from the sample at a step, else as many as a batch has instances: more gain nothing."""


def sampled(
    stream: Iterator[Step],
    space: OutputSpace,
    sample: Sample,
    seeds: Sequence[int],
    size: int,
    instances: int,
) -> Iterator[Step]:
    """Yield steps whose instances are positions among the followed ones.

    Args:
        stream: of all instances.
        seeds: S, by which is drawn.
        size: of a batch.
        instances: N.
    """
    left_out, device = sample.left_out.cpu(), space.kept.device
    place = torch.full((instances,), -1, dtype=torch.int64)
    place[left_out] = torch.arange(len(left_out))
    first = len(space.kept) - len(sample.kept)
    each = torch.arange(first // max(1, len(left_out)))  # directions of a left-out instance
    size = min(size, DRAWS, len(sample.kept))
    draws = [_draws(seed, len(sample.kept), size) for seed in seeds]
    weight = sample.weight.cpu()
    for step in stream:
        u, change, own = place[step.index], step.without - step.full[:, None] * _others(step), step.full
        width = int((u >= 0).sum(1).max())
        at = (u >= 0).to(torch.uint8).topk(width, 1).indices
        u = u.gather(1, at)
        change = change.gather(1, at[..., None].expand(-1, -1, change.shape[2])) * (u >= 0)[..., None]
        rows = (u.clamp(min=0)[..., None] * len(each) + each).flatten(1)
        drawn = torch.stack([next(d) for d in draws])  # [S, B]
        share = weight[drawn] / drawn.shape[1]
        every = torch.cat([change.repeat_interleave(len(each), 1), share[..., None] * _total(step)], 1)
        full = torch.cat([share.new_zeros(rows.shape), share * own.sum()], 1)
        index = torch.cat([rows, first + drawn], 1)
        yield replace(step, index=index.to(device), full=full.to(device), without=every.to(device))


def _draws(seed: int, count: int, size: int) -> Iterator[Tensor]:
    """Yield positions ``[size]`` of all ``count`` in random order, and again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


def _others(step: Step) -> Tensor:
    """Return what runs weigh an instance with that isn't left out, as a multiple of the full runs' weight.

    Returns:
        ``[S, 1, L]``.
    """
    most = step.full.max()
    return step.without.amax(1, keepdim=True) / most if most > 0 else torch.zeros_like(step.without[:, :1])


def _total(step: Step) -> Tensor:
    """Return ``[S, 1, L]``, the sum of a batch's weights had nothing been left out of it."""
    if step.full.max() > 0:
        return _others(step) * step.full.sum()
    return step.without.clamp(min=0).sum(1, keepdim=True)
