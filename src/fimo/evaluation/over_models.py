"""What several final models say together: where the variance comes from, and which method is better.

Everything here is of agreements that were measured on each of K final models alike: the same protocol, seeds,
left-out and test instances. Their mean and standard error over final models is
:func:`fimo.evaluation.metrics.mean_and_sem` of values ``[..., K]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtr
from torch import Tensor

from fimo.errors import InputError
from fimo.evaluation.metrics import MetricName, mean_and_sem
from fimo.evaluation.resampling import mean_agreements

ROUNDING = 1e-6
"""Differences of agreements in float32 that tell no method from another."""


@dataclass(frozen=True)
class SeedSpread:
    """One final model's agreement, and how much of it is due to its seeds of further training.

    Args:
        agreement: with the mean over all S seeds, ``[..., J]``.
        between_seeds: mean square between seeds, ``[...]``: J times the variance over seeds of their means
            over test instances; NaN with one seed.
        residual: mean square of what neither seeds nor test instances explain, ``[...]``.
        seeds: S.
    """

    agreement: Tensor
    between_seeds: Tensor
    residual: Tensor
    seeds: int

    @classmethod
    def of(cls, agreement: Tensor, without: Tensor) -> SeedSpread:
        """Return the spread by the jackknife over seeds (Tukey, 1958).

        Agreement is no mean over seeds, but a function a of the mean change over seeds. What seed s
        contributes to it is a + (S - 1) (mean over seeds of a without the seed, minus a without s): the
        seed's own value where a is a mean over seeds, else its pseudo-value, moved so that the mean over
        seeds is a itself. Mean squares are those of two crossed factors with one value each.

        Args:
            agreement: with the mean over all S seeds, ``[..., J]``; test instances where it is NaN don't
                count.
            without: agreement with the mean over all seeds but one, ``[S, ..., J]``, one for each.
        """
        seeds, agreement = len(without), agreement.double()
        if seeds < 2:
            unknown = torch.full(agreement.shape[:-1], torch.nan, dtype=agreement.dtype)
            return cls(agreement, unknown, unknown, 1)
        left = without.double()
        deviation = (seeds - 1) * (left.mean(0) - left)  # of each seed's contribution from the mean
        defined = agreement.isfinite() & deviation.isfinite().all(0)
        tests = defined.sum(-1)
        deviation = deviation.where(defined, 0.0)
        of_seed = deviation.sum(-1) / tests  # [S, ...]
        of_cell = (deviation - of_seed[..., None]).where(defined, 0.0)
        return cls(
            agreement,
            tests * of_seed.square().sum(0) / (seeds - 1),
            of_cell.square().sum((0, -1)) / ((seeds - 1) * (tests - 1)),
            seeds,
        )


def seed_spreads(
    scores: Mapping[str, Tensor],
    raw: Tensor,
    agreement: Mapping[str, Tensor],
    metric: MetricName,
    subtract_mean: bool = True,
) -> dict[str, SeedSpread]:
    """Return each method's spread on one final model.

    Args:
        scores: by method, as they are judged (:func:`fimo.evaluation.assessment.adjusted_scores`),
            ``[J, L]`` or ``[E, J, L]``.
        raw: ``[S, E, J, L]``.
        agreement: by method, with the mean over all seeds, ``[E, J]``.
    """
    seeds = len(raw)
    others = {s: [[one for one in range(seeds) if one != s]] for s in range(seeds) if seeds > 1}
    found = mean_agreements(scores, raw, others, metric, subtract_mean) if others else {}
    none = {name: values[None][:0] for name, values in agreement.items()}
    without = {name: torch.stack([found[s][name] for s in others]) for name in scores} if others else none
    return {name: SeedSpread.of(agreement[name], without[name]) for name in scores}


@dataclass(frozen=True)
class VarianceComponents:
    """Variances ``[...]`` of what one agreement, of one seed on one test instance, is the sum of.

    They are unbiased, so that one may be negative where the true one is small. With one seed, ``seeds`` and
    ``seeds_tests`` are NaN, and what comes from the seed is counted with its final model.

    Args:
        models: between final models.
        seeds: between seeds of further training of the same final model.
        tests: between test instances.
        models_tests: of a final model's own with each test instance.
        seeds_tests: of a seed's own with each test instance, and whatever else there is.
        mean: agreement, over everything.
        counts: K final models and S seeds.
        defined: test instances ``[...]`` whose agreement is defined with every final model.
    """

    models: Tensor
    seeds: Tensor
    tests: Tensor
    models_tests: Tensor
    seeds_tests: Tensor
    mean: Tensor
    counts: tuple[int, int]
    defined: Tensor

    @property
    def between_models(self) -> Tensor:
        """Variance ``[...]`` between final models of their mean over these test instances, without seeds'."""
        return self.models + self.models_tests / self.defined

    @property
    def between_seeds(self) -> Tensor:
        """Variance ``[...]`` between seeds of a final model of their mean over these test instances."""
        return self.seeds + self.seeds_tests / self.defined

    def of_mean(self) -> dict[str, Tensor]:
        """Return the variance ``[...]`` of the mean agreement, by what it comes from.

        ``models`` is :attr:`between_models` over K and ``seeds`` :attr:`between_seeds` over KS: together the
        squared standard error over final models, for these test instances. ``tests`` is what other test
        instances would add, their component over J. A negative estimate counts as zero.
        """
        models, seeds = self.counts
        return {
            "models": self.between_models.clamp(min=0.0) / models,
            "seeds": self.between_seeds.clamp(min=0.0) / (models * seeds),
            "tests": self.tests.clamp(min=0.0) / self.defined,
        }


