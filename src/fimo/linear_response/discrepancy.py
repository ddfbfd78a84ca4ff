"""What a few real leave-one-out runs add to predicted effects, smoothed over further training.

After long further training a real run differs from its prediction by three things: what the prediction misses
for every seed, which changes slowly (over times comparable to the amount of further training itself); what is
this seed's own; and noise that another epoch has already forgotten. So a single real run says much more about
its instance through its whole course than through the loss at one evaluation point.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.engine.threads import one_thread
from fimo.linear_response.linearity import FLOOR, GROWTH, GROWTH_OF_ALL
from fimo.linear_response.path_points import spread

SLOW = (0.3, 1.0, 3.0)
"""Candidates for the correlation time of what is wanted, relative to the amount of further training."""

FAST = (0.01, 0.03, 0.1, 0.3)
"""Candidates for the correlation time of what passes."""

PASSING = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Candidates for its variance, relative to that of what is wanted."""

NOISE = (0.01, 0.1, 0.3, 1.0, 3.0)
"""Candidates for the variance of noise without memory, in the same unit."""

USUAL = (1.0, 0.1, 0.3, 0.3)
"""Slow, fast, passing and noise where there are too few evaluation points to choose."""

OWN = 1.0
"""Lasting part of a remainder that is one seed's own, relative to what seeds share, where no instance has
runs of several seeds. On concrete with SGD and Adam it is 0.3 to 0.5, on smaller data more."""

PAIRS = 4
"""Pairs of runs of one instance that count as much as this prior."""

EARLIER = (0.3, 0.7)
"""Of the amount of further training at a point: when earlier predictions say something besides."""

LEAST, MOST = (0.0, -1.5, 0.0), (1.5, 1.5, 1.5)
"""Range of the factors of predictions, of earlier ones, and of what a seed's own differ by."""

COMMON = 30.0
"""How much rather an offset is thought to be that of all runs than one seed's."""

WINDOW = 96
"""Most evaluation points that bear on one."""

CHOOSING = 40
"""Most evaluation points by which the candidates are compared."""

ANCHORS = 12
"""Evaluation points at which the candidates are compared; others take the nearest one's."""


@dataclass(frozen=True)
class Correction:
    """What real runs say about predicted effects.

    Args:
        scale: ``[E]``, what predictions are multiplied with.
        past_scale: ``[E]``, what earlier ones are; see :func:`earlier`.
        own_scale: ``[E]``, what a seed's predictions minus the average over seeds are multiplied with.
        explained: ``[E, J, L]``, each instance's effect by these predictions.
        remainder: ``[E, J, L]``, the rest of it that the runs support; 0 without a run.
        variance: ``[E, J, L]``, of the effect's error.
        correlation: ``[E]``, see :func:`correlations`.
        unexplained: ``[E, L]``, share of what predictions miss that the runs leave unknown; 1 without one.
    """

    scale: Tensor
    past_scale: Tensor
    own_scale: Tensor
    explained: Tensor
    remainder: Tensor
    variance: Tensor
    correlation: Tensor
    unexplained: Tensor


