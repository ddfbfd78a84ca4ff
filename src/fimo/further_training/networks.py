"""Stacked networks: R copies of a network, evaluated and differentiated together."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimo.data.instances import Inputs, Instances
from fimo.further_training.schedule import Batch
from fimo.models.final_model import FinalModel, functional_apply

log = logging.getLogger(__name__)


class StackedNetwork(ABC):
    """R copies of the final model's network, started from the same parameters.

    Args:
        final_model: on the device and in the dtype of the runs.
        replicas: R.
        evaluation_model: the same in the dtype of the test losses.

    Attributes:
        parameters: by name, ``[R, ...]``; updated in place.
        gradients: of the same shapes, filled by :meth:`differentiate`.
    """

    def __init__(self, final_model: FinalModel, replicas: int, evaluation_model: FinalModel) -> None:
        self.replicas, self.loss = replicas, final_model.loss
        self.evaluation_model = evaluation_model
        self.initial = final_model.parameters()
        self.parameters = {n: p.expand(replicas, *p.shape).clone() for n, p in self.initial.items()}
        self.gradients = {n: torch.zeros_like(p) for n, p in self.parameters.items()}

    @abstractmethod
    def differentiate(self, train: Instances, batch: Batch, seed: int) -> None:
        """Fill the gradients of each replica's weighted loss on its batch.

        Args:
            train: all training instances, which the batch indexes.
            seed: of the step's randomness (dropout), the same for all replicas.
        """

    @abstractmethod
    def outputs(self, inputs: Inputs) -> Tensor:
        """Return the outputs ``[R, n, ...]`` in eval mode and in the evaluation model's dtype."""

    def test_losses(self, test: Instances, batch_size: int = 1024) -> Tensor:
        """Return the losses ``[R, J]`` of test instances (in the evaluation dtype), in eval mode."""
        losses = []
        for batch in test.batches(batch_size):
            outputs = self.outputs(batch.inputs)
            targets = batch.targets.expand(self.replicas, *batch.targets.shape).flatten(0, 1)
            losses.append(self.loss(outputs.flatten(0, 1), targets).view(self.replicas, -1))
        return torch.cat(losses, 1)

    def distance(self) -> Tensor:
        """Return the Euclidean distance ``[R]`` (float64) of the parameters from the final model's."""
        squares = torch.zeros(self.replicas, dtype=torch.float64, device=next(iter(self.initial.values())).device)
        for name, p in self.parameters.items():
            squares += (p - self.initial[name]).double().flatten(1).square().sum(1)
        return squares.sqrt()


