"""One optimizer step of the full run as a pure function, for derivatives along its trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from fimo.data.instances import Inputs, Instances
from fimo.engine.choice import choose_engine
from fimo.engine.chunk import step_seed
from fimo.engine.leave_out import BatchStream, make_rule, members_of
from fimo.engine.optimizers import State, Tensors, safe_sqrt
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.replicas import Replica, Unit
from fimo.errors import InputError
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.forward_mode import jvp, lacking_derivatives_named
from fimo.models.linear_layers import Linearised, forward, linear_layers
from fimo.models.train_mode import TrainMode


@dataclass(frozen=True)
class StepBatch:
    """The instances of one step.

    Args:
        index: ``[B]`` into the training set.
        extra: ``[G]``, instances outside the batch that the leave-out rule adds losses of.
        weight: ``[B + G]``, what each loss is multiplied with: 1 / B, and 0.
    """

    step: int
    index: Tensor
    extra: Tensor
    weight: Tensor


class FullRun:
    """A seed's full run, step by step, as pure functions of the state and of instances' weights.

    The weight w_i of instance i is 1; leaving i out makes it 0. Under ``mask`` (and ``shift``, which is
    linearised as ``mask``: its later batches are others altogether) it multiplies the instance's loss where
    it occurs; under ``every_batch`` (w_i - 1) l_i / N is added to every batch's mean loss, which
    ``reweighted`` then divides by the mean weight.

    Args:
        units: whose weights derivatives are taken for; all N instances when None.
        dtype: of the run; the protocol's when None.

    Raises:
        InputError: the optimizer's step has no derivative to follow.
    """

    def __init__(
        self,
        final_model: FinalModel,
        train: Instances,
        protocol: Protocol,
        seed: int,
        units: Sequence[Unit] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if reason := protocol.update_rule.underivable:
            raise InputError("further_training.optimizer", reason)
        self.rule = make_rule(protocol, train)
        self.dtype = DTYPES[protocol.dtype] if dtype is None else dtype
        self.model, self.train = final_model.to(device, self.dtype), train.to(device, self.dtype)
        self.protocol, self.seed, self.device = protocol, seed, torch.device(device)
        self.mode = mode = TrainMode.of(self.model, self.train)
        self.network = mode.set(FinalModel(self.model.network, self.model.loss).network)
        self.buffers = self.model.buffers()
        linear = choose_engine(self.model, self.train, mode) == "linear"
        self.layers = linear_layers(self.network) if linear else None
        self.total = protocol.total_steps(len(train))
        self.points = protocol.evaluation_steps(len(train), len(train))
        members: Sequence[int] = []
        if self.rule.outside(torch.ones(1), 1) is not None:
            members = sorted({i for unit in units for i in unit}) if units is not None else range(len(train))
        self.extra = torch.tensor(list(members), dtype=torch.int64, device=self.device)

    def start(self) -> State:
        """Return the final model's parameters, and an optimizer's fresh state."""
        parameters = self.model.parameters()
        names = self.protocol.update_rule.state
        zeros = {k: {n: torch.zeros_like(p) for n, p in parameters.items()} for k in names}
        return {"parameters": parameters, **zeros}

    def batches(self, first: int = 0) -> Iterator[StepBatch]:
        """Yield the batches of the seed's steps from step ``first`` on."""
        stream = BatchStream([Replica(self.seed)], self.rule, self.protocol, self.dtype, self.device)
        none = torch.zeros(len(self.extra), dtype=self.dtype, device=self.device)
        for step, batch in enumerate(stream.starting_at(first), first):
            yield StepBatch(step, batch.index[0], self.extra, torch.cat([batch.weight[0], none]))

    def weight_derivative(self, batch: StepBatch, units: Sequence[Unit]) -> Tensor:
        """Return the derivative ``[L, B + G]`` of a batch's weights in the weight of each unit."""
        members = members_of(self.rule, units).to(self.device)
        instances = torch.cat([batch.index, batch.extra])
        of_unit = (instances[None, :, None] == members[:, None, :]).any(-1).to(self.dtype)
        return self.rule.of_own_weights(of_unit, batch.weight, len(batch.index))

    def losses(self, parameters: Tensors, batch: StepBatch) -> Tensor:
        """Return the losses ``[B + G]`` of a batch's instances, in train mode."""

        def of(index: Tensor) -> Tensor:
            instances = self.train[index]
            outputs = functional_apply(self.network, {**self.buffers, **parameters}, instances.inputs)
            return self.model.loss(outputs, instances.targets)

        return torch.cat([of(batch.index), of(batch.extra)]) if len(batch.extra) else of(batch.index)

    def gradient(self, parameters: Tensors, batch: StepBatch) -> Tensors:
        """Return the gradient of sum_b weight_b loss_b."""
        with lacking_derivatives_named():
            total: Tensors = grad(lambda p: (self.losses(p, batch) * batch.weight).sum())(parameters)
        return total

    def gradient_and_tangents(
        self, parameters: Tensors, directions: Tensors, batch: StepBatch, weight_directions: Tensor
    ) -> tuple[Tensors, Tensors, Tensor]:
        """Return the batch's gradient, its directional derivatives, and those of the losses.

        Args:
            directions: of the parameters, ``[M, ...]`` by name.
            weight_directions: ``[M, B + G]``.

        Returns:
            Gradient by name, its derivatives ``[M, ...]`` by name, and derivatives of losses ``[M, B + G]``.
        """
        if self.layers is not None:
            instances = self.train[torch.cat([batch.index, batch.extra])]
            assert isinstance(instances.inputs, Tensor)
            passed = forward(self.layers, parameters, instances.inputs.flatten(1))
            slope = self.model.loss.gradient(passed.outputs, instances.targets)
            at = Linearised.at(self.layers, parameters, passed, batch.weight[:, None] * slope)
            pushed = at.push(directions)
            curved = self.model.loss.hessian_times(passed.outputs, instances.targets, pushed.outputs)
            of_weights = weight_directions.T[:, :, None] * slope[:, None]
            d_slope = of_weights + batch.weight[:, None, None] * curved
            gradient, d_gradient = at.gradient(), at.pull(directions, pushed, d_slope)
            d_losses = torch.einsum("bd,bmd->mb", slope, pushed.outputs)
            return {n: gradient[n] for n in parameters}, {n: d_gradient[n] for n in parameters}, d_losses

        def weighted(p: Tensors, weight: Tensor) -> tuple[Tensor, Tensor]:
            losses = self.losses(p, batch)
            return (losses * weight).sum(), losses

        def one(direction: Tensors, weight_direction: Tensor) -> tuple[Tensors, Tensors, Tensor]:
            (gradient, _), (d_gradient, d_losses) = jvp(
                grad(weighted, has_aux=True), (parameters, batch.weight), (direction, weight_direction)
            )
            return gradient, d_gradient, d_losses

        mapped = vmap(one, out_dims=(None, 0, 0), randomness="same")  # type: ignore[arg-type]
        return mapped(directions, weight_directions)

    def update(self, state: State, gradient: Tensors, step: int) -> State:
        """Return the state after the optimizer's step along a gradient, as torch.optim defines it."""
        lr, clip_norm = self.protocol.learning_rate(step, self.total), self.protocol.clip_norm
        if clip_norm is not None:
            norm = safe_sqrt(torch.stack([g.square().sum() for g in gradient.values()]).sum())
            scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradient = {n: g * scale for n, g in gradient.items()}
        return self.protocol.update_rule.updated(state, gradient, lr, step + 1)

    def randomness(self, step: int) -> AbstractContextManager[object]:
        """Draw the step's random numbers (dropout) in the context."""
        return self.mode.drawing(step_seed(self.seed, step), self.device)


def evaluate_outputs(model: FinalModel, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Return outputs ``[n, ...]`` in eval mode."""
    return functional_apply(model.network, {**model.buffers(), **parameters}, inputs)
