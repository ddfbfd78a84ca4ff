"""Whether the loss is one value for each instance, which depends on that instance alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.checking.problem import Clock, Problem
from fimo.checking.verdict import Line, fails, passes
from fimo.data.instances import Inputs, Instances
from fimo.models.final_model import FinalModel, apply
from fimo.models.train_mode import TrainMode, seeded

ROWS = 4


@torch.no_grad()
def losses(problem: Problem, clock: Clock) -> Line:
    """Try on a few instances that each has a loss of its own, in the modes in which runs use the network."""
    name = "loss"
    few = problem.train[: min(ROWS, len(problem.train))].to(problem.device)
    for training in (False, True):
        model = problem.final_model.to(problem.device)
        if training:
            TrainMode.of(model, few).set(model.network)
        values = _values(model, few)
        if values.shape != (len(few),):
            shape = tuple(values.shape)
            return fails(name, f"expected one loss for each of {len(few)} instances but got shape {shape}: "
                         "a mean or sum over the batch?")  # fmt: skip
        if not torch.equal(values, _values(model, few)):
            return fails(name, "the same instances have other losses when they are evaluated again: does "
                         "forward draw random numbers that no seed controls?")  # fmt: skip
        if not torch.isfinite(values).all():
            return fails(name, "losses are not finite")
        for row in range(len(few)):
            others = torch.arange(len(few)) != row
            moved = _values(model, _replaced(few, row, problem.train))
            far = (moved - values)[others].abs().max() / values.abs().max().clamp(min=1e-12)
            if far > 1e-4:
                mode = "training" if training else "evaluation"
                return fails(name, f"instance {row}'s neighbours' losses change with it (in {mode} mode, by "
                             f"{float(far):.0%}): does the network or the loss mix rows?")  # fmt: skip
    return passes(
        name,
        f"one value for each instance, which moves with its row alone ({len(few)} rows, both modes)",
    )


def _values(model: FinalModel, few: Instances) -> Tensor:
    with seeded(0, few.targets.device):
        return model.loss(apply(model.network, few.inputs), few.targets)


def _replaced(few: Instances, row: int, train: Instances) -> Instances:
    other = len(train) - 1 - row

    def put(tensor: Tensor, whole: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[row] = whole[other].to(tensor)
        return changed

    inputs: Inputs
    if isinstance(few.inputs, dict):
        assert isinstance(train.inputs, dict)
        inputs = {k: put(v, train.inputs[k]) for k, v in few.inputs.items()}
    else:
        assert isinstance(train.inputs, Tensor)
        inputs = put(few.inputs, train.inputs)
    return Instances(inputs, put(few.targets, train.targets))
