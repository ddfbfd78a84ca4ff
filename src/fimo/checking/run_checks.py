"""Checks by short real runs: the sign, determinism, rounding, linearity in an instance's weight, seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fimo.checking.partial import partial_effects
from fimo.checking.problem import (
    Clock,
    Problem,
    aligned_steps,
    changes,
    cosine,
    effects,
    steps_within,
)
from fimo.checking.verdict import Line, fails, passes, warns
from fimo.curvature.gradients import InstanceGradients
from fimo.engine.chunk import Chunk
from fimo.engine.pace import Pace, as_time
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.evaluation.ceiling import noise_ceiling, seeds_for
from fimo.further_training import further_train
from fimo.further_training.resolution import NEAR, remedy, rounding_noise
from fimo.further_training.sensitivity import adjust

WITHIN = 0.2
"""Relative difference up to which an effect counts as linear in the instance's weight."""

FOLLOWED = 0.9
"""Cosine of effects with their derivative, up to which methods that take derivatives can follow."""

CEILING = 0.9


def sign(problem: Problem, pace: Pace, clock: Clock) -> Line:
    """Compare one small real step without an instance with what its gradient says.

    A step of gradient descent whose batch lacks i's loss changes l_j by lr / B <g_j, g_i> (Grad-Dot) to first
    order; the step is taken in float64 and small, so that the two agree to several digits where gradients,
    loss and engine mean the same.
    """
    name = "sign"
    model = problem.final_model.to(problem.device, torch.float64)
    batch = min(problem.protocol.batch_size, len(problem.train))
    units = problem.affordable(pace, clock.left / 2, 8)
    test = problem.few_tests.to(problem.device, torch.float64)
    train = problem.train[[i for (i,) in units]].to(problem.device, torch.float64)
    engine = InstanceGradients(model, memory_mb=512)
    gram = engine.measurements(test).gram(engine.losses(train))[:, 0, :, 0]

    size = torch.cat([p.flatten() for p in model.parameters().values()]).norm()
    lr = float(1e-4 * size / engine.losses(train).squared_norms().mean().sqrt().clamp(min=1e-30))
    small = Protocol(
        lr=min(lr, 1e3), batch_size=batch, micro_batch_size=problem.protocol.micro_batch_size, steps=1,
        leave_out="mask",
    ).in_float64()  # fmt: skip
    setting = problem.wide.following(small)
    real, _ = effects(setting, problem.seeds[0], units, 1, clock)
    agreement = cosine(real, gram.cpu())
    text = (
        f"{real.numel()} real changes ({len(units)} left out, one small step): cosine {agreement:.5f} with "
        "Grad-Dot's"
    )
    if clock.left > 0:
        steps = min(problem.total_steps, 50)
        followed, taken = effects(problem.wide, problem.seeds[0], units, steps, clock)
        alike = cosine(adjust(followed), adjust(gram.cpu().double()))
        text += f"; after {taken} step(s) of the protocol, without the mean, {alike:.2f}"
    if not gram.any():
        return fails(
            name, "all gradients of the left-out or of the test instances are zero: no effect has a sign"
        )
    if math.isnan(agreement):
        return fails(name, f"{text}: nothing changes, or not by a finite amount", agreement)
    if agreement > 0.99:
        return passes(name, text, agreement)
    if setting.stochastic and agreement > 0.5:
        return warns(
            name, f"{text}; training steps draw random numbers (dropout), gradients don't", agreement
        )
    return fails(name, f"{text}: loss, gradients and training steps do not mean the same", agreement)