def variance_components(spreads: Sequence[SeedSpread]) -> VarianceComponents:
    r"""Return the components of variance of an agreement by the analysis of variance.

    Seeds s belong to their final model m, test instances j are the same for all:

    .. math::
        a_{msj} = \mu + M_m + S_{s(m)} + J_j + (MJ)_{mj} + (SJ)_{s(m)j}

    all terms random and independent, with variances :math:`\sigma^2`. The estimators equate mean squares to
    their expectations (Cornfield and Tukey, 1956; the design is Brennan's, 2001, (s:m) x j). With
    :math:`V_M, V_J` the variances of the means by model and by test instance, :math:`V_{MJ}` the mean square
    of the interaction in the table of means over seeds, and :math:`Q_S, Q_{SJ}` the mean squares of
    :class:`SeedSpread`, averaged over final models:

    .. math::
        \sigma^2_{SJ} &= Q_{SJ} &\quad \sigma^2_S &= (Q_S - Q_{SJ}) / J \\
        \sigma^2_{MJ} &= V_{MJ} - \sigma^2_{SJ} / S &\quad \sigma^2_J &= V_J - V_{MJ} / K \\
        \sigma^2_M &= V_M - V_{MJ} / J - \sigma^2_S / S

    A data order that final models share, the seeds being the same, is not told apart: what of it moves all
    final models alike is missed.

    Args:
        spreads: of K final models.

    Raises:
        InputError: fewer than two, or of different numbers of seeds.

    Example:
        >>> first, second = torch.tensor([0.4, 0.6]), torch.tensor([0.5, 0.9])
        >>> one_seed = [SeedSpread.of(a, a[:0]) for a in (first, second)]
        >>> variance_components(one_seed).mean
        tensor(0.6000, dtype=torch.float64)
    """
    if len(spreads) < 2:
        raise InputError("model.seeds", f"components of variance take at least 2 but got {len(spreads)}")
    counts = {spread.seeds for spread in spreads}
    if len(counts) > 1:
        raise InputError("further_training.seeds", f"final models have {sorted(counts)} of them")
    models, seeds = len(spreads), counts.pop()
    table = torch.stack([spread.agreement for spread in spreads])  # [K, ..., J]
    defined = table.isfinite().all(0)
    tests = defined.sum(-1)

    def mean(values: Tensor) -> Tensor:
        return values.where(defined, 0.0).sum(-1) / tests

    between_seeds = torch.stack([spread.between_seeds for spread in spreads]).mean(0)
    own = torch.stack([spread.residual for spread in spreads]).mean(0)
    of_model, of_test = mean(table), table.mean(0)  # [K, ...], [..., J]
    overall = of_model.mean(0)
    alone = table - of_model[..., None] - (of_test - overall[..., None])
    v_models = of_model.var(0)
    v_tests = mean((of_test - overall[..., None]).square()) * tests / (tests - 1)
    v_cells = mean(alone.square().sum(0)) * tests / ((models - 1) * (tests - 1))
    by_seeds = (between_seeds - own) / tests
    per_cell, per_model = (own / seeds, by_seeds / seeds) if seeds > 1 else (torch.zeros(()),) * 2
    return VarianceComponents(
        models=v_models - v_cells / tests - per_model,
        seeds=by_seeds,
        tests=v_tests - v_cells / models,
        models_tests=v_cells - per_cell,
        seeds_tests=own,
        mean=overall,
        counts=(models, seeds),
        defined=tests,
    )


def probability_better(values: Tensor, on_another: bool = False) -> Tensor:
    r"""Return the probability that a method is better than another, from both on the same final models.

    The differences :math:`d_k` of two methods' values on K final models are taken as normal with unknown mean
    and variance, with the prior :math:`1/\sigma^2`. The posterior of their mean is then Student's t with
    K - 1 degrees of freedom around the mean difference, with its standard error as scale (Gelman et al.,
    *Bayesian Data Analysis*, 3.2), and the probability that it is positive is one minus the one-sided
    p-value of the paired t-test. So it is conditional on the test instances,
    and on final models that are drawn alike.

    Args:
        values: of M methods on K final models, ``[..., M, K]``; a final model for which one of two methods
            has none (NaN) does not count for the two.
        on_another: the probability that the method is better on *one* more final model, instead of on the
            average over all that there could be: the scale is :math:`\sqrt{K + 1}` times larger.

    Returns:
        ``[..., M, M]``: that the row's method beats the column's; 1/2 for methods that are the same on every
        final model, NaN where fewer than two final models have both.

    Example:
        >>> values = torch.tensor([[0.5, 0.6, 0.8], [0.4, 0.3, 0.6]])
        >>> probability_better(values)[0, 1]
        tensor(0.9629, dtype=torch.float64)
    """
    values = values.double()
    difference = values[..., :, None, :] - values[..., None, :, :]
    difference = difference.masked_fill(difference.abs() <= ROUNDING, 0.0)
    count = difference.isfinite().sum(-1)
    mean, sem = mean_and_sem(difference)
    if on_another:
        sem = sem * (count + 1).sqrt()
    t = torch.where((mean == 0) & (sem == 0), 0.0, mean / sem)
    return torch.from_numpy(stdtr((count - 1).double().numpy(), t.numpy())).masked_fill(count < 2, torch.nan)
