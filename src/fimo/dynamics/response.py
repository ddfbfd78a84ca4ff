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
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.rows import Rows
from fimo.data.instances import Instances
from fimo.dynamics.optimizer import CoefficientOptimizer, Inertia, preconditioner, scaled
from fimo.dynamics.output_space import OutputSpace, changed_gradient
from fimo.dynamics.points import Segment
from fimo.dynamics.steps import steps
from fimo.further_training.linear import linear_layers
from fimo.further_training.protocol import Protocol
from fimo.models.final_model import FinalModel, fitting_batch, functional_apply
from fimo.models.losses import Loss

LossChanges = Callable[[FinalModel, Tensor, Tensor, Tensor], Tensor]
"""Of a model, outputs, targets and changes of the outputs, see :func:`loss_changes`."""


@dataclass(frozen=True)
class Kernel:
    """Inner products of output Jacobians at one point of a trajectory.

    Args:
        train: ``[M, R, M·R]``, between the followed training outputs; ``[S, M, R, M·R]`` if of S seeds.
        test: ``[J·D, M·R]``, of test outputs with them; ``[S, J·D, M·R]``.
        jacobians: what they are inner products of; one for each of S seeds, or one for all.
    """

    train: Tensor
    test: Tensor
    jacobians: tuple[Jacobians, ...] = ()

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows ``[S, B·R, M·R]`` of each seed's instances ``[S, B]``."""
        m, r, mr = self.train.shape[-3:]
        if self.train.dim() == 4:
            index = index + (torch.arange(len(index), device=index.device) * m)[:, None]
        return self.train.view(-1, r * mr).index_select(0, index.flatten()).view(len(index), -1, mr)

    @classmethod
    def of_seeds(cls, kernels: Sequence[Kernel]) -> Kernel:
        """Return several seeds' own kernels as one."""
        if len(kernels) == 1:
            return kernels[0]
        jacobians = tuple(j for k in kernels for j in k.jacobians)
        return cls(torch.stack([k.train for k in kernels]), torch.stack([k.test for k in kernels]), jacobians)

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
        weight = preconditioner(protocol, second_moment)
        jacobians = Jacobians(rows, outputs, weight)
        if weight is not None and second_moment is not None:
            left, right = (scaled(x, second_moment, protocol) for x in (outputs, rows))
            if left is not None and right is not None:
                outputs, rows, weight = left, right, None
        inner = rows.gram(rows, weight).reshape(m, r, m * r)
        return cls(inner, outputs.gram(rows, weight).reshape(-1, m * r), (jacobians,))