def determinism(problem: Problem, pace: Pace, clock: Clock) -> Line:
    """Make the same runs twice, and one at a time; evaluate the same instances twice."""
    name = "determinism"
    few = problem.few_tests
    model = problem.final_model
    one, two = model.losses(few), model.losses(few)
    if not torch.equal(one, two):
        size = float((one - two).abs().max() / one.abs().max())
        return fails(name, f"two evaluations of the same test instances differ by {size:.0e}: does forward "
                     "draw random numbers in eval mode?", size)  # fmt: skip
    units = problem.affordable(pace, clock.left, 4, runs=3, steps=1)
    most = min(problem.total_steps, 30)
    steps = steps_within(pace, 3 * (len(units) + 1), max(0.0, clock.left - 2), most)
    protocol = replace(problem.protocol, epochs=None, steps=steps, evaluate_every=steps)
    trainer = {"accelerator": "cpu" if problem.device.type == "cpu" else "gpu"}

    def raw(chunk: int | None) -> Tensor:
        return further_train(
            model, problem.train, few, protocol, problem.seeds[:1], units,
            chunk="auto" if chunk is None else chunk, trainer=trainer,
        ).raw  # fmt: skip

    first = raw(None)
    again, alone = raw(None), raw(1)
    scale = first.norm()
    twice, chunks = float((again - first).norm() / scale), float((alone - first).norm() / scale)
    text = f"{len(units) + 1} runs of {steps} step(s)"
    if not torch.isfinite(scale):
        return fails(name, f"{text} are not finite: lower further_training.lr?")
    if torch.equal(first, again) and torch.equal(first, alone):
        return passes(name, f"{text}: the same bytes twice, and one at a time", 0.0)
    worst = max(twice, chunks)
    again_text = f"made twice they differ by {twice:.0e} of the effects" if twice else "the same bytes twice"
    text += f": {again_text}, and one at a time they differ by {chunks:.0e} of the effects"
    if not worst < NEAR:
        return fails(name, f"{text}: do runs share state, or draw numbers that no seed controls?", worst)
    return warns(name, text, worst) if worst > 1e-3 or twice > 0 else passes(name, text, worst)


def rounding(problem: Problem, pace: Pace, clock: Clock) -> Line:
    """Compare effects of short runs in the protocol's numbers with the same in float64."""
    name = "rounding"
    protocol, seed = problem.protocol, problem.seeds[0]
    if protocol.dtype == protocol.evaluation_dtype == "float64":
        return passes(name, "runs and test losses are in float64", 0.0)
    units = problem.affordable(pace, clock.left, 4, steps=3)
    settings = [problem.setting, problem.wide]
    most = aligned_steps(settings[0], min(problem.total_steps, 500))
    chunks = [[Chunk(s, [Replica(seed)]), Chunk(s, [Replica(seed, u) for u in units])] for s in settings]
    step = 0
    while step < most and (clock.left > 0 or not step):
        step += 1
        for chunk in (c for pair in chunks for c in pair):
            chunk.advance(step)
    narrow, wide = (changes(full, without) for full, without in chunks)
    measured = float((narrow - wide).norm() / wide.norm())
    if not wide.any():
        return fails(name, f"nothing changes in {step} step(s), not even in float64: are all gradients zero?")
    noise = rounding_noise(problem.final_model, problem.test, protocol, [step])
    foretold = float(noise[0] / wide.square().mean().sqrt())
    numbers = protocol.autocast or protocol.dtype
    foretold_of = f" of {protocol.dtype}" if protocol.autocast else ""
    text = (
        f"after {step} step(s) effects are {float(wide.square().mean().sqrt()):.0e}; "
        f"{numbers} is off by {measured:.1g} of them (foretold{foretold_of}: {foretold:.1g})"
    )
    if not math.isfinite(measured):
        return fails(name, f"{text}: not finite, or nothing changes", measured)
    if measured >= 0.5:
        return fails(name, f"{text}: what is measured is rounding; {remedy(protocol)}", measured)
    return (
        warns(name, f"{text}: {remedy(protocol)}", measured)
        if measured >= NEAR
        else passes(name, text, measured)
    )


