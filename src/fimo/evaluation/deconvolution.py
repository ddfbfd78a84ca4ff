"""How strong the signal is in each of many noisy vectors, seen through the noise of knowing it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = 1e-3, 1e8
"""Signal-to-noise ratios that are told from none, and from infinitely large ones."""

NODES = 120
"""Ratios, evenly spaced in their logarithm, on which distributions are tabulated."""

WIDTHS = (0.1, 0.3, 0.6, 1.0, 1.5, 2.2, 3.0)
"""Standard deviations of the ratio's logarithm over instances."""


def signal_strengths(ratio: Tensor, elements: Tensor | float, seeds: int) -> tuple[Tensor, Tensor]:
    r"""Return strengths lambda ``[G]`` of a signal, and each instance's probabilities of them ``[J, G]``.

    lambda_j: the squared length of instance j's signal over the variance of an element of its S seeds' mean.
    The ratio F_j of the seeds' mean square to the variance between seeds has a noncentral F distribution with
    n and n (S - 1) degrees of freedom and noncentrality lambda_j (here in Patnaik's approximation, 1949, by
    its first two moments). Over instances log lambda is taken as normal, with the mean and width of largest
    likelihood; the probabilities are each instance's posterior (parametric empirical Bayes; Morris, 1983).
    Where instances are alike the width is small and what is noise in each is averaged out; where they differ
    it is as large as they do.

    Args:
        ratio: F ``[J]``; instances where it is NaN have probabilities NaN.
        elements: n, as many independent elements as a vector's noise has.
        seeds: S.
    """
    ratio = ratio.double()
    known = ~ratio.isnan()
    observed = ratio[known].clamp(1e-6, HIGHEST)
    if not len(observed):
        return torch.zeros(1, dtype=torch.float64), torch.full(
            (len(ratio), 1), torch.nan, dtype=torch.float64
        )
    highest = math.log(3 * max(2.0, observed.max().item()))
    nodes = torch.linspace(math.log(LOWEST), highest, NODES, dtype=torch.float64)
    n = torch.as_tensor(elements, dtype=torch.float64)
    density = noncentral_f_log_density(observed[:, None], n, n * (seeds - 1), n * nodes.exp())
    likelihood = torch.exp(density - density.max(1, keepdim=True).values)
    widths = torch.tensor(WIDTHS, dtype=torch.float64)[:, None]
    priors = torch.softmax(-0.5 * ((nodes - nodes[::2, None, None]) / widths) ** 2, -1).flatten(0, 1)
    evidence = (likelihood @ priors.T).clamp(min=1e-300).log().sum(0)
    best = likelihood * priors[evidence.argmax()]
    posterior = torch.full((len(ratio), NODES), torch.nan, dtype=torch.float64)
    posterior[known] = best / best.sum(1, keepdim=True)
    return n * nodes.exp(), posterior


def noncentral_f_log_density(x: Tensor, first: Tensor, second: Tensor, noncentrality: Tensor) -> Tensor:
    """Return the log density at x of a noncentral F distribution, by Patnaik's central one."""
    scale = 1 + noncentrality / first
    own = (first + noncentrality) ** 2 / (first + 2 * noncentrality)
    x = x / scale
    beta = torch.lgamma(own / 2) + torch.lgamma(second / 2) - torch.lgamma((own + second) / 2)
    return (
        own / 2 * torch.log(own * x)
        + second / 2 * torch.log(second)
        - (own + second) / 2 * torch.log(own * x + second)
        - torch.log(x)
        - beta
        - torch.log(scale)
    )