@dataclass(frozen=True)
class Jacobians:
    """Output Jacobians at one point of a trajectory.

    Args:
        train: of the followed training outputs, M·R rows.
        test: of test outputs, J·D rows.
        weight: ``[P]``, the optimizer's preconditioner; None: ones.
    """

    train: Rows
    test: Rows
    weight: Tensor | None = None

    def parameters(self, coefficients: Tensor) -> Tensor:
        """Return the parameter changes ``[P, K]`` of coefficients ``[M·R, K]``."""
        found = self.train.transposed_times(coefficients.view(self.train.n, self.train.r, -1))
        return found if self.weight is None else found * self.weight[:, None]

    def outputs(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changes of training and test outputs, ``[M·R, K]`` and ``[J·D, K]``."""
        return self.train.times(parameters).flatten(0, 1), self.test.times(parameters).flatten(0, 1)


class Carried:
    """What earlier segments left, as changes of parameters, which later Jacobians read.

    A seed's change of parameters is ``before + P J^T c`` with c the present segment's coefficients.

    Args:
        protocol: of further training.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._parts: list[list[Tensor]] = []  # of each seed: its change, and its momentum if there is any
        self._train: list[Tensor] = []  # [S·M·R, L], what each part changes in training outputs
        self._test: list[Tensor] = []  # [S, J·D, L], and in test outputs
        self._inertia: Inertia | None = None

    def turn(self, before: Kernel, after: Kernel, optimizer: CoefficientOptimizer, seeds: int) -> None:
        """Go over to the next segment: turn coefficients into changes of parameters, and set them to zero."""
        states = [t for t in (optimizer.coefficients, optimizer.average) if t is not None]
        shares = None if self._inertia is None else (self._inertia.change, self._inertia.momentum)
        parts: list[list[Tensor]] = []
        outputs: list[list[tuple[Tensor, Tensor]]] = []
        for s in range(seeds):
            old, new = (k.jacobians[s if len(k.jacobians) > 1 else 0] for k in (before, after))
            own = [old.parameters(t.view(seeds, -1, t.shape[1])[s, :, :-1]) for t in states]
            if shares is not None:
                for into, share in zip(own, shares, strict=False):
                    for part, weight in zip(self._parts[s], share, strict=False):
                        into.add_(part, alpha=weight)
            parts.append(own)
            outputs.append([new.outputs(part) for part in own])
        self._parts = parts
        self._train = [torch.cat([o[p][0] for o in outputs]) for p in range(len(states))]
        self._test = [torch.stack([o[p][1] for o in outputs]) for p in range(len(states))]
        for state in states:
            state.zero_()
        self._inertia = Inertia(self.protocol, optimizer.taken)

    def step(self, lr: float) -> None:
        """Take an optimizer step."""
        if self._inertia is not None:
            self._inertia.step(lr)

    def add_train(self, change: Tensor, rows: Tensor) -> None:
        """Add the change of training outputs at ``rows`` (of S·M·R) to ``change`` ``[S, B·R, L]``."""
        if self._inertia is not None:
            for share, part in zip(self._inertia.change, self._train, strict=False):
                if share:
                    change.add_(part.index_select(0, rows).view_as(change), alpha=share)

    def add_test(self, change: Tensor) -> Tensor:
        """Add the change of test outputs to ``change`` ``[S, J·D, L]``."""
        if self._inertia is not None:
            for share, part in zip(self._inertia.change, self._test, strict=False):
                change = change.add(part, alpha=share)
        return change


@dataclass(frozen=True)
class Along:
    """Training outputs of S full runs, at K points.

    In between, the Hessian is interpolated, and the gradient follows the run's own batches by the kernel,
    from the point before.

    Args:
        at: ``[K]`` optimizer steps, ascending from 0.
        gradient: ``[S, K, M, R]``, the loss's derivatives along the directions of an output space.
        hessian: ``[S, K, M, R, R]``, or ``[S, 1, M, R, R]`` where it is constant.
        outputs: ``[S, K, M, D]``: the loss's derivative is evaluated at the changed outputs, and the Hessian
            is not used; None: it is taken as linear in the change.
    """

    at: Sequence[int]
    gradient: Tensor
    hessian: Tensor
    outputs: Tensor | None = None

    def bracket(self, step: int) -> tuple[int, float]:
        """Return the last point at or before a step, and the share of the way to the next."""
        k = min(max(0, bisect.bisect_right(self.at, step) - 1), len(self.at) - 2)
        return k, (step - self.at[k]) / (self.at[k + 1] - self.at[k])


def responses(
    seeds: Sequence[int],
    left_out: Tensor,
    instances: int,
    protocol: Protocol,
    space: OutputSpace,
    along: Along,
    points: Sequence[int],
    segments: Sequence[Segment],
    kernels: Iterator[Kernel],
    loss: Loss | None = None,
    targets: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the changes ``[S, J·D, L]`` of test outputs at each of the E evaluation points.

    Args:
        left_out: ``[L]``, one instance per run.
        instances: N.
        points: ``[E]`` optimizer steps.
        segments: of the evaluation points, each with the next of ``kernels``. What earlier segments changed
            is carried over as changes of parameters.
        loss, targets: of all N instances, where outputs are given along the runs.
    """
    m, r, _ = space.directions.shape
    like, s = along.gradient, len(seeds)
    device = like.device
    place = torch.full((instances,), -1, dtype=torch.int64, device=device)
    place[space.kept] = torch.arange(m, device=device)
    whole = m == instances
    optimizer = CoefficientOptimizer(protocol, (s * m * r, len(left_out) + 1), like)
    coefficients = optimizer.coefficients.view(s, m * r, -1)  # the last column is the full run's own
    first = (torch.arange(s, device=device) * m)[:, None]  # a seed's rows among all seeds'
    within = torch.arange(r, device=device)
    gradients, hessians = along.gradient.transpose(0, 1).flatten(1, 2), along.hessian.transpose(0, 1)
    hessians = hessians.flatten(1, 2)  # [K, S·M, R, R]
    outputs = None if along.outputs is None else along.outputs.transpose(0, 1).flatten(1, 2)
    goals = torch.empty(0) if targets is None else targets[space.kept]
    stream, taken = steps(seeds, left_out, instances, protocol, like.dtype), 0
    kernel, carried = None, Carried(protocol)
    for segment in segments:
        before, kernel = kernel, next(kernels)
        if before is not None:
            carried.turn(before, kernel, optimizer, s)
        for e in range(segment.first, segment.last):
            while taken < points[e]:
                step = next(stream)
                index, without, full = (t.to(device) for t in (step.index, step.without, step.full))
                if not whole:  # what isn't followed doesn't change
                    index = place[index]
                    known = (index >= 0).to(like.dtype)
                    index, without = index.clamp(min=0), without * known[:, :, None]
                    full = full * known
                b = index.shape[1]
                k, share = along.bracket(taken)
                if taken == along.at[k]:
                    coefficients[:, :, -1] = 0.0  # starts again from what is known
                at = (index + first).flatten()
                rows = at if r == 1 else (at[:, None] * r + within).flatten()
                change = kernel.rows(index) @ coefficients  # [S, B·R, L + 1]
                carried.add_train(change[..., :-1], rows)
                if outputs is None:
                    gradient = gradients[k].index_select(0, at).view(s, b, r, 1)
                    hessian = hessians[0 if len(hessians) == 1 else k].index_select(0, at)
                    if len(hessians) > 1:
                        hessian = torch.lerp(hessian, hessians[k + 1].index_select(0, at), share)
                    if r == 1:
                        force = change.view(s, b, 1, -1).mul_(hessian.view(s, b, 1, 1))
                    else:
                        force = (hessian @ change.view(s * b, r, -1)).view(s, b, r, -1)
                    gradient = gradient + force[..., -1:]
                    removed = (without - full[..., None])[:, :, None]
                    force[..., :-1].mul_(without[:, :, None]).addcmul_(removed, gradient)
                else:
                    assert loss is not None
                    change[..., :-1] += change[..., -1:]  # from the point where outputs are known
                    force = changed_gradient(
                        loss, outputs[k].index_select(0, at), goals.index_select(0, index.flatten()),
                        space.directions.index_select(0, index.flatten()), change.view(s * b, r, -1),
                    ).view(s, b, r, -1)  # fmt: skip
                    gradient = force[..., -1:]
                    force[..., :-1].mul_(without[:, :, None]).sub_(full[..., None, None] * gradient)
                force[..., -1:] = full[..., None, None] * gradient
                optimizer.step(rows, force.view(s * b * r, -1), step.lr)
                carried.step(step.lr)
                taken += 1
            yield carried.add_test(kernel.test @ coefficients[:, :, :-1])


def outputs_at(final_model: FinalModel, parameters: Mapping[str, Tensor], instances: Instances) -> Tensor:
    """Return the flattened outputs ``[n, D]`` with other values of the trainable parameters, in eval mode."""
    return outputs_along(final_model, [parameters], instances)[0]


AT_ONCE = 2**20
"""Elements of one layer's outputs of a network of linear layers that are held at once."""


def outputs_along(
    final_model: FinalModel, points: Sequence[Mapping[str, Tensor]], instances: Instances
) -> Tensor:
    """Return the flattened outputs ``[K, n, D]`` at K values of the trainable parameters, in eval mode."""
    layers, inputs = linear_layers(final_model.network), instances.inputs
    with torch.no_grad():
        fixed = dict(final_model.network.named_parameters())
        if layers is None or not isinstance(inputs, Tensor) or inputs.dim() < 2:
            return torch.stack([_outputs(final_model, p, instances) for p in points])
        inputs = inputs.flatten(1)
        if inputs.shape[1] != fixed[layers[0].weight].shape[1]:  # a layer is applied along other axes
            return torch.stack([_outputs(final_model, p, instances) for p in points])
        width = max(fixed[layer.weight].shape[0] for layer in layers)
        block = max(1, AT_ONCE // (len(inputs) * width))
        found = []
        for start in range(0, len(points), block):
            some = points[start : start + block]
            after = inputs.expand(len(some), -1, -1)
            for layer in layers:
                weight = _stacked(layer.weight, some, fixed).transpose(1, 2)
                if layer.bias is None:
                    before = after @ weight
                else:
                    before = torch.baddbmm(_stacked(layer.bias, some, fixed)[:, None], after, weight)
                after = before
                if layer.activation is not None:
                    after = before if layer.activation.from_output else torch.empty_like(before)
                    layer.activation.forward(before, after)
            found.append(after)
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


def loss_changes_by(propagate: Literal["outputs", "loss"]) -> LossChanges:
    """Return how changes of outputs become changes of losses: exactly, or to first order."""
    return loss_changes if propagate == "outputs" else linear_loss_changes


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
