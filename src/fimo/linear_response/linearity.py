"""The error of predictions that all seeds share, measured by a few real leave-one-out runs.

A prediction p_is for instance i along a seed s differs from the real change r_is by

    r_is - p_is = f_i d_i + c + c_s + n_is,

per test instance and evaluation point: d_i and c are what the prediction misses for every seed (its error
of linearity), in the instance alone and in all instances alike; c_s and n_is are what it misses of this seed.
A mean over seeds averages the latter away, but neither d nor c. Each checked instance runs with two seeds,
and groups of instances with seeds of their own, since the noise of one seed is one draw for all instances:

- the variance of f_i d_i is that of the mean over both seeds within groups, times the share of it that seeds
  have in common, by the correlation of the two. What a checked instance shows beyond what is usual for its
  size is f_i d_i's: seeds' noise is as usual;
- the variance of c is the mean product of different groups' offsets.

Errors grow with effects: f_i is a product of powers of the size of i's effect, of a factor for the test
instance, and, for checked instances, of one of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.engine.threads import one_thread
from fimo.linear_response.path_points import spread

GROWTH = 0.4
"""Power of the size of an instance's effect on a test instance with which errors grow,"""

GROWTH_OF_ALL = 0.3
"""and of the size of its effects on all test instances."""

FLOOR = 0.05
"""Of sizes, relative to their root mean square over instances."""

AVERAGE = 0.2
"""Share of an instance's mean squared size over test instances in each of its squared sizes."""

WINDOW = 0.3
"""Decay, in log(steps), of the weight of other evaluation points."""

ANCHORS = 40
"""Evaluation points at which variances are fitted; others take the nearest one's."""

NEAR = 5
"""Most evaluation points that bear on one."""

ALIKE = 4.0
"""Weight of the errors of a test instance, and of a checked one, in its own factor; others' weigh 1."""

GROUPS = 4
"""Most groups of instances, each with two seeds of its own."""

FEWEST = 4
"""Instances of a group: their common part must be told from their own."""


@dataclass(frozen=True)
class Discrepancy:
    """Variances of what predictions miss for every seed; NaN where they can't be told.

    Args:
        own: ``[E, J, L]``, of each left-out instance's own part.
        common: ``[E, J, 1]``, of the part that all left-out instances share.
        offset: ``[E, J, 1]``, of what was taken off or added to several instances' scores alike, for want of
            knowing better; nothing when None.
        gain: ``[E, 1, L]``, how much of it to each.
        noise: ``[E, 1, L]``, share of what an instance's two runs show that is their seeds' noise.
        doubt, common_doubt: ``[E, J, L]`` and ``[E, J, 1]``, standard errors of ``own`` and of ``common``,
            since that noise is not well known; none when None.
    """

    own: Tensor
    common: Tensor
    offset: Tensor | None = None
    gain: Tensor | None = None
    noise: Tensor | None = None
    doubt: Tensor | None = None
    common_doubt: Tensor | None = None

    def raw(self) -> Tensor:
        """Return the variance ``[E, J, L]`` of a score's error."""
        return self.own + self.common + self._of_offset(adjusted=False)

    def adjusted(self) -> Tensor:
        """Return it for scores minus their mean over left-out instances, where the common part cancels."""
        count = self.own.shape[-1]
        of_mean = self.own.mean(-1, keepdim=True) / count
        return self.own * (1 - 2 / count) + of_mean + self._of_offset(adjusted=True)

    def _of_offset(self, adjusted: bool) -> Tensor | float:
        if self.offset is None or self.gain is None:
            return 0.0
        gain = self.gain - self.gain.mean(-1, keepdim=True) if adjusted else self.gain
        return gain.square() * self.offset