def linearity(problem: Problem, pace: Pace, clock: Clock) -> Line:
    """Remove instances in full, by half and by a quarter: a derivative can follow what is linear in that."""
    name = "linearity"
    units = problem.affordable(pace, clock.left, 6, runs=3, steps=4)
    setting = problem.wide
    share, agreement, step, until = math.nan, math.nan, 0, 0
    for step, found in partial_effects(setting, problem.seeds[0], units, problem.total_steps, clock):
        share, agreement = linear_share(found), derivative_agreement(found)
        if agreement >= FOLLOWED:
            until = step
    if math.isnan(share):
        return warns(name, "nothing changes in the steps that fit into the time")
    text = (
        f"after {step} of {problem.total_steps} steps {share:.0%} of effects are within {WITHIN:.0%} "
        f"of linear in the instance's weight (full, half and quarter removal); their derivative's cosine "
        f"with them is {agreement:.2f}"
    )
    if agreement >= FOLLOWED:
        return passes(name, text, agreement)
    where = f"{FOLLOWED} until step {until}" if until else f"nowhere {FOLLOWED}"
    return warns(name, f"{text} ({where}): no method that takes derivatives can follow beyond", agreement)


def linear_share(found: Tensor) -> float:
    """Return the share of effects that half and quarter removal foretell, of those that are not tiny.

    Args:
        found: ``[3, J, L]``, effects of removing 1, 1/2 and 1/4.
    """
    full, half, quarter = found
    counted = full.abs() > 0.1 * full.square().mean().sqrt()
    far = torch.maximum((2 * half - full).abs(), (4 * quarter - full).abs())
    good = (far <= WITHIN * full.abs()) & counted
    return float(good.sum() / counted.sum()) if counted.any() else math.nan


def derivative_agreement(found: Tensor) -> float:
    """Return the cosine of all effects with their derivatives at weight zero.

    A derivative is extrapolated from half and quarter removal, 2 (4 e_1/4) - 2 e_1/2 (Richardson).
    """
    full, half, quarter = found
    return cosine(full, 8 * quarter - 2 * half)


def reliability(problem: Problem, pace: Pace, clock: Clock) -> Line:
    """Foretell the noise ceiling of the planned seeds from a few."""
    name = "seeds"
    setting = problem.setting
    units = problem.units[:: max(1, len(problem.units) // 12)][:12]
    if len(problem.units) < 3:
        return warns(name, "too few instances are left out for an agreement across them")
    points = setting.protocol.evaluation_steps(len(problem.train), len(problem.train))
    cost = (len(units) + 1) * points[0] * pace.step
    tried = int(min(6, clock.left / cost)) // 2 * 2
    if tried < 2:
        return warns(name, "no time was left for two seeds until the first evaluation point, which take "
                     f"{as_time(2 * cost)}; begin with further_training.seeds=4")  # fmt: skip
    last = max(
        (e for e, step in enumerate(points) if tried * cost * step / points[0] < clock.left), default=0
    )
    short = replace(problem.protocol, epochs=None, steps=points[last], evaluate_every=points[last])
    raw = further_train(
        problem.final_model, problem.train, problem.few_tests, short, range(7_000, 7_000 + tried), units,
        trainer={"accelerator": "cpu" if problem.device.type == "cpu" else "gpu"},
    ).raw  # fmt: skip
    reached = float(noise_ceiling(raw, "cosine", problem.subtract_mean, [tried]))
    if not raw.any() or math.isnan(reached):
        return warns(name, "nothing changes, or not by a finite amount, so seeds can't be compared")
    planned, wanted = len(problem.seeds), seeds_for(reached, tried, CEILING)
    ceiling = ceiling_of(reached, tried, planned)
    text = (
        f"{planned} seeds give a ceiling of about {ceiling:.2f} after {points[last]} steps "
        f"(from {tried} seeds, {len(units)} left out); {CEILING} takes "
    )
    text += f"{wanted} seed{'s' * (wanted != 1)}" if wanted else "more than can be told"
    return passes(name, text, ceiling) if ceiling >= CEILING else warns(name, text, ceiling)


def ceiling_of(reached: float, tried: int, seeds: int) -> float:
    """Return the upper ceiling of so many seeds by Spearman and Brown's formula, from that of those tried."""
    ratio, reliability = seeds / tried, reached**2
    return math.sqrt(ratio * reliability / (1 + (ratio - 1) * reliability))
