"""Checks of the final model alone: its loss, its gradients, which parameters move, how good it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.checking.problem import Clock, Problem
from fimo.checking.verdict import Line, fails, passes, warns
from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.errors import shortened
from fimo.further_training.resolution import some, unit_in_last_place
from fimo.models.final_model import FinalModel, fitting_batch, functional_apply
from fimo.models.losses import Loss

LARGE = 1_000_000
"""Parameters beyond which fewer gradients are compared."""


def gradients(problem: Problem, clock: Clock) -> Line:
    """Compare instances' gradients with central differences in float64, along random directions."""
    name = "gradients"
    model = problem.final_model.to(problem.device, torch.float64)
    large = model.size > LARGE
    count = 2 if large else 4
    sets = [
        (some(problem.train, count).to(problem.device, torch.float64), model.loss),
        (some(problem.test, count).to(problem.device, torch.float64), model.measurement or model.loss),
    ]
    directions = random_directions(model, 1 if large else 3)
    errors = []
    engine = InstanceGradients(model, memory_mb=256)
    for (instances, value), rows in zip(
        sets, (engine.losses(sets[0][0]), engine.measurements(sets[1][0])), strict=True
    ):
        flat = torch.stack([torch.cat([d.flatten() for d in one.values()]) for one in directions], 1)
        exact = rows.times(flat)[:, 0]
        scale = exact.square().mean(1, keepdim=True).sqrt() + 1e-12
        closest = torch.full_like(exact, torch.inf)
        for step in (1e-4, 1e-5, 1e-6):
            differences = torch.stack(
                [central_difference(model, instances, value, one, step) for one in directions], 1
            )
            closest = torch.minimum(closest, (differences - exact).abs() / scale)
            if clock.left < 0:
                break
        errors.append(closest.flatten())
    error = torch.cat(errors)
    typical, worst = float(error.median()), float(error.max())
    text = (
        f"{len(sets[0][0])} training and {len(sets[1][0])} test instances, {len(directions)} random "
        f"direction(s), float64: within {worst:.0e} of central differences"
    )
    if not typical < 1e-3:
        more = "; does forward draw random numbers, detach, or compute without gradients?"
        return fails(name, text + more, worst)
    if worst > 1e-3:
        return warns(name, f"{text} (median {typical:.0e}): a kink, or float32 inside the network?", worst)
    return passes(name, text, worst)


def random_directions(model: FinalModel, count: int) -> list[dict[str, Tensor]]:
    """Return random directions by parameter, each as large as the parameter typically is."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        one = {}
        for name, p in model.parameters().items():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
            one[name] = noise * (p.double().square().mean().sqrt() + 1e-2)
        found.append(one)
    return found


@torch.no_grad()
def central_difference(
    model: FinalModel, instances: Instances, value: Loss, direction: dict[str, Tensor], step: float
) -> Tensor:
    """Return ``(l(theta + h d) - l(theta - h d)) / 2 h`` of each instance ``[n]``."""

    def at(h: float) -> Tensor:
        moved = {name: p + h * direction[name] for name, p in model.parameters().items()}
        outputs = functional_apply(model.network, {**model.buffers(), **moved}, instances.inputs)
        return value(outputs, instances.targets)

    return (at(step) - at(-step)) / (2 * step)


def parameters(problem: Problem, clock: Clock) -> Line:
    """Count what is trainable, what receives a gradient, and what a float32 step would move."""
    name = "parameters"
    model = problem.final_model.to(problem.device)
    chosen = some(problem.train, 256).to(problem.device, next(iter(model.parameters().values())).dtype)
    size: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in model.parameters().items()}
    free = {n: p.clone().requires_grad_() for n, p in model.parameters().items()}
    generator, seen = torch.Generator().manual_seed(0), 0
    for batch in chosen.batches(min(fitting_batch(chosen), problem.protocol.batch_size)):
        with torch.enable_grad():
            outputs = functional_apply(model.network, {**model.buffers(), **free}, batch.inputs)
            losses = model.loss(outputs, batch.targets)
            # random weights, so that a sum of gradients is zero only where each is
            weights = torch.rand(len(losses), generator=generator).to(losses) + 0.5
            total = (losses * weights).sum()
            found = torch.autograd.grad(total, list(free.values()), allow_unused=True)
        for (n, _), g in zip(free.items(), found, strict=True):
            size[n] += 0 if g is None else g.abs() / len(losses)
        seen += len(losses)
        if clock.left < 0:
            break
    whole = sum(p.numel() for p in model.network.parameters())
    moving = sum(int((g > 0).sum()) for g in size.values())
    dead = [n for n, g in size.items() if not (g > 0).any()]
    share = moving / model.size
    text = (
        f"{model.size:,} of {whole:,} are trained; {share:.1%} of these get a gradient from {seen} instances"
    )
    if moving == 0:
        return fails(name, f"{text}: nothing would move", share)
    if dead:
        return warns(name, f"{text}; none reaches {shortened(dead)}", share)
    stuck = _stuck(problem, model, size)
    if stuck > 0.5 and problem.protocol.dtype == "float32":
        return warns(
            name,
            f"{text}, but a step is below float32's rounding for {stuck:.0%}: further_training.dtype=float64",
            share,
        )
    return (warns if share < 0.1 else passes)(name, text, share)


def _stuck(problem: Problem, model: FinalModel, size: dict[str, Tensor]) -> float:
    """Return the share of parameters that a typical step moves by less than half a unit in the last place."""
    stuck = 0
    for n, p in model.parameters().items():
        step = problem.protocol.update_rule.first_step(size[n], problem.protocol.lr)
        stuck += int(((step < unit_in_last_place(p.float()) / 2) & (size[n] > 0)).sum())
    return stuck / model.size