def correct(
    steps: Sequence[int],
    real: Tensor,
    predicted: Tensor,
    average: Tensor,
    instance: Tensor,
    seed: Tensor,
    size: Tensor,
) -> Correction:
    """Fit real effects around each evaluation point:

        real = a · average + e · earlier + b · (predicted - average)
               + z_i + c_seed + z_{i,seed} + passing + noise.

    The score of an instance is a · average + e · earlier + z_i. Long after a run has left its linear
    response, predictions for about half that time (:func:`earlier`) agree with it better than later ones;
    b takes what the prediction knows of a seed alone out of its real runs. z_i is a Gaussian process over
    further training with a long correlation time, and what passes one with a short one, both in units of
    the amount of further training at the evaluation point; their parameters have the largest marginal
    likelihood. z_{i,seed} lasts as long as z_i, and only instances with runs of several seeds tell the
    two apart. An offset that a seed's runs share is that of its full run and says nothing about an
    instance. Effects are in units of their size for each test instance and evaluation point, and matter up
    to a constant over instances. As errors grow with effects, runs without instances of small effects say
    more about what all have in common: they weigh more in offsets, and in a, e and b (:func:`weights`).

    Args:
        steps: ``[E]``, at the evaluation points.
        real: ``[K, E, J]``, changes of test losses in K runs without an instance.
        predicted: ``[K, E, J]``, their predictions.
        average: ``[E, J, L]``, means over all seeds of predictions.
        instance: ``[K]``, its position among the L left-out ones.
        seed: ``[K]``.
        size: ``[L]``, mean squares of the instances' predicted effects.
    """
    time = torch.tensor(steps, dtype=torch.float64)
    weight = weights(size)[instance]
    real, predicted, average = (
        x.double() for x in (real.transpose(0, 1), predicted.transpose(0, 1), average)
    )
    of_run = average[:, :, instance].transpose(1, 2)  # [E, K, J], like real and predicted
    unit = _unit([real, of_run], seed)
    per_test = unit.transpose(1, 2)
    past = earlier(steps, average / per_test) * per_test
    effects = [real, of_run, past[:, :, instance].transpose(1, 2), predicted - of_run]
    products = _products(time, [x / unit for x in effects], seed, weight)
    # as if one more run had said 1
    prior = (products[:, 0, 0, None, None] / len(instance)).clamp(min=1e-30) * torch.eye(3).double()
    right = products[:, 1:, 0] + prior @ torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    scales = torch.linalg.solve(products[:, 1:, 1:] + prior, right).clamp(
        *(right.new_tensor(x) for x in (LEAST, MOST))
    )
    rest = (real - sum(s * x for s, x in zip(scales.T[..., None, None], effects[1:], strict=True))) / unit
    which, row = instance.unique(return_inverse=True)
    column = seed.unique(return_inverse=True)[1]
    to_instances, to_seeds = _two_way(row, column, weight)
    z = to_instances @ rest  # [E, L', J]
    with one_thread():  # many small solves
        found, variance, share = _smooth(time, z, rest - (to_seeds @ rest)[:, column], row, column)
    remainder = torch.zeros_like(average)
    unknown = z.square().mean((1, 2))[:, None, None].expand_as(remainder).clone()  # of those without a run
    remainder[:, :, which] = found.transpose(1, 2)
    unknown[:, :, which] = variance[:, None, :].expand(-1, z.shape[2], -1)
    unexplained = torch.ones(len(time), len(size), dtype=torch.float64)
    unexplained[:, which] = share
    scale, past_scale, own_scale = scales.T
    return Correction(
        scale,
        past_scale,
        own_scale,
        scale[:, None, None] * average + past_scale[:, None, None] * past,
        remainder * per_test,
        unknown * per_test.square(),
        _correlations(time, real, predicted, seed),
        unexplained,
    )


def weights(size: Tensor) -> Tensor:
    """Return the weights ``[L]`` of instances whose predicted effects have mean squares ``[L]``.

    One over the variance of what predictions usually miss, see :mod:`fimo.linear_response.linearity`.
    """
    relative = size.double() / size.double().mean().clamp(min=1e-300)
    relative = relative.where(relative.isfinite(), 1.0)  # of predictions that diverged
    return (relative + FLOOR**2) ** -(GROWTH + GROWTH_OF_ALL)


def earlier(steps: Sequence[int], predicted: Tensor) -> Tensor:
    """Return the mean ``[E, ...]`` of predictions over the middle of the time before each evaluation point.

    0 where there are none.
    """
    time = torch.tensor(steps, dtype=torch.float64)
    share = time / time[:, None]
    inside = ((share >= EARLIER[0]) & (share <= EARLIER[1])).to(predicted)
    mean: Tensor = inside / inside.sum(1, keepdim=True).clamp(min=1)
    return (mean @ predicted.flatten(1)).view_as(predicted)


def correlations(steps: Sequence[int], real: Tensor, predicted: Tensor, seed: Tensor) -> Tensor:
    """Return the correlation ``[E]`` of predicted with real effects around each evaluation point.

    Args:
        steps: ``[E]``.
        real, predicted, seed: see :func:`correct`.
    """
    time = torch.tensor(steps, dtype=torch.float64)
    return _correlations(time, real.double().transpose(0, 1), predicted.double().transpose(0, 1), seed)


