"""Stacked networks: R copies of a network, evaluated and differentiated together."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fimo.data.instances import Inputs, Instances
from fimo.engine.leave_out import Batch
from fimo.models.attention import plain_attention
from fimo.models.class_losses import LanguageModelling
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.loss_function import Loss
from fimo.models.padding import by_length
from fimo.models.returned import CalledOnce
from fimo.models.train_mode import TrainMode
from fimo.models.vocabulary import NotReachedError, entering

log = logging.getLogger(__name__)

ALIGNED = 16
"""Elements that fill cache lines of 64 bytes: the alignment that matrix libraries ask for."""


class StackedNetwork(ABC):
    """R copies of the final model's network, started from the same parameters.

    Each parameter's R copies lie one after another, each at a multiple of 64 bytes, and all parameters in one
    buffer: optimizers work on one tensor, and a copy's results depend neither on its place nor on R, since
    the matrix library chooses its kernels by the operands' shapes and alignment.

    Args:
        final_model: on the device and in the dtype of the runs.
        replicas: R.
        evaluation_model: the same in the dtype of the test losses.

    Attributes:
        flat, flat_gradient: all parameters and gradients, in one dimension, with zeros between them.
        parameters, gradients: views of them by name, ``[R, ...]``; gradients are filled by
            :meth:`differentiate`.
        unused: the copies and numbers of parameters whose loss did not depend on them there.
    """

    def __init__(self, final_model: FinalModel, replicas: int, evaluation_model: FinalModel) -> None:
        self.replicas, self.loss = replicas, final_model.loss
        self.measurement = final_model.measurement or final_model.loss
        self.evaluation_model = evaluation_model
        self.initial = final_model.parameters()
        first = next(iter(self.initial.values()))
        self.dtype, self.device = first.dtype, first.device
        self.evaluation_dtype = next(iter(evaluation_model.parameters().values())).dtype
        self._blocks: dict[str, tuple[int, int]] = {}
        end = 0
        for name, p in self.initial.items():
            width = p.numel() + -p.numel() % ALIGNED
            self._blocks[name] = (end, width)
            end += replicas * width
        self.flat = torch.zeros(end, dtype=self.dtype, device=self.device)
        self.flat_gradient = torch.zeros_like(self.flat)
        self.parameters = self.views(self.flat)
        self.gradients = self.views(self.flat_gradient)
        self.unused: set[tuple[int, int]] = set()
        for name, p in self.initial.items():
            self.parameters[name].copy_(p.expand_as(self.parameters[name]))
        self._wide = torch.zeros(end, dtype=torch.float64, device=self.device)
        self._wide_start = [block[:1].to(torch.float64, copy=True) for block in self.blocks(self.flat)]

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """Return a buffer of :attr:`flat`'s shape as ``[R, P_k]`` for each parameter k, sharing memory."""
        return [flat[a : a + self.replicas * w].view(-1, w) for a, w in self._blocks.values()]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a buffer of :attr:`flat`'s shape by parameter, ``[R, ...]``, sharing memory."""
        blocks = zip(self.initial.items(), self.blocks(flat), strict=True)
        return {
            name: block[:, : p.numel()].unflatten(1, p.shape) if p.ndim else block[:, 0]
            for (name, p), block in blocks
        }

    def norms(self, flat: Tensor) -> Tensor:
        """Return each copy's Euclidean norm ``[R]`` of a buffer of :attr:`flat`'s shape."""
        squares = [torch.linalg.vector_norm(block, dim=1).square() for block in self.blocks(flat)]
        return torch.stack(squares).sum(0).sqrt()

    def rows(self, flat: Tensor) -> Tensor:
        """Return a copy of a buffer of :attr:`flat`'s shape as ``[R, P']``: what is saved."""
        return torch.cat(self.blocks(flat), 1)

    def load_rows(self, flat: Tensor, rows: Tensor) -> None:
        """Fill a buffer of :attr:`flat`'s shape from ``rows [R or 1, P']``."""
        blocks = self.blocks(flat)
        for block, part in zip(blocks, rows.split([b.shape[1] for b in blocks], 1), strict=True):
            block.copy_(part.expand_as(block))

    @abstractmethod
    def differentiate(self, train: Instances, batch: Batch, seed: int) -> None:
        """Fill the gradients of each replica's weighted loss on its batch.

        Args:
            train: all training instances, which the batch indexes.
            seed: of the step's randomness (dropout), the same for all replicas.
        """

    @abstractmethod
    def outputs(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Return the outputs ``[R, n, ...]`` in eval mode and in the evaluation model's dtype.

        Args:
            parameters: :attr:`parameters` in that dtype.
        """

    def test_losses(self, test: Instances, batch_size: int = 1024, loss: Loss | None = None) -> Tensor:
        """Return the losses ``[R, J]`` of test instances (in the evaluation dtype), in eval mode.

        Args:
            loss: another one than the measurement.
        """
        loss = loss or self.measurement
        parameters = self.parameters
        if self.evaluation_dtype != self.dtype:
            parameters = self.views(self._wide.to(self.evaluation_dtype).copy_(self.flat))
        losses = [self._losses(parameters, batch, loss) for batch in test.batches(batch_size)]
        return torch.cat(losses, 1)

    def _losses(self, parameters: dict[str, Tensor], batch: Instances, loss: Loss) -> Tensor:
        """Return the losses ``[R, n]`` of some test instances; see :meth:`outputs`."""
        outputs = self.outputs(parameters, batch.inputs)
        targets = batch.targets.expand(self.replicas, *batch.targets.shape).flatten(0, 1)
        return loss(outputs.flatten(0, 1), targets).view(self.replicas, -1)

    def distance(self) -> Tensor:
        """Return the Euclidean distance ``[R]`` (float64) of the parameters from the final model's."""
        self._wide.copy_(self.flat)
        for block, start in zip(self.blocks(self._wide), self._wide_start, strict=True):
            block.sub_(start)
        return self.norms(self._wide)


class FunctionalNetwork(StackedNetwork):
    """Any network, by ``torch.func``: vectorised over replicas, or one replica after another.

    Args:
        mode: of the network in training steps.
        vectorise: False where a layer, loss or in-place operation can't be vectorised: same results, slower.
        once: names of modules that are called once for all replicas that see the same batch, one by one.
        micro_batch_size: the most instances of a forward and backward pass; None for whole batches. For
            networks that draw no random numbers.
        vocabulary: name of a layer whose outputs are not computed for all tokens at once, where replicas run
            one after another (:mod:`fimo.models.vocabulary`).
    """

    def __init__(
        self,
        final_model: FinalModel,
        replicas: int,
        evaluation_model: FinalModel,
        mode: TrainMode,
        vectorise: bool = True,
        autocast: torch.dtype | None = None,
        once: Collection[str] = (),
        micro_batch_size: int | None = None,
        vocabulary: str | None = None,
    ) -> None:
        # copies: the final model's own network stays in eval mode, and chunks may run in threads
        super().__init__(final_model, replicas, evaluation_model.to())
        self.vectorise, self.autocast = vectorise, autocast
        self.mode, self.once, self.micro_batch_size = mode, tuple(once), micro_batch_size
        self.vocabulary = None if vectorise else vocabulary
        self._called: CalledOnce | None = None
        self._used: list[set[str]] = []
        self.network = mode.set(FinalModel(final_model.network, final_model.loss).network)
        self.buffers = final_model.buffers()
        self.evaluation_buffers = self.evaluation_model.buffers()
        if vectorise:
            self.buffers = self._for_each_replica(self.buffers)
            self.evaluation_buffers = self._for_each_replica(self.evaluation_buffers)

    def _for_each_replica(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return buffers as stacked tensors ``[R, ...]``, of one copy's memory.

        Vectorised, a product of stacked parameters with a single vector (in spectral normalisation) would be
        one product of another size for each R, with other last digits.
        """
        r = self.replicas
        return {n: b.expand(r, *b.shape) if b.is_floating_point() else b for n, b in buffers.items()}

    @staticmethod
    def _axes(tensors: dict[str, Tensor]) -> dict[str, int | None]:
        """Return which tensors are stacked: parameters and those of :meth:`_for_each_replica`."""
        return {n: 0 if t.is_floating_point() else None for n, t in tensors.items()}

    def differentiate(self, train: Instances, batch: Batch, seed: int) -> None:
        self._used = [set() for _ in range(self.replicas)]
        for k, gradients in enumerate(self._gradients(train, batch, seed)):
            for name, g in gradients.items():
                own = self.gradients[name]
                _ = own.add_(g) if k else own.copy_(g)
        self.unused = {
            (r, k)
            for r, used in enumerate(self._used)
            if len(used) < len(self.parameters)
            for k, name in enumerate(self.parameters)
            if name not in used
        }

    def _gradients(self, train: Instances, batch: Batch, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield gradients ``[R, ...]`` by parameter, whose sum is that of the weighted loss."""
        yield from self._weighted(train, batch.index, batch.weight, seed)
        if batch.extra is not None and batch.extra_weight is not None:
            # a forward of its own: were it appended, the batch's dropout masks would depend on it
            yield from self._weighted(train, batch.extra, batch.extra_weight, seed + 1)

    def _weighted(
        self, train: Instances, index: Tensor, weight: Tensor, seed: int
    ) -> Iterator[dict[str, Tensor]]:
        shared = len(index) == 1
        if not self.vectorise:
            yield self._one_by_one(train[index[0]] if shared else train[index], weight, shared, seed)
            return
        most = self.micro_batch_size or weight.shape[1]
        for part, w in zip(index.split(most, 1), weight.split(most, 1), strict=True):
            yield self._together(train[part[0]] if shared else train[part], w, shared, seed)

    def _together(self, instances: Instances, weight: Tensor, shared: bool, seed: int) -> dict[str, Tensor]:
        axis = None if shared else 0
        # the gradient of the replicas' sum is each one's own; a backward pass over stacked tensors takes
        # about a tenth less of a step than vmap(grad) does
        free = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        with self._training_step(seed), torch.enable_grad():
            tensors = {**self.buffers, **free}
            mapped = vmap(
                self._weighted_loss, in_dims=(self._axes(tensors), axis, axis, 0), randomness="same"
            )
            total = mapped(tensors, instances.inputs, instances.targets, weight).sum()
        return self._gradient(total, free, None, self._used)

    def _weighted_loss(
        self,
        tensors: dict[str, Tensor],
        inputs: Inputs,
        targets: Tensor,
        weight: Tensor,
        network: nn.Module | None = None,
    ) -> Tensor:
        outputs = functional_apply(network or self.network, tensors, inputs)
        return (self.loss(outputs.to(weight.dtype), targets) * weight).sum()

    def _one_by_one(self, instances: Instances, weight: Tensor, shared: bool, seed: int) -> dict[str, Tensor]:
        found = {n: torch.empty_like(p) for n, p in self.parameters.items()}
        network, buffers, calls, after = self.network, self.buffers, None, None
        if shared and self.once:
            if self._called is None:
                with self._training_step(seed):
                    self._called = CalledOnce(self.network, self.once, instances.inputs)
            called = self._called
            with self._training_step(seed) as drawing:
                calls = called.call(instances.inputs)
                after = drawing.generator.get_state()
            of_rest = {n for n, _ in called.rest.named_buffers()}
            buffers = {n: b for n, b in self.buffers.items() if n in of_rest}
        for r in range(self.replicas):
            own = instances if shared else Instances(_row(instances.inputs, r), instances.targets[r])
            parameters = {n: p[r].detach().requires_grad_() for n, p in self.parameters.items()}
            if calls is not None and self._called is not None:
                network = self._called.hand_over(calls)
            # the last part first, as a backward pass of their sum would add them: the same bytes
            for k, (part, w) in enumerate(reversed(self._parts(own, weight[r]))):
                with self._training_step(seed, after), torch.enable_grad():
                    tensors = {**buffers, **parameters}
                    value, weights = self._to_differentiate(tensors, part, w, network)
                for name, g in self._gradient(value, parameters, weights, [self._used[r]]).items():
                    row = found[name][r]
                    _ = row.add_(g) if k else row.copy_(g)
        return found

    @staticmethod
    def _gradient(
        value: Tensor, parameters: dict[str, Tensor], weights: Tensor | None, used: list[set[str]]
    ) -> dict[str, Tensor]:
        """Return gradients by parameter.

        Args:
            used: of each copy, gets the names of those that there is one of, even if it is zero.
        """
        gradients = torch.autograd.grad(value, list(parameters.values()), weights, allow_unused=True)
        names = {name for name, g in zip(parameters, gradients, strict=True) if g is not None}
        for of_copy in used:
            of_copy |= names
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }

    def _to_differentiate(
        self, tensors: dict[str, Tensor], part: Instances, weight: Tensor, network: nn.Module
    ) -> tuple[Tensor, Tensor | None]:
        """Return values and weights such that the weighted loss has the gradient of their products' sum."""
        found = self._before_vocabulary(network, tensors, part.inputs, self.loss)
        if found is None:
            return self._weighted_loss(tensors, part.inputs, part.targets, weight, network), None
        loss, layer, x = found
        return x, loss.gradient_before(layer, x.detach(), part.targets).mul_(weight[:, None, None])

    def _before_vocabulary(
        self, network: nn.Module, tensors: dict[str, Tensor], inputs: Inputs, loss: Loss
    ) -> tuple[LanguageModelling, nn.Linear, Tensor] | None:
        """Return the loss, the vocabulary's layer, and what enters it; None where outputs are computed."""
        if self.vocabulary is None or not isinstance(loss, LanguageModelling):
            return None
        layer = network.get_submodule(self.vocabulary)
        assert isinstance(layer, nn.Linear)
        try:
            return loss, layer, entering(layer, lambda: functional_apply(network, tensors, inputs))
        except NotReachedError:  # with these instances something is done with the logits
            return None

    def _losses(self, parameters: dict[str, Tensor], batch: Instances, loss: Loss) -> Tensor:
        if self.vectorise:
            return super()._losses(parameters, batch, loss)
        network = self.evaluation_model.network

        def of_part(tensors: dict[str, Tensor], at: Tensor) -> Tensor:
            part = batch[at]
            before = self._before_vocabulary(network, tensors, part.inputs, loss)
            if before is None:
                return loss(functional_apply(network, tensors, part.inputs), part.targets)
            return before[0].losses_before(*before[1:], part.targets)

        return self._each(parameters, batch.inputs, of_part)

    def _each(
        self,
        parameters: dict[str, Tensor],
        inputs: Inputs,
        of_part: Callable[[dict[str, Tensor], Tensor], Tensor],
    ) -> Tensor:
        """Return what a function makes of instances, one replica after another, in order ``[R, n, ...]``.

        Args:
            of_part: of a replica's tensors, and the numbers of some instances of about the same length.
        """
        parts = by_length(self.evaluation_model.network, inputs)
        back = torch.cat(parts).argsort()
        found = []
        for r in range(self.replicas):  # what one replica makes on the way is in memory
            tensors = {**self.evaluation_buffers, **{n: p[r] for n, p in parameters.items()}}
            found.append(torch.cat([of_part(tensors, part) for part in parts])[back])
        return torch.stack(found)

    def _parts(self, instances: Instances, weight: Tensor) -> list[tuple[Instances, Tensor]]:
        """Return a batch and its weights in parts of like length, whose losses add up.

        Random numbers of parts would be others than the batch's.
        """
        if self.mode.stochastic:
            return [(instances, weight)]
        parts = by_length(self.network, instances.inputs)
        if self.micro_batch_size is not None:
            parts = [small for part in parts for small in part.split(self.micro_batch_size)]
        return (
            [(instances[part], weight[part]) for part in parts] if len(parts) > 1 else [(instances, weight)]
        )

    @contextlib.contextmanager
    def _training_step(self, seed: int, after: Tensor | None = None) -> Iterator[Any]:
        """Set a step's random state, precision, and an attention kernel that can be vectorised.

        Args:
            after: of the generator, where a part of the step has drawn already.
        """
        lower = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with lower, plain_attention(), self.mode.drawing(seed, self.device, after) as drawing:
            yield drawing

    def outputs(self, parameters: dict[str, Tensor], inputs: Inputs) -> Tensor:
        network = self.evaluation_model.network
        if self.vectorise:
            tensors = {**self.evaluation_buffers, **parameters}
            mapped = vmap(lambda t: functional_apply(network, t, inputs), in_dims=(self._axes(tensors),))
            return mapped(tensors)
        return self._each(parameters, inputs, lambda t, at: functional_apply(network, t, _row(inputs, at)))


def without_gradient(final_model: FinalModel, train: Instances) -> list[str]:
    """Return the names of trainable parameters that the loss does not depend on (an unused pooler)."""
    network = final_model.network
    free = {n: p.clone().requires_grad_() for n, p in final_model.parameters().items()}
    two = train[:2]
    with torch.enable_grad():
        outputs = functional_apply(network, {**final_model.buffers(), **free}, two.inputs)
        loss = final_model.loss(outputs, two.targets).sum()
        found = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
    return [name for name, g in zip(free, found, strict=True) if g is None]


def _row(inputs: Inputs, r: int | Tensor) -> Inputs:
    return {k: v[r] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[r]
