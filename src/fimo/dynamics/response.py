"""The response of a full run's outputs to leaving instances out, in the space of outputs.

To first order in the parameter change d_t = theta_t(without i) - theta_t, runs that share their batches obey

    d_{t+1} = d_t - lr P [ sum_b w'_b J_b^T H_b J_b d_t + sum_b (w'_b - w_b) J_b^T r_b ]

with J_b an instance's output Jacobian, r_b and H_b the loss's derivatives in the outputs along the full run,
w_b and w'_b the weights of the instance's loss in the batch of the full run and of the one without i, and P
the optimizer's preconditioner. So d_t = P J^T c_t is a combination of Jacobian rows, and with the kernel
K = J P J^T (of few points of the trajectory) the recursion needs only outputs: a step of all L runs costs
|batch|·N·L, where one run's step costs |batch|·P. The curvature's weights are w', not w: an instance left out
doesn't resist its own removal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.dynamics.optimizer import CoefficientOptimizer, preconditioner, scaled
from fimo.dynamics.output_space import OutputSpace
from fimo.dynamics.points import Segment
from fimo.dynamics.steps import steps
from fimo.dynamics.threads import one_thread
from fimo.further_training.protocol import Protocol
from fimo.models.final_model import FinalModel, fitting_batch, functional_apply


@dataclass(frozen=True)
class Kernel:
    """Inner products of output Jacobians at one point of a trajectory.

    Args:
        train: ``[M, R, M·R]``, between the followed training outputs.
        test: ``[J·D, M·R]``, of test outputs with them.
    """

    train: Tensor
    test: Tensor

    @classmethod
    def at(
        cls,
        gradients: InstanceGradients,
        train: Instances,
        test: Instances,
        space: OutputSpace,
        protocol: Protocol,
        second_moment: dict[str, Tensor] | None,
    ) -> Kernel:
        """Compute it at the parameters of ``gradients``; the second moment is Adam's, by name."""
        followed = Instances(train[space.kept].inputs, space.directions)
        rows = gradients.rows(followed, lambda _, directions: directions, "directions")
        outputs = gradients.outputs(test)
        m, r, _ = space.directions.shape
        weight = None
        if second_moment is not None and protocol.optimizer != "sgd":
            left, right = (scaled(x, second_moment, protocol) for x in (outputs, rows))
            if left is None or right is None:
                weight = preconditioner(protocol, second_moment)
            else:
                outputs, rows = left, right
        inner = rows.gram(rows, weight).reshape(m, r, m * r)
        return cls(inner, outputs.gram(rows, weight).reshape(-1, m * r))


@dataclass(frozen=True)
class Along:
    """Training outputs of a full run, at K points.

    In between, the Hessian is interpolated, and the gradient follows the run's own batches by the kernel,
    from the point before.

    Args:
        at: ``[K]`` optimizer steps, ascending from 0.
        gradient: ``[K, M, R]``, the loss's derivatives along the directions of an output space.
        hessian: ``[K, M, R, R]``.
    """

    at: Sequence[int]
    gradient: Tensor
    hessian: Tensor

    def bracket(self, step: int) -> tuple[int, float]:
        """Return the last point at or before a step, and the share of the way to the next."""
        k = min(max(0, sum(a <= step for a in self.at) - 1), len(self.at) - 2)
        return k, (step - self.at[k]) / (self.at[k + 1] - self.at[k])


