"""Whether the final model is better than one that ignores its inputs."""

from __future__ import annotations

import torch

from fimo.checking.problem import Clock, Problem
from fimo.checking.verdict import Line, fails, passes, warns
from fimo.data.instances import Instances
from fimo.further_training.resolution import some
from fimo.models.final_model import FinalModel
from fimo.validation.poor import poor

MOST = 512
"""Instances of each part."""


def constant(problem: Problem, clock: Clock) -> Line:
    """Compare the final model's test loss with that of the best constant outputs."""
    name = "constant predictor"
    model, train, test = problem.final_model, some(problem.train, MOST), some(problem.test, MOST)
    own, best = model.losses(test).double().cpu(), constant_losses(model, train, test)
    ratio = float(own.mean() / best.mean())
    text = (
        f"mean test loss {own.mean():.4g}; of the best constant outputs {best.mean():.4g} "
        f"({len(test)} test instances)"
    )
    if (refused := poor(model, problem.train, problem.test)) is not None:
        return (warns if model.accept_poor else fails)(name, refused, ratio)
    worse = own - best
    error = float(worse.std() / len(test) ** 0.5) if len(test) > 1 else 0.0
    if worse.mean() > error:
        return warns(name, f"{text}: overfitted, or are test instances prepared in another way?", ratio)
    if ratio > 0.95:
        return warns(name, f"{text}: there is little that training instances could explain", ratio)
    return passes(name, text, ratio)


def constant_losses(model: FinalModel, train: Instances, test: Instances) -> torch.Tensor:
    """Return the test losses ``[J]`` of the outputs, the same for all, that have the least training loss."""
    shape = model.outputs(train[:1]).shape[1:]
    outputs = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=100, line_search_fn="strong_wolfe")
    wide = [part.to("cpu", torch.float64) for part in (train, test)]

    def loss(instances: Instances) -> torch.Tensor:
        expanded = outputs.expand(len(instances), *shape)
        return model.loss(expanded, instances.targets)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(wide[0]).mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return loss(wide[1])
