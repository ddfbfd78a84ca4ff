"""What leaving an instance out does to the distribution of test losses over seeds, not only to their mean.

Training's randomness makes a test loss a random number, of which the seeds' runs are a sample; so an
instance may move its mean, its spread, or its form (distributional training data attribution; Mlodozeniec et
al., 2025, arXiv 2506.12965). All is read from runs that are there already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fimo.errors import InputError

BLOCK = 2**22
"""Numbers of a block of pairs: permutations times pairs."""

TIE = 1e-9
"""Statistics that differ by this share are equal: sums in another order."""


@dataclass(frozen=True)
class DistributionChange:
    """The distribution over seeds without an instance, compared with that of full runs; all ``[J, L]``.

    p-values are of paired permutations: under the hypothesis that leaving the instance out changes nothing,
    a seed's two losses may be exchanged. They are two-sided, and the least that they can be is 2 / 2^S.

    Args:
        mean, mean_p: mean change of the loss (the raw sensitivity), and its p-value.
        variance_full, variance_without, variance_p: variances over seeds (divided by S - 1), and the p-value
            of their difference. Both samples are centred first, so that a change of the mean is none of the
            variance.
        wasserstein, wasserstein_p: first Wasserstein distance of the two samples, in units of loss: the mean
            distance of losses of equal rank. It is above zero by the noise of S seeds alone, which its
            p-value takes into account.
    """

    mean: Tensor
    mean_p: Tensor
    variance_full: Tensor
    variance_without: Tensor
    variance_p: Tensor
    wasserstein: Tensor
    wasserstein_p: Tensor


def compared(full: Tensor, without: Tensor, permutations: int = 999, seed: int = 0) -> DistributionChange:
    """Compare losses of the same seeds' runs with and without instances.

    Args:
        full: ``[S, J]``, of the full runs.
        without: ``[S, J, L]``.
        permutations: random ones; all 2^S where these are no more.
        seed: of the permutations.

    Raises:
        InputError: fewer than two seeds.
    """
    s, j, left_out = without.shape
    if s < 2:
        raise InputError("seeds", f"a distribution over seeds needs at least 2 but got {s}")
    exchanged = _permutations(s, permutations, seed)
    a = full.double()[..., None].expand(s, j, left_out).reshape(s, -1)
    b = without.double().reshape(s, -1)
    size = max(1, BLOCK // (len(exchanged) + 2 * s))
    parts = [_compared(x, y, exchanged) for x, y in zip(a.split(size, 1), b.split(size, 1), strict=True)]
    found = {
        f.name: torch.cat([getattr(part, f.name) for part in parts]).view(j, left_out)
        for f in fields(DistributionChange)
    }
    return DistributionChange(**found)


def _permutations(seeds: int, most: int, seed: int) -> Tensor:
    """Return whether each permutation exchanges each seed's losses, ``[P, S]``; the first exchanges none."""
    if most < 1:
        raise InputError("permutations", f"expected at least 1 but got {most}")
    if seeds < 31 and 2**seeds <= most + 1:
        return (torch.arange(2**seeds)[:, None] >> torch.arange(seeds)) % 2 == 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (most, seeds), generator=generator) == 1
    return torch.cat([torch.zeros(1, seeds, dtype=torch.bool), drawn])


def _compared(a: Tensor, b: Tensor, exchanged: Tensor) -> DistributionChange:
    """Compare samples ``[S, K]`` of K pairs; all ``[K]``."""
    s = len(a)
    sign = 1 - 2 * exchanged.double()  # [P, S]
    mean_p = _share(sign @ (b - a) / s)
    x, y = a - a.mean(0), b - b.mean(0)
    # the squares of the first sample after an exchange; the rest of both sums is the second's. As both are
    # centred, their sums are opposite after an exchange, and what the means take off is equal
    squares = x.square().sum(0) + exchanged.double() @ (y.square() - x.square())
    both = x.square().sum(0) + y.square().sum(0)
    variance_p = _share((both - 2 * squares) / (s - 1))
    distances = torch.stack(list(_distances(a, b, sign)))
    return DistributionChange(
        (b - a).mean(0), mean_p, a.var(0), b.var(0), variance_p, distances[0], _share(distances)
    )


def _distances(a: Tensor, b: Tensor, sign: Tensor) -> Iterator[Tensor]:
    """Yield the Wasserstein distances ``[K]`` after each exchange.

    It is the integral of the distribution functions' distance, a sum over the gaps between the 2S ordered
    losses, whose order no exchange changes.
    """
    s = len(a)
    ordered, order = torch.cat([a, b]).sort(0)
    gaps = ordered.diff(dim=0)
    of_seed = order % s
    sample = torch.where(order < s, 1.0, -1.0).to(a)
    for own in sign:
        yield ((sample * own[of_seed]).cumsum(0)[:-1].abs() * gaps).sum(0) / s


def _share(statistic: Tensor) -> Tensor:
    """Return the share ``[K]`` of permutations ``[P, K]`` that are as extreme as the first, with itself."""
    size = statistic.abs()
    return (size >= (1 - TIE) * size[0]).double().mean(0)
