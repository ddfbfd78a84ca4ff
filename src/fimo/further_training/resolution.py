r"""How finely the runs' floating-point numbers resolve what leaving an instance out changes.

Each optimizer step rounds every parameter to a multiple of its unit in the last place u. Two runs that differ
round independently, so after T steps the difference of their test losses carries noise of variance

.. math::
    \sigma_j^2 = \frac{T}{6} \, \lVert g_j \circ u \rVert^2

with g_j the gradient of test instance j's loss at the final model (a rounding error is uniform in ±u/2, of
variance u²/12, and there are two runs). Rounding of gradients and activations is small beside it. On small
networks the measured difference of float32 and float64 runs is within a factor of two of it, for SGD and
Adam, learning rates over three decades, and 3 to 40 steps. It is a lower bound: what further training
amplifies is not in it. In 200 steps of Adam at a learning rate of 0.1 a small network made half of its
effects from rounding, where 5e-9 of them was foretold.

So a few of the runs are repeated in float64, at most a fiftieth of all by steps, and the changes that they
give are compared with those that were measured: that is the noise itself, on these runs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.replicas import Replica, Unit
from fimo.further_training.sensitivity import Sensitivity
from fimo.models.final_model import FinalModel, fitting_batch, functional_apply
from fimo.validation import choices

log = logging.getLogger(__name__)

REPEATED = 0.02
"""Share of a gold standard's replica-steps, float64's counted twice, that repeating some of its runs may
take. They are too few for all workers, and a convolution in float64 may take four times as long."""

MOST_REPEATED = 16
"""Runs that are repeated."""

NEAR = 0.05
"""Share of the effects that rounding makes up, from which on a run warns."""

MOST = 256
"""Test instances that the estimate is made on, evenly spaced."""


def rounding_noise(
    final_model: FinalModel, test: Instances, protocol: Protocol, steps: Sequence[int], probes: int = 4
) -> Tensor:
    """Return the raw change ``[E]`` that rounding alone would make, as root mean square over test instances.

    Args:
        test: whose losses (or measurements) are compared; a subset is taken where there are many.
        steps: ``[E]``, optimizer steps of the full run at evaluation points.
        probes: random signs, whose mean replaces one backward pass for each test instance.
    """
    wide, device = DTYPES[protocol.evaluation_dtype], next(iter(final_model.parameters().values())).device
    chosen = some(test, MOST).to(device, wide)
    squared, losses = _one_step(final_model.to(dtype=wide), chosen, DTYPES[protocol.dtype], probes)
    evaluation = (torch.finfo(DTYPES[protocol.evaluation_dtype]).eps * losses) ** 2 / 6
    return (torch.tensor(list(steps), dtype=torch.float64) * squared / 6 + evaluation).sqrt()


def repeats(runs: int) -> int:
    """Return how many of so many runs may be repeated, each at twice its cost, beside their full run."""
    return max(0, min(MOST_REPEATED, int(REPEATED * runs / 2) - 1))


def measured_noise(sensitivity: Sensitivity, wide: Setting, units: Sequence[Unit], most: int) -> Tensor:
    """Return how far raw changes ``[E]`` are from those of float64, as root mean square over a few runs.

    Args:
        sensitivity: as it was measured, with its raw changes; its first seed's runs are repeated.
        wide: the setting of the same runs and test instances in float64.
        units: ``[L]`` that were left out.
        most: runs to repeat, beside the full run; evenly spaced, and at most a chunk of them.
    """
    seed, count = int(sensitivity.seeds[0]), min(most, len(units), chunk_size(wide, most))
    columns = choices.spaced(count, len(units))
    full = losses(wide, [Replica(seed)])  # [E, 1, J]
    without = full.new_empty(len(full), count, full.shape[2])
    widths = [wide.rule.width(units[k]) for k in columns]
    for width in sorted(set(widths)):  # groups of other sizes take other steps
        together = [c for c, w in enumerate(widths) if w == width]
        without[:, together] = losses(wide, [Replica(seed, units[columns[c]]) for c in together])
    narrow = sensitivity.raw[0][:, :, columns].double().transpose(1, 2)
    return (narrow - (without - full)).square().flatten(1).nanmean(1).sqrt()


def losses(setting: Setting, replicas: Sequence[Replica]) -> Tensor:
    """Return the test losses ``[E, R, J]`` of runs that are made together, which leave out as many instances.

    Nothing is read from the store, and nothing kept.
    """
    chunk, found = Chunk(setting, replicas), []
    for step in chunk.evaluation_steps:
        chunk.advance(step)
        found.append(chunk.evaluate()[0])
    return torch.stack(found)


def rounding_share(
    sensitivity: Sensitivity,
    final_model: FinalModel,
    test: Instances,
    protocol: Protocol,
    measured: Tensor | None = None,
) -> Tensor:
    """Return rounding noise as a share of the sensitivity ``[E]``, both as root mean squares over ``[J, L]``.

    Seeds' noise is independent, so the mean over S of them has 1/sqrt(S) of it. NaN where nothing is finite.

    Args:
        measured: ``[E]``, see :func:`measured_noise`; what is foretold is a lower bound of it.
    """
    noise = rounding_noise(final_model, test, protocol, sensitivity.step.tolist())
    if measured is not None:
        noise = torch.fmax(noise, measured.to(noise))
    effects = sensitivity.sensitivity.double().square().flatten(1).nanmean(1).sqrt()
    return noise / math.sqrt(len(sensitivity.seeds)) / effects


def warn_of_rounding(
    sensitivity: Sensitivity,
    final_model: FinalModel,
    test: Instances,
    protocol: Protocol,
    measured: Tensor | None = None,
) -> None:
    """Warn where the measured effects are near the resolution of the runs' numbers."""
    if not sensitivity.sensitivity.any():
        return  # nothing was changed, which is not for rounding to explain
    share = rounding_share(sensitivity, final_model, test, protocol, measured).nan_to_num(0.0)
    worst = int(share.argmax())
    if share[worst] >= NEAR:
        step = int(sensitivity.step[worst])
        log.warning("%s", rounding_text(float(share[worst]), step, protocol, measured is not None))


