"""Real runs that leave out many instances at once, and what they say about each.

L single effects are weighed by far fewer runs than L when each run leaves out a random half (Hotelling, 1944;
datamodels, Ilyas et al., 2022): every run bears on every instance.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.dynamics.threads import even_parts, side_by_side
from fimo.further_training.chunk import Chunk
from fimo.further_training.protocol import Protocol
from fimo.further_training.replicas import Replica
from fimo.further_training.setting import Setting, worker_threads
from fimo.models.final_model import FinalModel

AT_ONCE = 0.1
"""Largest share of the training set that a group leaves out."""


def choose_groups(
    left_out: Tensor, instances: int, seeds: Sequence[int], runs: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Return about ``runs / S`` groups ``[K, G]`` of each seed, the same number for all.

    A seed's groups are the parts of random equal partitions, into halves where they leave out at most a
    tenth of the N instances.
    """
    parts = max(2, -(-len(left_out) // max(1, int(AT_ONCE * instances))))
    parts = min(parts, len(left_out))
    size = len(left_out) // parts
    each = max(parts, round(runs / len(seeds) / parts) * parts)
    found = {}
    for seed in seeds:
        orders = [torch.randperm(len(left_out), generator=generator) for _ in range(each // parts)]
        groups = torch.cat([order[: size * parts].view(parts, size) for order in orders])
        found[seed] = left_out[groups].sort(1).values
    return found


def run_groups(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    groups: Mapping[int, Tensor],
    at_once: int = 16,
) -> dict[int, Tensor]:
    """Run further training without each group, and return each seed's test losses ``[K, E, J]`` (float64).

    ``shift`` is replaced by ``mask``: without half the left-out instances, shifted batches would be others
    altogether, and their noise hides the effects.
    """
    if protocol.leave_out == "shift":
        protocol = replace(protocol, leave_out="mask")
    setting = Setting.build(final_model, train, test, protocol, train.targets.device)
    replicas = [Replica(seed, tuple(g)) for seed, rows in groups.items() for g in rows.tolist()]
    mixed = setting.engine == "linear"  # others share their dropout masks, which are a seed's own
    chunks: list[list[Replica]] = []
    for _, same in itertools.groupby(replicas, lambda r: None if mixed else r.seed):
        some = list(same)
        waiting = iter(some)
        chunks += [list(itertools.islice(waiting, size)) for size in even_parts(len(some), at_once)]

    def run(chunk: list[Replica]) -> Tensor:
        running, found = Chunk(setting, chunk), []
        for step in running.evaluation_steps:
            running.advance(step)
            found.append(running.evaluate()[0])
        return torch.stack(found, 1)

    losses: dict[int, list[Tensor]] = {seed: [] for seed in groups}
    for chunk, values in zip(chunks, side_by_side(run, chunks, worker_threads(setting)), strict=True):
        for replica, own in zip(chunk, values, strict=True):
            losses[replica.seed].append(own)
    return {seed: torch.stack(values) for seed, values in losses.items()}


@dataclass(frozen=True)
class Correction:
    """What group runs say about predicted effects, at one evaluation point.

    Args:
        scale: what predictions are multiplied with.
        remainder: ``[J, L]``, the rest of each instance's effect that the runs support.
        variance: ``[J, L]`` of the remainder, given the runs.
        correlation: of predicted with real effects of groups, over groups and test instances.
    """

    scale: float
    remainder: Tensor
    variance: Tensor
    correlation: float


SIZES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the variances of remainders that seeds share, and that they don't, relative to noise."""


def correct(
    member: Tensor, block: Tensor, real: Tensor, predicted: Tensor, weight: Tensor, seeds: int
) -> Correction:
    """Fit ``real = scale * predicted + member @ (z + z_seed) + noise`` within blocks.

    z are remainders that all seeds share, z_seed those of one seed's runs: normal with variances proportional
    to ``weight``, as the noise is with a constant one. The three have the largest marginal likelihood, so
    that where the response is right, or runs are noise, nothing is left. What is wanted is z plus the mean of
    z_seed over all seeds.

    Args:
        member: ``[K, L]``, 1 where a group holds an instance.
        block: ``[K]``, the seeds of groups; only differences within a seed count.
        real, predicted: ``[K, J]``, changes of test losses.
        weight: ``[L]``, relative prior variances of the instances' remainders.
        seeds: S, that the gold standard averages.
    """
    basis, owner = _within(block)
    y, p, x = basis @ real, basis @ predicted, basis @ member.double()
    unit = y.norm(dim=0).clamp(min=1e-300)  # each test instance counts alike
    y, p = y / unit, p / unit
    scale = float(((y * p).sum() / (p * p).sum().clamp(min=1e-300)).clamp(0, 2))
    correlation = float((y * p).sum() / (y.norm() * p.norm()).clamp(min=1e-300))
    rest = y - scale * p
    kernel = (x * weight) @ x.T
    kernel_scale = kernel.diagonal().mean().clamp(min=1e-300)
    weight, kernel = weight / kernel_scale, kernel / kernel_scale
    same = kernel * (owner[:, None] == owner)
    grid = torch.cartesian_prod(*[torch.tensor(SIZES, dtype=torch.float64)] * 2)  # [G, 2]
    covariance = grid[:, 0, None, None] * kernel + grid[:, 1, None, None] * same
    factor = torch.linalg.cholesky(covariance + torch.eye(len(kernel), dtype=torch.float64))
    white = torch.linalg.solve_triangular(factor, rest.expand(len(grid), -1, -1), upper=False)
    level = white.square().mean((1, 2))  # the noise's variance, given the ratios
    volume = factor.diagonal(dim1=1, dim2=2).log().sum(1)
    best = int((-volume - 0.5 * len(kernel) * level.clamp(min=1e-300).log()).argmax())
    common, own = grid[best].tolist()
    wanted = (common + own / seeds) * weight[:, None] * x.T  # [L, K'], covariance with what is seen
    remainder = wanted @ torch.cholesky_solve(rest, factor[best])
    explained = (wanted * torch.cholesky_solve(wanted.T, factor[best]).T).sum(1)
    variance = level[best] * ((common + own / seeds) * weight - explained).clamp(min=0)
    return Correction(scale, remainder.T * unit[:, None], variance * unit.square()[:, None], correlation)


def _within(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis ``[K', K]`` of the differences within blocks, and each row's block."""
    rows, owners = [], []
    for b in block.unique():
        members = (block == b).nonzero()[:, 0]
        k = len(members)
        # an orthonormal basis of the vectors whose sum is zero
        full = torch.linalg.qr(torch.eye(k, dtype=torch.float64)[:, : k - 1] - 1 / k)[0]
        embedded = torch.zeros(k - 1, len(block), dtype=torch.float64)
        embedded[:, members] = full.T
        rows.append(embedded)
        owners.append(b.expand(k - 1))
    return torch.cat(rows), torch.cat(owners)