def responses(
    seed: int,
    left_out: Tensor,
    instances: int,
    protocol: Protocol,
    space: OutputSpace,
    along: Along,
    points: Sequence[int],
    segments: Sequence[Segment],
    kernels: Iterator[Kernel],
    groups: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the changes ``[J·D, L + K]`` of test outputs at each of the E evaluation points.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
        points: ``[E]`` optimizer steps.
        segments: of the evaluation points, each with the next of ``kernels``. The coefficients of earlier
            segments are carried over, that is, read with the new Jacobians.
        groups: ``[K, G]``, instances left out together by K more runs, under ``mask``.
    """
    m, r, _ = space.directions.shape
    like = along.gradient
    place = torch.full((instances,), -1, dtype=torch.int64, device=like.device)
    place[space.kept] = torch.arange(m, device=like.device)
    runs = len(left_out) + (0 if groups is None else len(groups))
    optimizer = CoefficientOptimizer(protocol, (m * r, runs + 1), like)
    coefficients = optimizer.coefficients
    stream, taken = steps(seed, left_out, instances, protocol, like.dtype, groups), 0
    whole = m == instances
    for segment in segments:
        kernel = next(kernels)
        for e in range(segment.first, segment.last):
            with one_thread():
                while taken < points[e]:
                    step = next(stream)
                    index, without, full = (t.to(like.device) for t in (step.index, step.without, step.full))
                    if not whole:
                        index = place[index]
                        known = index >= 0
                        index, without, full = index[known], without[known], full[known]
                    k, share = along.bracket(taken)
                    if taken == along.at[k]:
                        coefficients[:, -1] = 0.0  # the full run's own column starts again from what is known
                    hessian = torch.lerp(along.hessian[k][index], along.hessian[k + 1][index], share)
                    gradient = along.gradient[k][index]
                    change = kernel.train[index].view(-1, m * r) @ coefficients
                    if r == 1:
                        force = change.mul_(hessian[:, 0])
                        gradient = gradient + force[:, -1:]
                        force[:, :-1].mul_(without).addcmul_(without - full[:, None], gradient)
                        force[:, -1:] = full[:, None] * gradient
                        rows = index
                    else:
                        force = hessian @ change.view(len(index), r, -1)
                        gradient = gradient + force[:, :, -1]
                        force[:, :, :-1].mul_(without[:, None])
                        force[:, :, :-1].addcmul_((without - full[:, None])[:, None], gradient[:, :, None])
                        force[:, :, -1] = full[:, None] * gradient
                        force = force.flatten(0, 1)
                        rows = (index[:, None] * r + torch.arange(r, device=like.device)).flatten()
                    optimizer.step(rows, force, step.lr)
                    taken += 1
            yield kernel.test @ coefficients[:, :-1]


def outputs_at(final_model: FinalModel, parameters: Mapping[str, Tensor], instances: Instances) -> Tensor:
    """Return the flattened outputs ``[n, D]`` with other values of the trainable parameters, in eval mode."""
    tensors = {**final_model.buffers(), **parameters}
    with torch.no_grad():
        parts = [
            functional_apply(final_model.network, tensors, b.inputs)
            for b in instances.batches(fitting_batch(instances))
        ]
    return torch.cat(parts).flatten(1)


def with_parameters(final_model: FinalModel, parameters: Mapping[str, Tensor]) -> FinalModel:
    """Return a copy of the model with other values of its trainable parameters."""
    return moved(final_model.to(), parameters)


def moved(copied: FinalModel, parameters: Mapping[str, Tensor]) -> FinalModel:
    """Set the trainable parameters of a model that is the caller's own copy, and return it."""
    with torch.no_grad():
        for name, own in copied.parameters().items():
            own.copy_(parameters[name])
    return copied


def loss_changes(final_model: FinalModel, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
    """Return the change ``[J, L]`` (float64) of losses (or measurements) when outputs change.

    Args:
        outputs: ``[J, ...]``.
        change: ``[J·D, L]``.
    """
    measure = final_model.measurement or final_model.loss
    wide = outputs.double()
    shift = change.double().T.reshape(-1, *wide.shape)  # [L, J, ...]
    moved = (wide + shift).flatten(0, 1)
    goal = targets.double() if targets.is_floating_point() else targets
    repeated = goal.expand(len(shift), *goal.shape).flatten(0, 1)
    return (measure(moved, repeated).view(len(shift), -1) - measure(wide, goal)).T


def linear_loss_changes(final_model: FinalModel, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
    """Return the same to first order in the change."""
    from fimo.curvature.outputs import output_gradient

    goal = targets.double() if targets.is_floating_point() else targets
    gradient = output_gradient(final_model.measurement or final_model.loss, outputs.double(), goal)
    d = gradient[0].numel()
    return torch.einsum("jd,jdl->jl", gradient.flatten(1), change.double().view(len(outputs), d, -1))