class FunctionalNetwork(StackedNetwork):
    """Any network, by ``torch.func``: vectorised over replicas, or one replica after another.

    Args:
        vectorise: False where a layer, loss or in-place operation can't be vectorised: same results, slower.
    """

    def __init__(
        self, final_model: FinalModel, replicas: int, evaluation_model: FinalModel, vectorise: bool = True
    ) -> None:
        super().__init__(final_model, replicas, evaluation_model)
        self.vectorise = vectorise
        # a copy, so that the final model's own network stays in eval mode
        self.network = training_mode(FinalModel(final_model.network, final_model.loss).network)
        self.buffers = final_model.buffers()
        self.stochastic = is_stochastic(self.network)

    def differentiate(self, train: Instances, batch: Batch, seed: int) -> None:
        shared = len(batch.index) == 1
        instances = train[batch.index[0]] if shared else train[batch.index]
        gradients = self._weighted(instances, batch.weight, shared, seed)
        if batch.extra is not None and batch.extra_weight is not None:
            # a forward of its own: were it appended, the batch's dropout masks would depend on it
            extra = self._weighted(train[batch.extra], batch.extra_weight, False, seed + 1)
            gradients = {n: g + extra[n] for n, g in gradients.items()}
        self.gradients = gradients

    def _weighted(self, instances: Instances, weight: Tensor, shared: bool, seed: int) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], inputs: Inputs, targets: Tensor, weight: Tensor) -> Tensor:
            outputs = functional_apply(self.network, {**self.buffers, **parameters}, inputs)
            return (self.loss(outputs, targets) * weight).sum()

        inputs, targets = instances.inputs, instances.targets
        axis = None if shared else 0
        with sdpa_kernel(SDPBackend.MATH), _seeded(seed if self.stochastic else None, targets.device):
            if self.vectorise:
                mapped = vmap(grad(loss), in_dims=(0, axis, axis, 0), randomness="same")
                return mapped(self.parameters, inputs, targets, weight)
        single = []
        for r in range(self.replicas):
            with _seeded(seed if self.stochastic else None, targets.device):
                own = instances if shared else Instances(_row(inputs, r), targets[r])
                parameters = {n: p[r].detach().requires_grad_() for n, p in self.parameters.items()}
                with torch.enable_grad():
                    value = loss(parameters, own.inputs, own.targets, weight[r])
                found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
                single.append(dict(zip(parameters, found, strict=True)))
        return {n: torch.stack([g[n] for g in single]) for n in self.parameters}

    def outputs(self, inputs: Inputs) -> Tensor:
        model = self.evaluation_model
        dtype = next(iter(model.parameters().values())).dtype
        wide = {n: p.to(dtype) for n, p in self.parameters.items()}
        buffers = model.buffers()

        def one(parameters: dict[str, Tensor]) -> Tensor:
            return functional_apply(model.network, {**buffers, **parameters}, inputs)

        with sdpa_kernel(SDPBackend.MATH):
            if self.vectorise:
                return vmap(one)(wide)
            return torch.stack([one({n: p[r] for n, p in wide.items()}) for r in range(self.replicas)])


def training_mode(network: nn.Module) -> nn.Module:
    """Put a network in train mode, but for batch normalisation, whose statistics stay frozen."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return network


def is_stochastic(network: nn.Module) -> bool:
    """Return whether a forward pass in train mode draws random numbers (dropout of any kind)."""
    for module in network.modules():
        rates = (getattr(module, name, 0.0) for name in ("p", "dropout", "attention_dropout", "drop_prob"))
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


class _seeded:
    """Run a block with the random state of ``seed`` and put the caller's back; nothing if None."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.seed = seed
        devices = [device] if device.type == "cuda" else []
        self.fork = torch.random.fork_rng(devices=devices, enabled=seed is not None)

    def __enter__(self) -> None:
        self.fork.__enter__()
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(*error)


def _row(inputs: Inputs, r: int) -> Inputs:
    return {k: v[r] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[r]


def stack_network(
    final_model: FinalModel, replicas: int, evaluation_model: FinalModel, engine: str
) -> StackedNetwork:
    """Return the stacked network of an engine: ``linear``, ``functional`` or ``loop``."""
    from fimo.further_training.linear import LinearNetwork

    if engine == "linear":
        return LinearNetwork(final_model, replicas, evaluation_model)
    return FunctionalNetwork(final_model, replicas, evaluation_model, vectorise=engine == "functional")


def choose_engine(final_model: FinalModel, train: Instances) -> str:
    """Return the fastest engine that can run a network: ``linear``, else ``functional``, else ``loop``.

    Whether ``torch.func`` can vectorise it is tried on two replicas and two instances.
    """
    from fimo.further_training.linear import linear_layers

    if linear_layers(final_model.network) is not None and not isinstance(train.inputs, dict):
        return "linear"
    probe = FunctionalNetwork(final_model, 2, final_model)
    weight = torch.ones(2, 2, dtype=next(iter(final_model.parameters().values())).dtype, device=train.targets.device)
    index = torch.arange(2, device=train.targets.device).expand(2, 2)
    try:
        probe.differentiate(train, Batch(index, weight), 0)
        probe.outputs(train[:2].inputs)
    except Exception as error:
        log.warning("further training runs replicas one by one: torch.func can't vectorise this network (%s)", error)
        return "loop"
    return "functional"
