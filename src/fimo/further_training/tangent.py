"""Forward-mode derivatives of the full run in the weights of given instances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from fimo.data.instances import Instances
from fimo.engine.optimizers import State, Tensors
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.replicas import Unit
from fimo.further_training.unrolled_step import FullRun, evaluate_outputs
from fimo.models.final_model import FinalModel
from fimo.models.forward_mode import jvp
from fimo.validation import choices


@dataclass(frozen=True)
class TangentOutputs:
    """Outputs of test instances along a seed's full run, with their derivatives in instances' weights.

    Leaving i out takes its weight from 1 to 0, so to first order outputs change by ``-derivative``, and the
    raw change of the loss is ``-loss_derivative``.

    Args:
        outputs: ``[E, J, ...]`` at each evaluation point, as the network gives them.
        derivative: ``[E, J, L, ...]``.
        loss_derivative: ``[E, J, L]``, of the test instances' losses (the final model's measurement).
    """

    outputs: Tensor
    derivative: Tensor
    loss_derivative: Tensor


def tangent_outputs(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    seed: int,
    left_out: Sequence[int | Sequence[int]],
    *,
    chunk: int = 32,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TangentOutputs:
    """Differentiate a full run forward in the weights of L training instances (or groups).

    With the state z_t (parameters and the optimizer's moments) after t steps and z_{t+1} = step_t(z_t, w),
    the tangents dz_t / dw_i follow dz_{t+1} = (d step_t / d z) dz_t + d step_t / d w_i: no difference of runs
    is taken, so nothing cancels. The weights are those of the leave-out rule: see
    :class:`~fimo.further_training.unrolled_step.FullRun`.

    Args:
        seed: whose batches (and dropout masks) are followed.
        left_out: L indices into ``train``, or groups; a group's derivative is in its common weight.
        chunk: tangents advanced together; memory grows with it.
        dtype: of run and tangents; the protocol's when None. Outputs are in the protocol's evaluation dtype.

    Returns:
        On ``device``, in the evaluation dtype.
    """
    units = choices.units(left_out, len(train))
    parts = []
    for first in range(0, len(units), chunk):
        run = FullRun(final_model, train, protocol, seed, units[first : first + chunk], device, dtype)
        parts.append(_outputs(final_model, run, units[first : first + chunk], test))
    return TangentOutputs(
        parts[0].outputs,
        torch.cat([p.derivative for p in parts], 2),
        torch.cat([p.loss_derivative for p in parts], 2),
    )


def tangents(run: FullRun, units: Sequence[Unit]) -> Iterator[tuple[State, State]]:
    """Yield the state and its derivatives ``[L, ...]`` in the units' weights at each evaluation point."""
    state = run.start()
    derivative: State = {
        kind: {n: t.new_zeros(len(units), *t.shape) for n, t in tensors.items()}
        for kind, tensors in state.items()
    }
    batches, step = run.batches(), 0
    for point in run.points:
        while step < point:
            batch = next(batches)
            with run.randomness(step), torch.no_grad():
                gradient, d_gradient, _ = run.gradient_and_tangents(
                    state["parameters"], derivative["parameters"], batch, run.weight_derivative(batch, units)
                )
                state, derivative = _updated(run, state, derivative, gradient, d_gradient, step)
            step += 1
        yield state, derivative


def _updated(
    run: FullRun, state: State, derivative: State, gradient: Tensors, d_gradient: Tensors, step: int
) -> tuple[State, State]:
    """Return the state after the optimizer's step, and its derivatives ``[L, ...]``."""

    def one(dz: State, dg: Tensors) -> tuple[State, State]:
        return jvp(lambda z, g: run.update(z, g, step), (state, gradient), (dz, dg))

    return vmap(one, out_dims=(None, 0))(derivative, d_gradient)  # type: ignore[arg-type]


def _outputs(final_model: FinalModel, run: FullRun, units: Sequence[Unit], test: Instances) -> TangentOutputs:
    wide = DTYPES[run.protocol.evaluation_dtype]
    model, test = final_model.to(run.device, wide), test.to(run.device, wide)
    measurement = model.measurement or model.loss
    outputs, derivatives, losses = [], [], []
    for state, derivative in tangents(run, units):
        parameters = {n: p.to(wide) for n, p in state["parameters"].items()}
        directions = {n: p.to(wide) for n, p in derivative["parameters"].items()}

        def both(p):  # type: ignore[no-untyped-def]
            found = evaluate_outputs(model, p, test.inputs)
            return found, measurement(found, test.targets)

        def one(d, parameters=parameters, both=both):  # type: ignore[no-untyped-def]
            return jvp(both, (parameters,), (d,))

        with run.randomness(0), torch.no_grad():
            mapped = vmap(one, out_dims=(None, 0))  # type: ignore[arg-type]
            (at, _), (output, loss) = mapped(directions)
        outputs.append(at)
        derivatives.append(output.transpose(0, 1))
        losses.append(loss.transpose(0, 1))
    return TangentOutputs(torch.stack(outputs), torch.stack(derivatives), torch.stack(losses))