def stratified(size: Tensor, count: int, largest: int = 1) -> tuple[Tensor, Tensor]:
    """Choose instances of all sizes: the largest ones, and those in the middle of strata of the others.

    Args:
        size: ``[L]``.
        count: M of them; all L if there are no more.
        largest: how many of the largest.

    Returns:
        their positions ``[M]``, the largest first, and how many instances each stands for ``[M]``.
    """
    order = size.argsort(descending=True, stable=True).cpu()
    total = len(order)
    if count >= total:
        return order, torch.ones(total, dtype=torch.float64)
    largest = min(largest, count)
    strata = count - largest
    width = (total - largest) / strata if strata else 0.0
    middles = [largest + int((k + 0.5) * width) for k in range(strata)]
    weights = torch.tensor([1.0] * largest + [width] * strata, dtype=torch.float64)
    return order[torch.tensor([*range(largest), *middles], dtype=torch.long)], weights


@dataclass(frozen=True)
class Checked:
    """M instances that real runs leave out.

    Args:
        instances: ``[M]``, their positions among the left-out ones.
        weight: ``[M]``, how many instances each stands for.
        group: ``[M]``; a group g's instances run with the seeds 2g and 2g + 1.
    """

    instances: Tensor
    weight: Tensor
    group: Tensor

    @property
    def runs(self) -> list[tuple[int, int]]:
        """``2 * M`` positions of instances and of seeds: all instances with one, then with the other."""
        group = self.group.tolist()
        return [(i, 2 * g + k) for k in range(2) for i, g in zip(self.instances.tolist(), group, strict=True)]

    @property
    def seeds(self) -> list[int]:
        """Those of any run."""
        return sorted({seed for _, seed in self.runs})

    def by_instance(self, effects: Tensor) -> Tensor:
        """Return effects ``[2 * M, E, J]`` of the runs as ``[2, E, J, M]``."""
        found: Tensor = effects.unflatten(0, (2, -1)).permute(0, 2, 3, 1)
        return found


