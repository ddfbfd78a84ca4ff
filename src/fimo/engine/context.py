"""What all runs of a job share, and how much is computed at a time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.choice import Engine, called_once, choose_engine, frozen_vocabulary, is_linear
from fimo.engine.graphs import Record, cuda_graph
from fimo.engine.leave_out import RULES, LeaveOut, make_rule
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.replicas import even_parts
from fimo.engine.stacked import without_gradient
from fimo.errors import InputError, reason, shortened
from fimo.models.final_model import FinalModel
from fimo.models.returned import HandOver
from fimo.models.train_mode import TrainMode

log = logging.getLogger(__name__)

CPU_BYTES = {"linear": 4 * 2**20, "functional": 64 * 2**20}
"""Parameters, gradients and activations of a chunk on a CPU: about a core's share of its caches, but for
networks whose many small operations cost more than memory does."""

FEWEST_TOGETHER = 4
"""Fewer replicas that fit ``CPU_BYTES`` run one after another, also where they could be vectorised: their
operations are so large that calling them costs nothing, and caches hold more of a single replica. Measured
for ResNet-9 of width 4, 8 and 16 at batch 32 (one fits): together 1.0, 0.9 and 0.8 times as fast; for a small
convolutional net and a small transformer (40 and 23 fit): 1.8 times."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a job share, on one device.

    Args:
        final_model, train: in the dtype of the runs.
        evaluation_model, test: in the dtype of the test losses.
        rule: of leaving out.
        activations: elements that the network's layers produce for one instance.
        mode: of the network in training steps.
        vectorisable: replicas could be advanced together; where they run one after another all the same,
            that is faster.
        once: frozen modules that are called once for all replicas of a chunk in a step; see
            :func:`~fimo.engine.choice.called_once`.
        vocabulary: a language model's frozen last layer, of whose outputs a few at a time are made; see
            :func:`~fimo.engine.choice.frozen_vocabulary`.
    """

    final_model: FinalModel
    evaluation_model: FinalModel
    train: Instances
    test: Instances
    protocol: Protocol
    rule: LeaveOut
    engine: Engine
    activations: int = 1
    mode: TrainMode = field(default_factory=TrainMode)
    vectorisable: bool = True
    once: tuple[str, ...] = ()
    vocabulary: str | None = None

    @classmethod
    def build(
        cls,
        final_model: FinalModel,
        train: Instances,
        test: Instances,
        protocol: Protocol,
        device: torch.device | str = "cpu",
    ) -> Setting:
        """Move everything to ``device`` and choose the engine.

        Raises:
            InputError: the network does not run in a type of the protocol.
        """
        rule = make_rule(protocol, train)
        dtype, wide = DTYPES[protocol.dtype], DTYPES[protocol.evaluation_dtype]
        model, train = final_model.to(device, dtype), train.to(device, dtype)
        evaluation_model, test = final_model.to(device, wide), test.to(device, wide)
        _require_runs(model, train, "further_training.dtype")
        _require_runs(evaluation_model, test, "further_training.evaluation_dtype")
        mode = TrainMode.of(model, train)
        check_micro_batches(protocol, model, train, mode)
        engine = choose_engine(model, train, mode, protocol.autocast_dtype)
        if unused := without_gradient(model, train):
            log.info("the loss does not depend on %s: further training leaves them alone", shortened(unused))
        activations = _activations(model, train, engine)
        vectorisable = engine != "loop"
        if engine == "functional" and torch.device(device).type == "cpu":
            one = replica_bytes(model, protocol, activations, engine)
            if one * FEWEST_TOGETHER > CPU_BYTES["functional"]:
                engine = "loop"
                log.info(
                    "replicas run one after another: a step of this network takes %.0f MB, and together "
                    "they would be no faster on a CPU",
                    one / 2**20,
                )
        once = called_once(model, train, mode) if engine == "loop" and rule.shares_batches else ()
        # with lower precision, the layer's own products would have it
        apart = engine == "loop" and protocol.autocast is None
        vocabulary = frozen_vocabulary(model, train, mode) if apart else None
        if once:
            log.info("in each step, runs of a seed share the frozen part with its dropout masks")
        return cls(
            model,
            evaluation_model,
            train,
            test,
            protocol,
            rule,
            engine,
            activations,
            mode,
            vectorisable,
            once,
            vocabulary,
        )

    def __post_init__(self) -> None:
        if type(self.rule) is not RULES[self.protocol.leave_out]:
            raise ValueError(f"{type(self.rule).__name__} for a protocol with {self.protocol.leave_out}")

    def following(self, protocol: Protocol) -> Setting:
        """Return the setting of another protocol in the same numbers, with its rule."""
        return replace(self, protocol=protocol, rule=make_rule(protocol, self.train))

    @property
    def stochastic(self) -> bool:
        """Whether training steps draw random numbers (dropout)."""
        return self.mode.stochastic

    @property
    def repeatable(self) -> bool:
        """Whether every step is the same operations on tensors, with the same numbers besides."""
        return self.protocol.schedule == "constant" and self.engine != "loop" and not self.stochastic

    @property
    def record(self) -> Record | None:
        """How steps are recorded; None: operations are called at every step."""
        chosen = self.protocol.graphs and self.device.type == "cuda"
        return cuda_graph if chosen and self.repeatable else None

    @property
    def device(self) -> torch.device:
        return self.train.targets.device


def replica_bytes(final_model: FinalModel, protocol: Protocol, activations: int, engine: Engine) -> int:
    """Return about how much memory a step of one replica works on."""
    linear = engine == "linear"
    # values and their gradients; automatic differentiation keeps about as much again
    kept = (2 if linear else 4) * activations * protocol.kept_instances
    copies = 2 + len(protocol.update_rule.state) + (0 if linear else 2)
    return (8 if protocol.dtype == "float64" else 4) * (kept + copies * final_model.size)


def check_micro_batches(
    protocol: Protocol, final_model: FinalModel, train: Instances, mode: TrainMode | None = None
) -> None:
    """Refuse parts of batches where they would be others than the batch, or of no use.

    Args:
        mode: of the network in training steps; tried when None.

    Raises:
        InputError: naming ``further_training.micro_batch_size``.
    """
    if protocol.micro_batch_size is None:
        return
    key = "further_training.micro_batch_size"
    if (mode or TrainMode.of(final_model, train)).stochastic:
        raise InputError(
            key,
            "training steps draw random numbers (dropout), which parts of a batch would draw otherwise than "
            "the batch; expected null, or a network with rates of 0",
        )
    if protocol.autocast_dtype is None and is_linear(final_model, train):
        raise InputError(key, "a network of linear layers is run by products of whole batches; expected null")


def chunk_size(setting: Setting, runs: int) -> int:
    """Return the number of replicas of a chunk: what caches hold, or half of a GPU's free memory.

    Chunks are as many as workers, or a multiple of that, and about equally large, so that none waits at the
    end.

    Args:
        runs: of the job, but for full runs.
    """
    workers = worker_threads(setting)
    if setting.engine == "loop":
        return even_parts(runs, 8, workers)[0]
    one = replica_bytes(setting.final_model, setting.protocol, setting.activations, setting.engine)
    if setting.device.type == "cuda":
        n = len(setting.train)
        # test losses stay on the device until a chunk is finished: changes, and the full run's
        one += 12 * len(setting.protocol.evaluation_steps(n, n)) * len(setting.test)
        free, _ = torch.cuda.mem_get_info(setting.device)
        free += torch.cuda.memory_reserved(setting.device) - torch.cuda.memory_allocated(setting.device)
        return max(2, even_parts(runs, min(4096, int(0.5 * free / one)), workers)[0])
    return max(2, even_parts(runs, min(128, int(CPU_BYTES[setting.engine] / one)), workers)[0])


def worker_threads(setting: Setting) -> int:
    """Return how many chunks are advanced at a time: one for each thread of a CPU.

    One where a network that can't be vectorised may share state between its copies: in hooks, or in random
    numbers that its backward pass draws.
    """
    if setting.device.type != "cpu":
        return 1
    mode = setting.mode
    draws = mode.stochastic and not mode.only_masks
    shares = not setting.vectorisable and (draws or _has_hooks(setting.final_model.network))
    return 1 if shares else torch.get_num_threads()


def _has_hooks(network: nn.Module) -> bool:
    return any(
        not isinstance(hook, HandOver)  # which keeps nothing
        for m in network.modules()
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        for hook in hooks.values()
    )


def evaluation_batch(setting: Setting) -> int:
    """Return how many test instances are evaluated at a time, for all replicas of a chunk.

    It does not depend on the number of replicas: the last digits of a loss may depend on the batch.
    """
    elements = 2**17 if setting.device.type == "cuda" else 2**15
    least = max(1, min(16, 2**26 // setting.activations))  # of 4 million each, as a vocabulary's logits are
    return max(least, min(4096, elements // setting.activations // 16 * 16))


def _require_runs(model: FinalModel, instances: Instances, key: str) -> None:
    """Refuse a network that does not run in its parameters' type, as one that casts to another inside."""
    dtype = str(next(iter(model.parameters().values())).dtype).removeprefix("torch.")
    try:
        model.outputs(instances[:1])
    except Exception as error:  # whatever a network makes of another type
        said = f"the network does not run in {dtype}: {reason(error)}"
        raise InputError(key, f"{said}; in other types it may, at their resolution") from error


def _activations(final_model: FinalModel, train: Instances, engine: Engine) -> int:
    """Count the elements of layers' outputs for one instance (of linear ones where the rest is in place)."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: object, outputs: object) -> None:
        sizes.append(outputs.numel() if isinstance(outputs, Tensor) else 0)

    leaves = [m for m in final_model.network.modules() if not list(m.children())]
    if engine == "linear":
        leaves = [m for m in leaves if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(count) for m in leaves]
    try:
        final_model.outputs(train[:1])
    finally:
        for handle in handles:
            handle.remove()
    return max(1, sum(sizes))
