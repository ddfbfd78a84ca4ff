"""Reverse-mode derivatives of the full run: every training instance at once, for given test instances."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from fimo.data.instances import Instances
from fimo.engine.optimizers import State, Tensors
from fimo.engine.protocol import DTYPES, Protocol
from fimo.errors import InputError
from fimo.further_training.unrolled_step import FullRun, StepBatch, evaluate_outputs
from fimo.models.final_model import FinalModel


def adjoint(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    seed: int,
    *,
    of: Literal["loss", "outputs"] = "loss",
    weight: Tensor | None = None,
    points: Sequence[int] | None = None,
    chunk: int = 32,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Differentiate test losses along a full run in the weights of all N training instances.

    With the state z_{t+1} = step_t(z_t, g_t), g_t = sum_b weight_b grad loss_b, an adjoint starts as the
    gradient of a test loss at its evaluation point and goes back through the steps. At each, with a the
    adjoint of g_t,

        d loss / d w_i += (d weight_i / d w_i) <a, grad loss_i(θ_t)>,    adjoint of θ_t += H_t a.

    Both come from one pass of directional derivatives, so that a step costs about two gradients of the
    batch per adjoint: with the default chunk 2 to 3.5 times as long as a run of the engine for each test
    instance and evaluation point (an MLP on one thread; 5.5 with a chunk of 8). The trajectory is kept at
    every sqrt(T)-th step and made again in between.

    Args:
        seed: whose batches (and dropout masks) are followed.
        of: test losses (the final model's measurement), or all D outputs, flattened.
        weight: ``[M, J]``, of sums of test losses whose derivatives are asked for instead of each one's, by
            linearity at the cost of M: their mean costs as much as one test instance.
        points: which evaluation points, as indices into the E of the protocol; all when None.
        chunk: adjoints carried back together; memory grows with it.
        dtype: of run and adjoints; the protocol's when None.

    Returns:
        ``[E, J, N]`` (``[E, M, N]`` of sums), or ``[E, J, D, N]`` of outputs: the derivative in w_i. Leaving
        i out takes w_i from 1 to 0, so to first order the raw change is its negative.
    """
    if weight is not None and (of != "loss" or weight.ndim != 2 or weight.shape[1] != len(test)):
        raise InputError("weight", f"expected weights [M, {len(test)}] of test losses")
    run = FullRun(final_model, train, protocol, seed, None, device, dtype)
    chosen = list(range(len(run.points))) if points is None else list(points)
    if not chosen or any(not 0 <= e < len(run.points) for e in chosen):
        raise InputError("points", f"expected indices in [0, {len(run.points)}) but got {chosen}")
    kept = _States(run, run.points[max(chosen)])
    wide = DTYPES[protocol.evaluation_dtype]
    model, test = final_model.to(device, wide), test.to(device, wide)
    together = max(1, chunk // len(chosen))
    if weight is None:
        starts = [TestGradients(model, batch, of) for batch in test.batches(together)]
    else:
        starts = [TestGradients(model, test, of, w) for w in weight.to(device, wide).split(together)]
    with torch.no_grad():
        parts = [_sweep(run, kept, start, chosen) for start in starts]
    found = run.rule.of_units(torch.cat(parts, 1))
    return found if of == "outputs" else found[:, :, 0]


class _States:
    """The run's states in reverse order: every K-th kept, the rest made again K at a time, K = sqrt(T)."""

    def __init__(self, run: FullRun, steps: int) -> None:
        self.run, self.steps = run, steps
        self.every = max(1, math.isqrt(steps))
        self.kept: list[State] = []
        state = run.start()
        batches = run.batches()
        for step in range(steps):
            if step % self.every == 0:
                self.kept.append(state)
            state = self._next(state, next(batches))
        self.last = state

    def _next(self, state: State, batch: StepBatch) -> State:
        with self.run.randomness(batch.step), torch.no_grad():
            return self.run.update(state, self.run.gradient(state["parameters"], batch), batch.step)

    def backwards(self) -> Iterator[tuple[State, StepBatch]]:
        """Yield each step's state before it and its batch, from the last to the first."""
        for segment in reversed(range(len(self.kept))):
            first = segment * self.every
            state, batches = self.kept[segment], self.run.batches(first)
            made: list[tuple[State, StepBatch]] = []
            for step in range(first, min(first + self.every, self.steps)):
                batch = next(batches)
                made.append((state, batch))
                if step + 1 < min(first + self.every, self.steps):
                    state = self._next(state, batch)
            yield from reversed(made)


def _sweep(run: FullRun, kept: _States, start: TestGradients, chosen: Sequence[int]) -> Tensor:
    """Carry some adjoints back; return ``[E, J or M, D or 1, N]`` in the order of chosen."""
    starts = {run.points[e]: e for e in chosen}
    adjoints: State | None = None
    order: list[int] = []
    found: Tensor | None = None
    rows = outputs = 0

    def begin(step: int, state: State) -> None:
        nonlocal adjoints, found, rows, outputs
        with run.randomness(0):
            fresh, outputs = start(state["parameters"], run.dtype)
        rows = len(next(iter(fresh.values())))
        order.append(starts[step])
        new = {k: {n: t.new_zeros(rows, *t.shape) for n, t in ts.items()} for k, ts in state.items()}
        new["parameters"] = fresh
        empty = torch.zeros(rows, len(run.train), dtype=run.dtype, device=run.device)
        if adjoints is None:
            adjoints, found = new, empty
        else:
            adjoints = {
                k: {n: torch.cat([adjoints[k][n], t]) for n, t in ts.items()} for k, ts in new.items()
            }
            found = torch.cat([found, empty])  # type: ignore[list-item]

    if kept.steps in starts:
        begin(kept.steps, kept.last)
    for state, batch in kept.backwards():
        if adjoints is not None and found is not None:
            adjoints = _pull_back(run, state, batch, adjoints, found)
        if batch.step in starts:
            begin(batch.step, state)
    assert found is not None
    by_point = found.view(len(order), -1, outputs, len(run.train))
    return by_point[[order.index(e) for e in chosen]]


def _pull_back(run: FullRun, state: State, batch: StepBatch, adjoints: State, into: Tensor) -> State:
    """Carry adjoints ``[M, ...]`` through one step, and add the weights' derivatives to ``[M, N]``."""
    with run.randomness(batch.step):
        # the gradient is needed to linearise the optimizer, its derivatives only in what comes back
        gradient = run.gradient(state["parameters"], batch)
        _, back = vjp(lambda z, g: run.update(z, g, batch.step), state, gradient)  # type: ignore[misc]
        through, of_gradient = vmap(back)(adjoints)
    with run.randomness(batch.step):
        none = torch.zeros_like(batch.weight).expand(len(next(iter(of_gradient.values()))), -1)
        _, curved, d_losses = run.gradient_and_tangents(state["parameters"], of_gradient, batch, none)
    found: State = through
    found["parameters"] = {n: t + curved[n] for n, t in found["parameters"].items()}
    places, derivative = run.rule.in_own_weights(d_losses, batch.weight, len(batch.index))
    into.index_add_(1, torch.cat([batch.index, batch.extra])[places], derivative)
    return found


@dataclass(frozen=True)
class TestGradients:
    """What adjoints start as.

    Args:
        model: in the dtype of test losses.
        weight: ``[M, J]``, see :func:`adjoint`.
    """

    model: FinalModel
    test: Instances
    of: str
    weight: Tensor | None = None

    def __call__(self, parameters: Tensors, dtype: torch.dtype) -> tuple[Tensors, int]:
        """Return gradients ``[J * D, ...]`` of test losses (D = 1) or outputs in the parameters, and D.

        Of sums of losses, ``[M, ...]``, with D = 1.
        """
        wide = next(iter(self.model.parameters().values())).dtype
        jacobian = jacrev(self._values)({n: p.to(wide) for n, p in parameters.items()})
        d = next(iter(jacobian.values())).shape[1]
        return {n: t.flatten(0, 1).to(dtype) for n, t in jacobian.items()}, d

    def _values(self, parameters: Tensors) -> Tensor:
        outputs = evaluate_outputs(self.model, parameters, self.test.inputs)
        if self.of == "outputs":
            return outputs.reshape(len(outputs), -1)
        losses = (self.model.measurement or self.model.loss)(outputs, self.test.targets)
        return losses[:, None] if self.weight is None else (self.weight @ losses)[:, None]
