"""The response of a full run's outputs to leaving instances out, in the space of outputs.

To first order in the parameter change d_t = theta_t(without i) - theta_t, runs that share their batches obey

    d_{t+1} = d_t - lr P [ sum_b w'_b J_b^T H_b J_b d_t + sum_b (w'_b - w_b) J_b^T r_b ]

with J_b an instance's output Jacobian, r_b and H_b the loss's derivatives in the outputs along the full run,
w_b and w'_b the weights of the instance's loss in the batch of the full run and of the one without i, and P
the optimizer's preconditioner. So d_t = P J^T c_t is a combination of Jacobian rows, and with the kernel
K = J P J^T (of few points of the trajectory) the recursion needs only outputs: a step of all L runs costs
|batch|·N·L, where one run's step costs |batch|·P. The curvature's weights are w', not w: an instance left out
doesn't resist its own removal.

For cross-entropy, whose derivative saturates, J_b^T H_b J_b d_t is not taken as linear: the derivative is
evaluated at the outputs f_b + J_b d_t, so that only the parameters' effect on the outputs is linearised. For
squared error the two are the same.

The full run's outputs are known at K points of it, so r_b isn't known at every step. Between them the full
run's own movement u_t = theta_t - theta_k since the last point k is followed in the same way, as one more
run: the last of L + 1 columns of coefficients. Its batches weigh w, its force is J_b^T (r_b + H_b J_b u_t)
with r_b at the point, and it is set to zero at each point. What isn't a combination of rows is carried as
vectors of parameters (:mod:`fimo.linear_response.displacement`): the momentum that the full run has at the
start of a segment, the pull of weight decay on the parameters that it has at a point, -lr decay theta_k, and
what earlier segments changed. So on a linear model, whose Jacobian is the same everywhere, every term is
exact. Where there are too many instances to follow all, a sample stands for them, and the full run's own
movement is interpolated between the points (:mod:`fimo.linear_response.sampled_steps`).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.leave_out import LeaveOut
from fimo.engine.protocol import Protocol
from fimo.linear_response.coefficient_optimizer import CoefficientOptimizer
from fimo.linear_response.displacement import Carried, KnownParameters
from fimo.linear_response.leave_out_weights import Step, steps
from fimo.linear_response.output_kernel import Kernel
from fimo.linear_response.output_space import OutputSpace
from fimo.linear_response.path_points import Segment
from fimo.linear_response.sampled_steps import sampled
from fimo.models.final_model import FinalModel, fitting_batch, functional_apply
from fimo.models.linear_layers import forward, layers_on
from fimo.models.loss_function import Loss


@dataclass(frozen=True)
class Along:
    """Training outputs of S full runs, at K points.

    In between, the Hessian is interpolated, and the gradient follows the run's own batches by the kernel,
    from the point before.

    Args:
        at: ``[K]`` optimizer steps, ascending from 0; the ends of segments are among them.
        gradient: ``[S, K, M, R]``, the loss's derivatives along the directions of an output space.
        hessian: ``[S, K, M, R, R]``, or ``[S, 1, M, R, R]`` where it is constant; None with ``outputs``.
        parameters: of the k-th point, each seed's ``[P]``; asked for only where parameters decay.
        outputs: ``[S, K, M, D]``: its derivative is evaluated at the changed outputs; None: it is taken
            as linear in the change.
        loss, targets: of the M followed instances, where outputs are given.
    """

    at: Sequence[int]
    gradient: Tensor
    hessian: Tensor | None
    parameters: KnownParameters
    outputs: Tensor | None = None
    loss: Loss | None = None
    targets: Tensor | None = None

    def bracket(self, step: int) -> tuple[int, float]:
        """Return the last point at or before a step, and the share of the way to the next."""
        k = min(max(0, bisect.bisect_right(self.at, step) - 1), len(self.at) - 2)
        return k, (step - self.at[k]) / (self.at[k + 1] - self.at[k])

    def inside(self, first: int, last: int) -> list[int]:
        """Return the points from one step on and before another."""
        return [k for k, step in enumerate(self.at) if first <= step < last]


def responses(
    seeds: Sequence[int],
    left_out: Tensor,
    rule: LeaveOut,
    protocol: Protocol,
    space: OutputSpace,
    along: Along,
    segments: Sequence[Segment],
    kernels: Iterator[Kernel],
    every: int = 1,
) -> Iterator[Tensor]:
    """Yield the changes ``[S, J·D, L]`` of test outputs at each of the E evaluation points.

    Args:
        left_out: ``[L]``, one instance per run.
        rule: of leaving out.
        segments: of the evaluation points, each with the next of ``kernels``. What earlier segments changed
            is carried over as changes of parameters.
        every: see :func:`~fimo.linear_response.leave_out_weights.steps`.
    """
    (m, r, _), s, like = space.directions.shape, len(seeds), along.gradient
    optimizer = CoefficientOptimizer(protocol.update_rule, (s * m * r, len(left_out) + 1), like)
    coefficients = optimizer.coefficients.view(s, m * r, -1)
    forces, carried = _Forces(space, along), Carried(protocol, s, along.parameters)
    stream = steps(seeds, left_out, rule, protocol, like.dtype, every)
    if space.sample is None:
        stream = _followed(stream, space, rule.instances)
    else:
        stream = sampled(stream, space, space.sample, seeds, protocol.batch_size, rule.instances)
    points = [0, *protocol.evaluation_steps(rule.instances, rule.instances)]
    kernel, taken = None, 0
    for segment in segments:
        before, kernel = kernel, next(kernels)
        inside = along.inside(points[segment.first], points[segment.last])
        carried.enter(before, kernel, inside, optimizer)
        for _ in range(segment.first, segment.last):
            for step in stream:
                k, share = along.bracket(taken)
                if taken == along.at[k]:  # the full run's movement starts again from what is known
                    coefficients[:, :, -1] = 0.0
                    carried.know(k)
                rows = forces.rows(step.index)
                change = kernel.rows(step.index) @ coefficients  # [S, B·R, L + 1]
                carried.add_train(change, rows)
                force = forces.at(k, share, step, change)
                optimizer.step(rows, force.view(s * step.index.shape[1] * r, -1), step.lr, step.lr_without)
                carried.step(step.lr, step.lr_without)
                taken += step.lr is not None
                if step.evaluated:
                    break
            yield carried.add_test(kernel.test @ coefficients[:, :, :-1])


def _followed(stream: Iterator[Step], space: OutputSpace, instances: int) -> Iterator[Step]:
    """Yield steps with their index among the M followed instances; what isn't followed weighs nothing."""
    kept = space.kept
    place = torch.full((instances,), -1, dtype=torch.int64, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    for step in stream:
        index, full, without = (t.to(kept.device) for t in (step.index, step.full, step.without))
        if len(kept) < instances:
            index = place[index]
            known = (index >= 0).to(full.dtype)
            index, full, without = index.clamp(min=0), full * known, without * known[:, :, None]
        yield replace(step, index=index, full=full, without=without)


class _Forces:
    """Derivatives of a batch's loss along the followed directions, of all seeds' runs."""

    def __init__(self, space: OutputSpace, along: Along) -> None:
        self.m, self.r, _ = space.directions.shape
        self.seeds, device = len(along.gradient), along.gradient.device
        self.directions, self.along = space.directions, along
        self.moves = space.sample is None  # the full runs' own movement is followed
        self.first = (torch.arange(self.seeds, device=device) * self.m)[:, None]
        self.within = torch.arange(self.r, device=device)
        self.gradients = along.gradient.transpose(0, 1).flatten(1, 2)  # [K, S·M, R]
        # [K, S·M, R, R]
        self.hessians = None if along.hessian is None else along.hessian.transpose(0, 1).flatten(1, 2)
        self.outputs = None if along.outputs is None else along.outputs.transpose(0, 1).flatten(1, 2)

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows ``[S·B·R]`` of each seed's instances ``[S, B]`` among all seeds' rows S·M·R."""
        at = (index + self.first).flatten()
        return at if self.r == 1 else (at[:, None] * self.r + self.within).flatten()

    def at(self, k: int, share: float, step: Step, change: Tensor) -> Tensor:
        """Return the forces ``[S, B, R, L + 1]``, the full run's own last, the others' differences from it.

        Args:
            k, share: the point of the runs, and the share of the way to the next.
            change: ``[S, B·R, L + 1]`` of outputs, the full run's since the point last; overwritten.
        """
        at = (step.index + self.first).flatten()
        if not self.moves:
            change[..., -1] = 0.0
        force = self._evaluated if self.hessians is None else self._linear
        found = force(k, share, step, change, at)
        if not self.moves:
            found[..., -1] = 0.0
        return found

    def _known(self, values: Tensor, k: int, share: float, at: Tensor) -> Tensor:
        """Return what is known of the full runs: at the last point, or between two where they don't move."""
        here = values[k].index_select(0, at)
        return here if self.moves else torch.lerp(here, values[k + 1].index_select(0, at), share)

    def _linear(self, k: int, share: float, step: Step, change: Tensor, at: Tensor) -> Tensor:
        """Take the derivative as linear in the change: r + H K c."""
        assert self.hessians is not None
        s, b, r = *step.index.shape, self.r
        gradient = self._known(self.gradients, k, share, at).view(s, b, r, 1)
        hessian = self.hessians[0 if len(self.hessians) == 1 else k].index_select(0, at)
        if len(self.hessians) > 1:
            hessian = torch.lerp(hessian, self.hessians[k + 1].index_select(0, at), share)
        if r == 1:
            force = change.view(s, b, 1, -1).mul_(hessian.view(s, b, 1, 1))
        else:
            force = (hessian @ change.view(s * b, r, -1)).view(s, b, r, -1)
        gradient = gradient + force[..., -1:]
        removed = (step.without - step.full[..., None])[:, :, None]
        force[..., :-1].mul_(step.without[:, :, None]).addcmul_(removed, gradient)
        force[..., -1:] = step.full[..., None, None] * gradient
        return force

    def _evaluated(self, k: int, share: float, step: Step, change: Tensor, at: Tensor) -> Tensor:
        """Evaluate the derivative at the changed outputs."""
        assert self.outputs is not None
        assert self.along.loss is not None
        assert self.along.targets is not None
        s, b, r = *step.index.shape, self.r
        change[..., :-1] += change[..., -1:]  # from the point where outputs are known
        index = step.index.flatten()
        force = self.along.loss.changed_gradient(
            self._known(self.outputs, k, share, at), self.along.targets.index_select(0, index),
            self.directions.index_select(0, index), change.view(s * b, r, -1),
        ).view(s, b, r, -1)  # fmt: skip
        own = step.full[..., None, None] * force[..., -1:]
        force[..., :-1].mul_(step.without[:, :, None]).sub_(own)
        force[..., -1:] = own
        return force


def outputs_at(final_model: FinalModel, parameters: Mapping[str, Tensor], instances: Instances) -> Tensor:
    """Return the outputs ``[n, ...]`` with other values of the trainable parameters, in eval mode."""
    return outputs_along(final_model, [parameters], instances)[0]


AT_ONCE = 2**20
"""Elements of one layer's outputs of a network of linear layers that are held at once."""


def outputs_along(
    final_model: FinalModel, points: Sequence[Mapping[str, Tensor]], instances: Instances
) -> Tensor:
    """Return the outputs ``[K, n, ...]`` at K values of the trainable parameters, in eval mode."""
    layers, inputs = layers_on(final_model, instances), instances.inputs
    with torch.no_grad():
        fixed = dict(final_model.network.named_parameters())
        if layers is None or not isinstance(inputs, Tensor):
            return torch.stack([_outputs(final_model, p, instances) for p in points])
        inputs = inputs.flatten(1)
        width = max(fixed[layer.weight].shape[0] for layer in layers)
        block = max(1, AT_ONCE // (len(inputs) * width))
        found = []
        for start in range(0, len(points), block):
            some = points[start : start + block]
            stacked = {
                n: _stacked(n, some, fixed) for layer in layers for n in (layer.weight, layer.bias) if n
            }
            found.append(forward(layers, stacked, inputs.expand(len(some), -1, -1), keep=False).outputs)
        return torch.cat(found)


def _stacked(name: str, points: Sequence[Mapping[str, Tensor]], fixed: Mapping[str, Tensor]) -> Tensor:
    if name not in set(points[0]):  # not trained
        return fixed[name].detach().expand(len(points), *fixed[name].shape)
    return torch.stack([p[name] for p in points])


def _outputs(final_model: FinalModel, parameters: Mapping[str, Tensor], instances: Instances) -> Tensor:
    tensors = {**final_model.buffers(), **parameters}
    parts = [
        functional_apply(final_model.network, tensors, b.inputs)
        for b in instances.batches(fitting_batch(instances))
    ]
    return torch.cat(parts)


def with_parameters(final_model: FinalModel, parameters: Mapping[str, Tensor]) -> FinalModel:
    """Return a copy of the model with other values of its trainable parameters."""
    return moved(final_model.to(), parameters)


def moved(copied: FinalModel, parameters: Mapping[str, Tensor]) -> FinalModel:
    """Set the trainable parameters of a model that is the caller's own copy, and return it."""
    with torch.no_grad():
        for name, own in copied.parameters().items():
            own.copy_(parameters[name])
    return copied