def _correlations(time: Tensor, real: Tensor, predicted: Tensor, seed: Tensor) -> Tensor:
    unit = _unit([real, predicted], seed)
    found = _products(time, [real / unit, predicted / unit], seed, torch.ones(len(seed)).double())
    return found[:, 0, 1] / (found[:, 0, 0] * found[:, 1, 1]).sqrt().clamp(min=1e-300)


def _within(seed: Tensor, weight: Tensor) -> Tensor:
    """Return the map ``[K, K]`` that subtracts from runs the mean of their seed's."""
    share = (seed[:, None] == seed) * weight
    return torch.eye(len(seed), dtype=torch.float64) - share / share.sum(1, keepdim=True)


def _unit(effects: Sequence[Tensor], seed: Tensor) -> Tensor:
    """Return the size ``[E, 1, J]`` of differences within seeds of effects ``[E, K, J]``.

    Of several kinds, also where real effects vanish and predicted ones don't, as losses of sure classes do.
    """
    within = _within(seed, torch.ones(len(seed), dtype=torch.float64))
    unit = torch.stack([(within @ x).square().mean(1, keepdim=True) for x in effects]).mean(0).sqrt()
    return unit.maximum(1e-9 * unit.amax(2, keepdim=True)).clamp(min=1e-150)


def _products(time: Tensor, effects: Sequence[Tensor], seed: Tensor, weight: Tensor) -> Tensor:
    """Return all inner products ``[E, M, M]`` of M kinds of effects ``[E, K, J]``.

    Products are of weighted differences within seeds, summed over runs and test instances, and averaged over
    a tenth of the amount of further training.
    """
    within = weight.sqrt()[:, None] * _within(seed, weight)
    stacked = torch.stack([within @ x for x in effects], 1).flatten(2)  # [E, M, K·J]
    near = torch.exp(-(time[:, None] - time).abs() / (0.1 * time[:, None]))
    return torch.einsum("ef,fmn->emn", near, stacked @ stacked.transpose(1, 2))