def rounding_text(share: float, step: int, protocol: Protocol, measured: bool) -> str:
    """Return in one line what rounding does to the effects at a step, and what helps."""
    what = "most" if share >= 1 else f"about {share:.0%}"
    how = "measured on some runs" if measured else "at least: foretold, without what training amplifies"
    helps = remedy(protocol)
    return f"rounding makes up {what} of the effects at step {step} ({how}){helps and ': ' + helps}"


def remedy(protocol: Protocol) -> str:
    """Return the setting that makes rounding smaller, or nothing."""
    if protocol.autocast is not None:
        return "further_training.autocast=null"
    if protocol.dtype != "float64":
        return "further_training.dtype=float64"
    return "further_training.evaluation_dtype=float64" if protocol.evaluation_dtype != "float64" else ""


def some(instances: Instances, most: int) -> Instances:
    """Return at most so many instances, evenly spaced."""
    n = len(instances)
    return instances if n <= most else instances[[k * n // most for k in range(most)]]


def unit_in_last_place(values: Tensor) -> Tensor:
    """Return the distance of each value's size to the next larger number."""
    size = values.abs()
    return torch.nextafter(size, torch.full_like(size, torch.inf)) - size


def _one_step(
    final_model: FinalModel, test: Instances, dtype: torch.dtype, probes: int
) -> tuple[float, float]:
    """Return the mean over test instances of ``|g_j u|^2``, and the root mean square of their losses.

    For random signs s, E |sum_j s_j g_j u|^2 = sum_j |g_j u|^2: one backward pass for all instances.
    """
    measure = final_model.measurement or final_model.loss
    initial, buffers = final_model.parameters(), final_model.buffers()
    units = {name: unit_in_last_place(p.to(dtype)) for name, p in initial.items()}
    generator = torch.Generator().manual_seed(0)
    total = squares = 0.0
    free = {name: p.clone().requires_grad_() for name, p in initial.items()}
    batches = list(test.batches(fitting_batch(test)))
    for _ in range(probes):
        gradients = {name: torch.zeros_like(p) for name, p in free.items()}
        for batch in batches:
            with torch.enable_grad():
                outputs = functional_apply(final_model.network, {**buffers, **free}, batch.inputs)
                losses = measure(outputs, batch.targets)
                if not losses.requires_grad:  # a count, say, which small changes do not move
                    return 0.0, math.sqrt(float(losses.double().square().mean()))
                signs = torch.randint(0, 2, losses.shape, generator=generator).to(losses) * 2 - 1
                found = torch.autograd.grad((losses * signs).sum(), list(free.values()), allow_unused=True)
            squares += float(losses.detach().double().square().sum()) / probes
            for name, g in zip(free, found, strict=True):
                if g is not None:
                    gradients[name] += g
        total += sum(float((g * units[name]).double().square().sum()) for name, g in gradients.items())
    return total / probes / len(test), math.sqrt(squares / len(test))
