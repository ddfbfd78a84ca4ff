"""Unlearning a test instance: which training instances' losses rise with its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fimo.engine.context import Setting
from fimo.engine.leave_out import Batch
from fimo.engine.objectives import run_on
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.mirrored import SIGNS, Direction
from fimo.models.final_model import FinalModel
from fimo.models.train_mode import TrainMode
from fimo.scores import Scores


class Unlearning(AttributionMethod):
    """Rise of training instances' losses as the final model unlearns a test instance.

    (Wang et al., 2024, arXiv 2406.09408; learning it instead is the forward passes of Ko et al., 2024, arXiv
    2402.08922)

        score[j, i] = (loss_i(after unlearning j) - loss_i(after learning j)) / (2 lr steps)

    where (un)learning is ``steps`` of gradient ascent (descent) on j's loss (or measurement) alone, in eval
    mode and float64. With a single small step it is Grad-Dot, and since nothing holds the network to its
    training set it departs from that as steps grow: ascent on an unbounded loss has no end. Wang et al. step
    along the inverse Fisher matrix, of which one small step is an influence function: see ``ekfac``.

    Args:
        steps: of gradient descent, all on the same test instance.
        lr: of a step.
        direction: ``both``; ``down`` compares unlearning with the final model, ``up`` the final model with
            learning.
    """

    needs = "nothing else"
    cost = "a few gradients of each test instance, and as many forward passes over all training instances"
    use = "a forward pass instead of a gradient for each training instance; what Grad-Dot says, or less"

    def __init__(self, steps: int = 1, lr: float = 0.001, direction: Direction = "both") -> None:
        if steps < 1:
            raise InputError("steps", f"expected at least 1 but got {steps}")
        if not lr > 0:
            raise InputError("lr", f"expected a positive number but got {lr}")
        if direction not in SIGNS:
            raise InputError("direction", f"expected one of {', '.join(SIGNS)} but got {direction!r}")
        self.steps, self.lr, self.direction = steps, lr, direction

    def scores(self, problem: AttributionProblem) -> Scores:
        count, (low, high) = len(problem.test), SIGNS[self.direction]
        runs = [(j, sign) for sign in (low, high) if sign for j in range(count)]
        setting = self._setting(problem)
        read = [(setting.test, problem.final_model.loss)]
        (losses,) = run_on(
            setting, 0, len(runs), lambda part: _alone(setting, runs, part), [self.steps], read
        )
        of_sign = dict(zip([s for s in (low, high) if s], losses[:, 0].split(count), strict=True))
        if 0 in (low, high):
            of_sign[0] = problem.final_model.to(dtype=losses.dtype).losses(setting.test).cpu()
        change = (of_sign[low] - of_sign[high]) / (self.lr * self.steps * (high - low))
        if not change.isfinite().all():
            raise InputError("lr", f"{self.steps} steps of {self.lr} diverge; smaller or fewer ones do not")
        return self.result(
            problem, change.to(problem.test.targets.device, problem.dtype),
            gradient_evaluations=len(runs) * self.steps,
        )  # fmt: skip

    def _setting(self, problem: AttributionProblem) -> Setting:
        """Return the setting of runs that descend on what is explained."""
        given = problem.final_model
        explained = given.measurement or given.loss
        model = FinalModel(given.network, explained, trainable=given.trainable, accept_poor=True)
        protocol = Protocol(lr=self.lr, batch_size=1, steps=self.steps, dtype="float64")
        setting = Setting.build(model, problem.test, problem.removed, protocol, problem.test.targets.device)
        every = tuple(name for name, _ in model.network.named_modules(remove_duplicate=False))
        return replace(setting, mode=TrainMode(every))  # eval mode


def _alone(setting: Setting, runs: list[tuple[int, int]], part: Tensor) -> Iterator[Batch]:
    """Yield the one test instance of each run, weighted 1 or -1, again and again."""
    mine = [runs[k] for k in part.tolist()]
    dtype = next(iter(setting.final_model.parameters().values())).dtype
    index = torch.tensor([[j] for j, _ in mine], device=setting.device)
    weight = torch.tensor([[sign] for _, sign in mine], dtype=dtype, device=setting.device)
    while True:
        yield Batch(index, weight)