def dealt(size: Tensor, count: int, seeds: int) -> Checked:
    """Choose instances of all sizes, and deal them to groups there and back.

    Args:
        size: ``[L]``.
        count: M.
        seeds: S that there are.
    """
    instances, weight = stratified(size, count)
    groups = max(1, min(GROUPS, seeds // 2, len(instances) // FEWEST))
    turn, place = (x(torch.arange(len(instances)), groups) for x in (torch.floor_divide, torch.remainder))
    return Checked(instances, weight, torch.where(turn % 2 == 0, place, groups - 1 - place))


def discrepancy(steps: Sequence[int], residual: Tensor, scores: Tensor, checked: Checked) -> Discrepancy:
    """Estimate the error of scores that seeds share.

    Variances are those of a normal distribution with as many errors within one and two standard deviations as
    there are, which is what an error bar promises; root mean squares would follow the few largest.

    Args:
        steps: ``[E]``, at the evaluation points.
        residual: ``[2, E, J, M]``, real minus predicted changes without the checked instances.
        scores: ``[E, J, L]``.
    """
    residual, scores = residual.double().cpu(), scores.double().cpu()
    of_entry, of_test = scores, scores[..., :1]
    found = [torch.full_like(x, torch.nan) for x in (of_entry, of_test, of_entry[:, :1], of_entry, of_test)]
    finite = residual.isfinite().flatten(2).all(2).all(0) & scores.isfinite().flatten(1).all(1)
    known = finite.nonzero()[:, 0]
    if len(known) and len(checked.instances) >= 3:
        time = torch.tensor(steps, dtype=torch.float64)[known]
        with one_thread():  # many small tensors
            fits = _fit(time, residual[:, known], scores[known], checked)
        for all_points, fitted in zip(found, fits, strict=True):
            all_points[known] = fitted
    own, common, noise, doubt, common_doubt = found
    return Discrepancy(own, common, noise=noise, doubt=doubt, common_doubt=common_doubt)


def _fit(time: Tensor, residual: Tensor, scores: Tensor, checked: Checked) -> tuple[Tensor, ...]:
    """Return own ``[E, J, L]``, common ``[E, J, 1]``, noise ``[E, 1, L]`` and both doubts."""
    instances = checked.instances
    mean = residual.mean(0)  # [E, J, M]
    unit = (scores.square().mean(2, keepdim=True) + mean.square().mean(2, keepdim=True)).sqrt()
    unit = unit.maximum(1e-9 * unit.amax(1, keepdim=True)).clamp(min=1e-150)
    square = (scores / unit).square()
    of_all = square.mean(1, keepdim=True)
    size = ((1 - AVERAGE) * square + AVERAGE * of_all + FLOOR**2) ** (GROWTH / 2)
    size = size * (of_all + FLOOR**2) ** (GROWTH_OF_ALL / 2)
    residual = residual / unit
    anchors = [k - 1 for k in spread(time.tolist(), ANCHORS)]
    own, doubt = torch.empty_like(scores), torch.empty_like(scores)
    common, common_doubt, noise = (
        torch.empty_like(unit),
        torch.empty_like(unit),
        torch.empty_like(scores[:, :1]),
    )
    fitted = {e: _fit_near(time, e, residual, size[:, :, instances], checked) for e in anchors}
    for e in range(len(time)):
        fit = fitted[min(anchors, key=lambda k: abs(float((time[k] / time[e]).log())))]
        usual = fit.total * (size[e] * fit.of_test[:, None] * unit[e]).square()
        of_instance = torch.ones_like(usual[:1])
        of_instance[:, instances] = fit.of_checked
        share = fit.share * of_instance.clamp(max=1) + (of_instance - 1).clamp(min=0)
        own[e], doubt[e] = share * usual, fit.doubt * of_instance.clamp(max=1) * usual
        noise[e] = 1 - share / of_instance
        common[e], common_doubt[e] = (x * unit[e].square() for x in (fit.common, fit.common_doubt))
    return own, common, noise, doubt, common_doubt


@dataclass(frozen=True)
class _Fit:
    """At an evaluation point, in units of an instance's size and of a test instance's.

    Args:
        total: variance of the mean over two seeds, but for c.
        share: of it that the seeds share, the variance of d.
        doubt: standard error of that share.
        common: variance of c.
        common_doubt: its standard error.
        of_test: ``[J]``, factor of errors.
        of_checked: ``[M]``, factor of total.
    """

    total: float
    share: float
    doubt: float
    common: float
    common_doubt: float
    of_test: Tensor
    of_checked: Tensor


def _fit_near(time: Tensor, e: int, residual: Tensor, size: Tensor, checked: Checked) -> _Fit:
    group = checked.group
    nearness = torch.exp(-(time / time[e]).log().abs() / WINDOW)
    points = (nearness > 0.02).nonzero()[:, 0]
    if len(points) > NEAR:
        thin = torch.linspace(0, len(points) - 1, NEAR, dtype=torch.float64).round().long()
        points = torch.cat([points[thin], torch.tensor([e])]).unique()
    residual, size = residual[:, points], size[points]  # [2, E', J, M], [E', J, M]
    weights = nearness[points, None, None] * checked.weight.expand_as(size)
    error = _standardised(residual, size, weights, group)[0].mean(0).abs()
    of_test = _own_factor(error, float(_mean(error, weights)), weights, (0, 2))
    size = size * of_test[:, None]
    z, offset, leak = _standardised(residual, size, weights, group)
    mean = z.mean(0)
    total = _scale(mean, weights) ** 2
    share, doubt = _shared_by_seeds(z, weights)
    common = _common(offset, total * share * leak, nearness[points, None])
    of_checked = _own_factor(mean.square(), total, weights, (0, 1))
    return _Fit(total, share, doubt, *common, of_test, of_checked)


def _standardised(
    residual: Tensor, size: Tensor, weights: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return residuals around their groups' offsets in units of ``size``, in shape.

    Also the offsets ``[2, E', J, G]``, and their variance by d alone, per variance of d.
    """
    of_group = torch.nn.functional.one_hot(group).double()  # [M, G]
    share = weights / size
    share = share / (share @ of_group @ of_group.T)
    offset = (residual * share) @ of_group
    leak = (share * size).square() @ of_group
    kept = (1 - 2 * share + (leak @ of_group.T) / size.square()).clamp(min=0.05).sqrt()
    return (residual - offset @ of_group.T) / size / kept, offset, leak


def _own_factor(error: Tensor, usual: float, weights: Tensor, others: tuple[int, int]) -> Tensor:
    """Return the mean error of each test or checked instance, relative to the usual, drawn towards 1."""
    of_each = (error * weights).sum(others) / weights.sum(others)
    return (1 + ALIKE * of_each / max(usual, 1e-300)) / (1 + ALIKE)


def _shared_by_seeds(z: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the share of the variance of the mean over two seeds that they share, and its standard error.

    By the correlation of the seeds' residuals, clipped at their scale, since those of single seeds have heavy
    tails; its error is the jackknife's over instances; and knowing that a share is from 0 to 1.

    Args:
        z: ``[2, E', J, M]``.
    """
    most = _scale(z, weights.expand_as(z))
    first, second = z.clamp(-most, most)
    sums = torch.stack([first * second, first.square(), second.square()])
    sums = (sums * weights).sum((1, 2))  # [3, M]
    total = sums.sum(1, keepdim=True)
    if not (total[1:] > 0).all():
        return 1.0, 0.0  # nothing is missed at all
    product, *squares = torch.cat([total, total - sums], 1)  # [1 + M], all and without each
    correlation = (product / (squares[0] * squares[1]).sqrt().clamp(min=1e-300)).clamp(-0.5, 1)
    share = 2 * correlation / (1 + correlation)
    without, count = share[1:], z.shape[3]
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return _within_0_and_1(float(share[0]), float(error))


def _within_0_and_1(estimate: float, error: float) -> tuple[float, float]:
    """Return mean and standard deviation of what lies there by a normal estimate."""
    values = torch.linspace(0, 1, 101, dtype=torch.float64)
    weights = (-((values - estimate) / max(error, 0.02)).square() / 2).softmax(0)
    mean = (weights * values).sum()
    return float(mean), float((weights * (values - mean).square()).sum().sqrt())


def _common(offset: Tensor, leak: Tensor, nearness: Tensor) -> tuple[float, float]:
    """Return the variance of what all instances share, and its standard error.

    By the mean product of different groups' offsets; its error is the jackknife's over groups. A single group
    shows the square beyond what its seeds' difference and d explain, with an error as large as both.

    Args:
        offset: ``[2, E', J, G]``.
        leak: ``[E', J, G]``, variance of offsets by d.
        nearness: ``[E', 1]``, weight.
    """

    def mean(values: Tensor) -> float:
        return float(_mean(values, nearness.expand_as(values)))

    both, count = offset.mean(0), offset.shape[3]
    if count == 1:
        square, noise = mean(both[..., 0].square()), mean((offset.diff(dim=0)[0] / 2).square()[..., 0])
        return max(0.0, square - noise - mean(leak[..., 0])), square + noise
    product = mean(_product(both))
    if count == 2:
        return max(0.0, product), mean(both.mean(2).square())
    without = torch.tensor([mean(_product(both[..., torch.arange(count) != g])) for g in range(count)])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return max(0.0, product), float(error)


def _product(offset: Tensor) -> Tensor:
    """Return the mean product ``[E', J]`` of the offsets ``[E', J, G]`` of different groups."""
    count = offset.shape[2]
    return (offset.sum(2).square() - offset.square().sum(2)) / (count * (count - 1))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()


def _scale(values: Tensor, weights: Tensor) -> float:
    """Return the standard deviation by the 68 % and the 95 % of values nearest to zero."""
    size, order = values.abs().flatten().sort()
    below = weights.flatten()[order].cumsum(0)
    one, two = (size[int((below < q * below[-1]).sum().clamp(max=len(size) - 1))] for q in (0.6827, 0.9545))
    return float(one + two / 2) / 2


def heavier_tails(freedom: float) -> float:
    """Return what a standard error from so many degrees of freedom must be widened by.

    Student's 68 % quantile divided by the normal one, which is 1 (expansion of Fisher and Cornish, 1960;
    below 0.1 % off from 2 degrees on). Two such errors hold a little less than 95 %: .91 with 4 degrees.
    """
    return 1 + 1 / (2 * freedom) + 1 / (4 * freedom**2) + 1 / (16 * freedom**3)
