"""Covariances of losses over runs of further training with perturbed instance weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fimo.engine.context import Setting
from fimo.engine.leave_out import Batch
from fimo.engine.objectives import full_batches, run_on
from fimo.engine.protocol import DTYPES, Protocol
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.scores import Scores


class Daunce(AttributionMethod):
    """Covariance of a test and a training instance's losses over perturbed fine-tunings.

    (Daunce; Pan et al., 2025, arXiv 2505.23223)

        score[t, j, i] = (N / s^2) Cov_k(loss_j(theta_k), loss_i(theta_k))

    over K runs of the further training to step t, from the final model and with the same batches, in each of
    which every training instance's loss is weighted by 1 + s or 1 - s at random. For small s, near a minimum
    and with whole batches, it is g_j^T phi F phi g_i, with phi = (1 - (1 - lr H)^t) H^-1 what further
    training makes of a constant gradient and F = mean_i g_i g_i^T. Where F is like the curvature H, as for a
    well-specified likelihood, that is influence after long further training up to a factor; residuals that
    F weights otherwise turn it away from that. It is a ranking, not a change of loss.

    Args:
        runs: K.
        strength: s, between 0 and 1.
        seed: of the weights' signs. The data order is that of the first followed seed.
    """

    needs = "the protocol of further training"
    cost = "as many full runs as `runs`, whatever the number of test and left-out instances"
    use = "all test and training instances at once from a fixed number of runs; noisy with few"

    def __init__(self, runs: int = 64, strength: float = 0.5, seed: int = 0) -> None:
        if runs < 3:
            raise InputError("runs", f"expected at least 3 but got {runs}")
        if not 0 < strength <= 1:
            raise InputError("strength", f"expected a number above 0, at most 1, but got {strength}")
        self.runs, self.strength, self.seed = runs, strength, seed

    @property
    def follows_further_training(self) -> bool:
        return True

    def unfollowable(self, protocol: Protocol) -> str | None:
        return None  # steps are made, not differentiated

    def scores(self, problem: AttributionProblem) -> Scores:
        given, model, n = problem.followed, problem.final_model, len(problem.train)
        # a number of steps, as runs have batches of their own
        protocol = replace(given.protocol, epochs=None, steps=given.protocol.total_steps(n))
        device = problem.train.targets.device
        setting = Setting.build(model, problem.train, problem.test, protocol, device)
        signs, dtype = signs_of(self.runs, n, self.seed), DTYPES[protocol.dtype]
        weights = (1 + self.strength * signs).to(device, dtype)

        def batches(part: Tensor) -> Iterator[Batch]:
            mine = weights[part.to(device)]
            for batch in full_batches(protocol, n, given.seeds[0], dtype, device):
                yield Batch(batch.index, batch.weight * mine[:, batch.index[0]])

        removed = problem.removed.to(dtype=DTYPES[protocol.evaluation_dtype])
        read = [(setting.test, model.measurement or model.loss), (removed, model.loss)]
        ours, theirs = run_on(setting, given.seeds[0], self.runs, batches, given.steps, read)
        points = [covariance(a, b) for a, b in zip(ours.unbind(1), theirs.unbind(1), strict=True)]
        scale = n / self.strength**2
        values, sem, adjusted = (
            scale * torch.stack(part).to(device, problem.dtype) for part in zip(*points, strict=True)
        )
        return self.result(
            problem, values, sem=sem, sem_adjusted=adjusted,
            gradient_evaluations=self.runs * problem.run_gradients,
        )  # fmt: skip


def signs_of(runs: int, instances: int, seed: int) -> Tensor:
    """Return random signs ``[K, N]`` (float64); those of a run do not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (runs, instances), generator=generator, dtype=torch.float64) - 1


def covariance(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return covariances ``[J, L]`` over independent runs, with standard errors.

    Args:
        ours, theirs: ``[K, J]`` and ``[K, L]``.

    Returns:
        The covariances; the standard errors of these, and of these minus their mean over L.
    """
    k = len(ours)
    a, b = ours - ours.mean(0), theirs - theirs.mean(0)
    values, errors = [], []
    for each in (b, b - b.mean(1, keepdim=True)):
        mean = a.T @ each / k  # of the runs' products of deviations
        variance = (a.square().T @ each.square() / k - mean.square()).clamp(min=0) / (k - 1)
        values.append(mean * k / (k - 1))
        errors.append(variance.sqrt() * k / (k - 1))
    return values[0], errors[0], errors[1]