def _smooth(
    time: Tensor, z: Tensor, runs: Tensor, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is wanted of the remainders ``[E, L', J]``, its error's variance ``[E, L']`` and share.

    Args:
        z: ``[E, L', J]``, of instances.
        runs: ``[E, K, J]``, of their runs.
        row: ``[K]``, the runs' instances among the L'.
        column: ``[K]``, their seeds.
    """
    found, variance = torch.zeros_like(z), torch.zeros(z.shape[:2], dtype=z.dtype)
    left = torch.ones_like(variance)
    counts = torch.bincount(row)
    groups = [(int(n), (counts == n).nonzero()[:, 0]) for n in counts.unique()]
    shared, pairs = _shared(runs, row, column)
    anchors = spread(time.tolist(), ANCHORS)
    chosen: dict[int, tuple[float, ...]] = {}
    squares = runs.square().mean((1, 2))
    weights = torch.zeros(len(groups), len(time), len(time), dtype=z.dtype)
    for e in range(len(time)):
        points = _window(time, e, WINDOW)
        lag = (time[points, None] - time[points]).abs() / time[e]
        anchor = min(anchors, key=lambda a: abs(float((time[a - 1] / time[e]).log())))
        if anchor not in chosen:
            chosen[anchor] = _likeliest(time, z, groups, anchor - 1)
        slow, fast, passing, noise = chosen[anchor]
        wanted = torch.exp(-lag / slow)
        other = passing * torch.exp(-lag / fast) + noise * torch.eye(len(points), dtype=z.dtype)
        at = int((points == e).nonzero())
        size = squares[points].mean() / (1 + passing + noise)
        share = float(shared[points].mean() / size) if size > 0 else 0.0  # sum over pairs
        share = min(max((share + PAIRS / (1 + OWN)) / (pairs + PAIRS), 0.0), 0.95)
        for (n, members), smoothing in zip(groups, weights, strict=True):
            own = n * share / (1 + (n - 1) * share) * torch.linalg.solve(wanted + other / n, wanted[at])
            smoothing[e, points] = own
            left[e, members] = (1 - own @ wanted[at]).clamp(min=0)
            variance[e, members] = size * left[e, members]
    for (_, members), smoothing in zip(groups, weights, strict=True):
        found[:, members] = (smoothing @ z[:, members].flatten(1)).view(len(time), len(members), -1)
    return found, variance, left


def _shared(runs: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, int]:
    """Return the sum ``[E]`` of products of what runs of an instance with two seeds have, and how many.

    Of two seeds' common instances, less each seed's mean over these: a product is one less than they are.
    Offsets as fitted would not do: that of a seed whose runs are all of instances that other seeds have as
    well is fitted to what these have, so that everything seems shared.

    Args:
        runs, row, column: see :func:`_smooth`.
    """
    total, number = torch.zeros(len(runs), dtype=runs.dtype), 0
    of_seed: dict[int, dict[int, int]] = {}
    for k, (i, s) in enumerate(zip(row.tolist(), column.tolist(), strict=True)):
        of_seed.setdefault(s, {})[i] = k
    for one, other in itertools.combinations(of_seed.values(), 2):
        common = sorted(one.keys() & other.keys())
        if len(common) < 2:
            continue
        a, b = (runs[:, [seed[i] for i in common]] for seed in (one, other))
        products = (a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))
        total += products.sum((1, 2)) / runs.shape[2]
        number += len(common) - 1
    return total, number


def _window(time: Tensor, e: int, most: int) -> Tensor:
    """Return the evaluation points between half and one and a half times an amount, the nearest densest."""
    inside = ((time >= 0.5 * time[e]) & (time <= 1.5 * time[e])).nonzero()[:, 0]
    if len(inside) <= most:
        return inside
    close = inside[(inside - e).abs() <= most // 6]
    thin = torch.linspace(0, len(inside) - 1, most - len(close), dtype=torch.float64).round().long()
    window: Tensor = torch.cat([close, inside[thin]]).unique()
    return window


def _likeliest(
    time: Tensor, z: Tensor, groups: list[tuple[int, Tensor]], e: int
) -> tuple[float, float, float, float]:
    """Return slow, fast, passing and noise of the largest marginal likelihood around an evaluation point."""
    points = _window(time, e, CHOOSING)
    if len(points) < 8:
        return USUAL
    candidates = [
        c
        for c in itertools.product(SLOW, FAST, PASSING, NOISE)
        if c[1] < c[0] and (c[2] > 0 or c[1] == FAST[0])
    ]
    slow, fast, passing, noise = torch.tensor(candidates, dtype=z.dtype).T[:, :, None, None]
    lag = (time[points, None] - time[points]).abs() / time[e]
    wanted = torch.exp(-lag / slow)
    other = passing * torch.exp(-lag / fast) + noise * torch.eye(len(points), dtype=z.dtype)
    square = torch.zeros(len(candidates), dtype=z.dtype)
    volume = torch.zeros(len(candidates), dtype=z.dtype)
    number = 0
    for n, members in groups:
        values = z[points][:, members].flatten(1)
        factor = torch.linalg.cholesky(wanted + other / n)
        moments = values @ values.T
        square += torch.cholesky_solve(moments.expand_as(factor), factor).diagonal(dim1=1, dim2=2).sum(1)
        volume += values.shape[1] * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        number += values.numel()
    return candidates[int((-volume - 0.5 * number * square.log()).argmax())]


def _two_way(row: Tensor, column: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted least-squares maps ``[L', K]`` and ``[S', K]`` of the layout value = z_row + c_column.

    z is of weighted mean zero, so that an instance of which much is missed does not move all others. Where
    seeds and others have no instance in common, as little as possible is taken for what tells their offsets
    apart.
    """
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    of_row = torch.zeros(rows, dtype=torch.float64).index_copy_(0, row, weight)
    usual = torch.cat([of_row.rsqrt(), torch.ones(columns + 1, dtype=torch.float64)])  # size of each unknown
    of_all = COMMON * torch.ones(len(row), 1)
    layout = torch.cat([torch.eye(rows)[row], torch.eye(columns)[column], of_all], 1).double()
    root = weight.sqrt()
    inverse = usual[:, None] * torch.linalg.pinv(root[:, None] * layout * usual) * root
    values, offsets, common = inverse.split([rows, columns, 1])
    middle = (of_row[:, None] * values).sum(0, keepdim=True) / of_row.sum()
    return values - middle, offsets + COMMON * common + middle
