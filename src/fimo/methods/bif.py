"""The Bayesian influence function: covariances of losses around the final model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fimo.curvature.operators import GaussNewton
from fimo.curvature.solvers import extreme_eigenvalues
from fimo.data.instances import Instances
from fimo.engine.context import Setting
from fimo.engine.langevin import Langevin
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel
from fimo.models.train_mode import TrainMode
from fimo.scores import Scores

RANGE = 10.0
"""The largest curvature over the damping that ``beta: null`` chooses."""

SPREAD = 0.01
"""Of ``localisation: null``: a parameter's standard deviation where the loss is flat, relative to the
parameters' root mean square."""

SHARE = 0.5
"""Of ``step_size: null``: the step times the largest curvature of the potential; the covariance along that
direction is too large by the share SHARE / (4 - SHARE)."""


class BayesianInfluence(AttributionMethod):
    """Covariance of losses under the posterior localised at the final model (BIF; Kreer et al., 2025).

    (arXiv 2509.26544)

        score[j, i] = beta * Cov(loss_j(theta), loss_i(theta)),
        theta ~ exp(-N beta L(theta) - localisation / 2 * |theta - theta^f|^2)

    with L the mean training loss: the derivative of the expected loss of j in the weight of i's loss in the
    posterior, whose change from 1 to 0 leaves i out. It needs no curvature, sampled by chains of stochastic
    gradient Langevin dynamics (:class:`~fimo.engine.langevin.Langevin`). Where losses are quadratic with
    curvature H at a minimum and beta is large, it is the influence function g_j^T (H + damping I)^-1 g_i / N
    with damping = localisation / (N beta), so that it costs more and says the same; what it adds is what
    losses do beyond their second order, as far as the chains go. Its noise falls with the root of chains and
    draws, and is in the standard errors, which come from the chains.

    Args:
        beta: inverse temperature of an instance's loss; None for a damping of a tenth of the largest
            curvature.
        localisation: gamma; None lets a parameter vary by a hundredth of the parameters' root mean square
            where the loss is flat.
        step_size: epsilon; None for half of the inverse of the potential's largest curvature.
        chains: C, advanced together.
        burn_in: steps before the first draw.
        draws: of each chain.
        thinning: steps from one draw to the next.
        batch_size: training instances of a step; all of them when None. Batches have control variates (two
            gradients for each instance), and still are right only where chains stay near the final model: at
            a minimum, or with a small beta.
        seed: of batches and noise.
    """

    needs = "nothing else; second derivatives of operations where beta or step_size are not given"
    cost = "chains x (burn_in + draws x thinning) gradients of all training instances"
    use = "influence beyond the second order of the losses, for the price of many runs"

    def __init__(
        self,
        beta: float | None = None,
        localisation: float | None = None,
        step_size: float | None = None,
        chains: int = 16,
        burn_in: int = 100,
        draws: int = 50,
        thinning: int = 5,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        for key, number in (("beta", beta), ("localisation", localisation), ("step_size", step_size)):
            if number is not None and not number > 0:
                raise InputError(key, f"expected a positive number or null but got {number}")
        for key, value, least in (
            ("chains", chains, 2), ("burn_in", burn_in, 0), ("draws", draws, 1), ("thinning", thinning, 1),
            ("batch_size", 1 if batch_size is None else batch_size, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(key, f"expected at least {least} but got {value}")
        self.beta, self.localisation, self.step_size = beta, localisation, step_size
        self.chains, self.burn_in, self.draws, self.thinning = chains, burn_in, draws, thinning
        self.batch_size, self.seed = batch_size, seed

    @property
    def predicts_loss_change(self) -> bool:
        return True

    def scores(self, problem: AttributionProblem) -> Scores:
        model, train, test = problem.final_model, problem.train, problem.test
        dynamics, beta = self.dynamics(model, train)
        dtype = "float64" if problem.dtype == torch.float64 else "float32"
        protocol = Protocol(
            lr=dynamics.step_size, batch_size=dynamics.batch_size, steps=dynamics.steps,
            dtype=dtype, evaluation_dtype=dtype,
        )  # fmt: skip
        setting = Setting.build(model, train, test, protocol, train.targets.device)
        every = tuple(name for name, _ in model.network.named_modules(remove_duplicate=False))
        setting = replace(setting, mode=TrainMode(every))  # eval mode
        removed = problem.removed.to(dtype=problem.dtype)
        read = [(setting.test, model.measurement or model.loss), (removed, model.loss)]
        ours, theirs = dynamics.losses(setting, self.chains, read)
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            raise InputError("step_size", f"chains with steps of {dynamics.step_size:.3g} diverge")
        found = covariance(ours, theirs)
        values, sem, adjusted = (beta * x.to(test.targets.device, problem.dtype) for x in found)
        both = 1 if dynamics.batch_size == len(train) else 2
        note = (
            f"chains with beta {beta:.3g}, localisation {dynamics.localisation:.3g}, step_size "
            f"{dynamics.step_size:.3g}: a damping of {dynamics.localisation / dynamics.precision:.3g}"
        )
        return self.result(
            problem, values, sem=sem, sem_adjusted=adjusted, notes=(note,),
            gradient_evaluations=both * self.chains * dynamics.steps * protocol.batch_size,
        )  # fmt: skip

    def dynamics(self, final_model: FinalModel, train: Instances) -> tuple[Langevin, float]:
        """Return the dynamics, and beta, with what is not given chosen.

        Raises:
            InputError: nothing to choose by: all parameters, or the curvature, are zero.
        """
        n, localisation, beta, step = len(train), self.localisation, self.beta, self.step_size
        if localisation is None:
            squares = sum(float(p.double().square().sum()) for p in final_model.parameters().values())
            if not squares:
                raise InputError("localisation", "all parameters are zero: give a number")
            localisation = final_model.size / (SPREAD**2 * squares)
        largest = largest_curvature(final_model, train) if beta is None or step is None else 0.0
        if beta is None:
            if not largest > 0:
                raise InputError("beta", "the training loss has no curvature: give a number")
            beta = RANGE * localisation / (n * largest)
        if step is None:
            step = SHARE / (n * beta * largest + localisation)
        batch = min(self.batch_size or n, n)
        dynamics = Langevin(
            n * beta, localisation, step, self.burn_in, self.draws, self.thinning, batch, self.seed
        )
        return dynamics, beta


def largest_curvature(final_model: FinalModel, train: Instances) -> float:
    """Return about the largest eigenvalue of the mean training loss's Gauss-Newton matrix."""
    operator = GaussNewton(final_model, train)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(operator.p, 2, generator=generator, dtype=torch.float64)
    start = start.to(operator.device, operator.dtype)
    return extreme_eigenvalues(operator.times, start, most=40, least=10, smallest=False).upper


def covariance(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unbiased covariances ``[J, L]`` of losses, with standard errors, by independent chains.

    They are those between chains, averaged over draws: within a chain draws depend on one another, and all
    chains drift together from where they start, by more than they spread where beta is large.

    Args:
        ours, theirs: ``[C, T, J]`` and ``[C, T, L]``.

    Returns:
        The covariances; the standard errors of these, and of these minus their mean over L.
    """
    c, draws = ours.shape[:2]
    a, b = (x.double() - x.double().mean(0) for x in (ours, theirs))
    mean, squares = a.new_zeros(2, a.shape[2], b.shape[2]), a.new_zeros(2, a.shape[2], b.shape[2])
    for k in range(c):  # Welford's recursion
        own = a[k].T @ b[k] * (c / (c - 1) / draws)
        both = torch.stack([own, own - own.mean(1, keepdim=True)])
        apart = both - mean
        mean += apart / (k + 1)
        squares += apart * (both - mean)
    sem, adjusted = (squares / (c - 1) / c).sqrt()
    return mean[0], sem, adjusted
