"""A chunk: replicas advanced together, from the final model or from a saved state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.choice import stack_network
from fimo.engine.context import Setting, evaluation_batch
from fimo.engine.devices import products
from fimo.engine.graphs import GraphedSteps
from fimo.engine.leave_out import Batch, BatchStream, LeaveOut
from fimo.engine.linear import LinearNetwork
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.engine.stacked import StackedNetwork
from fimo.errors import InputError
from fimo.models.loss_function import Loss


class StackedOptimizer:
    """Moves a stacked network's R copies, each by its own gradient.

    Args:
        network: whose ``flat`` parameters are moved along its ``flat_gradient``.
        protocol: optimizer and clipping.

    Attributes:
        state: the optimizer's tensors by name, of the shape of ``flat``.
        taken: steps made so far, on the device: a recorded step counts there.
        skipped: how many of them left a copy's parameter as it is, by their numbers.
    """

    def __init__(self, network: StackedNetwork, protocol: Protocol) -> None:
        self.network, self.rule, self.clip_norm = network, protocol.update_rule, protocol.clip_norm
        self.state = {name: torch.zeros_like(network.flat) for name in self.rule.state}
        self.taken = torch.zeros((), dtype=torch.float32, device=network.device)
        self.skipped: Counter[tuple[int, int]] = Counter()

    @property
    def fusible(self) -> bool:
        """Whether a step is parameters - lr * (gradient + decay * parameters), with no state."""
        return self.rule.is_plain and self.clip_norm is None

    def step(self, lr: float) -> None:
        """Make one step along the network's gradient, which is overwritten.

        As in torch.optim, a parameter without a gradient, which a batch's loss does not depend on, is left as
        it is: without momentum, decay, and a step that counts.
        """
        network, gradient = self.network, self.network.flat_gradient
        self.taken.add_(1)
        if self.clip_norm is not None:
            scale = (self.clip_norm / (network.norms(gradient) + 1e-6)).clamp_(max=1.0)
            for block in network.blocks(gradient):
                block.mul_(scale[:, None])
        rests = self.rule.is_plain and not self.rule.weight_decay  # without a gradient, by itself
        # these are stepped apart, all others together
        places = [] if rests else sorted({*network.unused, *self.skipped})
        flats = (network.flat, gradient, *self.state.values()) if places else ()
        columns = [network.blocks(flat) for flat in flats]
        before = [[blocks[k][r].clone() for blocks in columns] for r, k in places]
        self.rule.step_(network.flat, gradient, self.state, lr, self.taken)
        for (r, k), tensors in zip(places, before, strict=True):
            if (r, k) not in network.unused:
                parameters, own, *state = tensors
                taken = self.taken - self.skipped[r, k]
                self.rule.step_(parameters, own, dict(zip(self.state, state, strict=True)), lr, taken)
            elif self.rule.counts_steps:
                self.skipped[r, k] += 1
            for blocks, tensor in zip(columns, tensors, strict=True):
                blocks[k][r] = tensor


class Chunk:
    """Replicas that take the same optimizer steps, advanced together.

    Args:
        replicas: R of them; none twice.
    """

    def __init__(self, setting: Setting, replicas: Sequence[Replica]) -> None:
        self.setting, self.replicas = setting, tuple(replicas)
        if setting.protocol.autocast == "tf32" and setting.device.type != "cuda":
            problem = f"tf32 is a GPU's, but runs are made on {setting.device.type}"
            raise InputError("further_training.autocast", problem)
        # libraries treat a single product or convolution otherwise: a single run has a companion, which is
        # dropped, so that its last digits are those of the same run among others
        alone = len(replicas) == 1 and setting.engine != "loop"
        rows = self.replicas * 2 if alone else self.replicas
        self.network = stack_network(
            setting.final_model,
            len(rows),
            setting.evaluation_model,
            setting.engine,
            setting.mode,
            setting.protocol.autocast_dtype,
            setting.once,
            setting.protocol.micro_batch_size,
            setting.vocabulary,
        )
        self.optimizer = StackedOptimizer(self.network, setting.protocol)
        self.stream = BatchStream(rows, setting.rule, setting.protocol, self.network.dtype, setting.device)
        self.total_steps = setting.protocol.total_steps(len(setting.train))
        self.step = 0
        self._batches = self.stream.starting_at(0)
        self._graphs = GraphedSteps(setting.record) if setting.record is not None else None

    def follow(self, batches: Iterator[Batch]) -> None:
        """Take further steps on other batches ``[R, B]`` than the protocol's."""
        self._batches = batches

    def start_from_full_run(self, steps: int) -> None:
        """Take the first ``steps``, which all replicas share with their seed's full run, once for all."""
        full = Chunk(self.setting, [Replica(self.replicas[0].seed)])
        full.advance(steps)
        self.restore({name: t[:1] for name, t in full.state().items()}, steps)

    @property
    def evaluation_steps(self) -> list[int]:
        """Optimizer steps ``[E]`` of these replicas' evaluation points."""
        return self.setting.protocol.evaluation_steps(self.stream.kept, len(self.setting.train))

    def advance(self, to_step: int) -> None:
        """Take optimizer steps until ``to_step``."""
        protocol = self.setting.protocol
        with torch.no_grad(), products(self.setting.device, protocol.autocast == "tf32"):
            while self.step < to_step:
                batch = next(self._batches)
                if self._graphs is None:
                    self._take(batch)
                else:
                    self._graphs.take(self._take, batch)
                self.step += 1

    def _take(self, batch: Batch) -> None:
        setting, network = self.setting, self.network
        lr = setting.protocol.learning_rate(self.step, self.total_steps)
        if isinstance(network, LinearNetwork) and self.optimizer.fusible:
            network.descend(setting.train, batch, lr, self.optimizer.rule.weight_decay)
        else:
            network.differentiate(setting.train, batch, step_seed(self.stream.seeds[0], self.step))
            self.optimizer.step(lr)

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Return the test losses ``[R, J]`` and the distances from the final model ``[R]`` (float64)."""
        losses, distance = self.measured()
        return losses.cpu(), distance.cpu()

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return what :meth:`evaluate` does, on the device, without waiting for it."""
        r = len(self.replicas)
        with torch.no_grad(), products(self.setting.device, False):
            losses = self.network.test_losses(self.setting.test, evaluation_batch(self.setting))
            return losses[:r].double(), self.network.distance()[:r]

    def losses(self, instances: Instances, loss: Loss) -> Tensor:
        """Return losses ``[R, n]`` (float64) of instances in the evaluation dtype, on the CPU."""
        with torch.no_grad(), products(self.setting.device, False):
            found = self.network.test_losses(instances, evaluation_batch(self.setting), loss)
            return found[: len(self.replicas)].double().cpu()

    def state(self) -> dict[str, Tensor]:
        """Return a copy of all that the rest of the runs depends on: by name, ``[R, P']`` (or ``[R, K]``)."""
        rows = {name: self.network.rows(flat) for name, flat in self.buffers().items()}
        if not self.optimizer.skipped:
            return rows
        skipped = torch.zeros(self.network.replicas, len(self.network.initial), dtype=torch.int64)
        for place, steps in self.optimizer.skipped.items():
            skipped[place] = steps
        return {**rows, "skipped": skipped}

    def buffers(self) -> dict[str, Tensor]:
        return {"parameters": self.network.flat, **self.optimizer.state}

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue from a state after ``step`` optimizer steps."""
        for name, flat in self.buffers().items():
            rows = state[name].to(flat.device)
            self.network.load_rows(flat, rows if len(rows) == self.network.replicas else rows[:1])
        skipped = state.get("skipped", torch.zeros(1, len(self.network.initial), dtype=torch.int64))
        skipped = skipped if len(skipped) == self.network.replicas else skipped[:1]
        counts = skipped.expand(self.network.replicas, -1)
        self.optimizer.skipped = Counter({(r, k): int(counts[r, k]) for r, k in counts.nonzero().tolist()})
        self.step = step
        self.optimizer.taken.fill_(step)
        self._batches = self.stream.starting_at(step)


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's randomness (dropout): the same for all runs of a seed."""
    return (seed * 1_000_003 + step) * 2


def shared_steps(replicas: Sequence[Replica], rule: LeaveOut, protocol: Protocol) -> int:
    """Return how many first optimizer steps replicas have in common with their seed's full run.

    Under most rules a run equals the full one until the batch where its first left-out instance occurs in the
    first epoch; zero for replicas of several seeds.
    """
    if not rule.until_occurrence or len({r.seed for r in replicas}) > 1:
        return 0
    order = torch.randperm(rule.instances, generator=torch.Generator().manual_seed(replicas[0].seed))
    position = torch.argsort(order)
    left_out = [i for r in replicas for i in rule.members(r.left_out)]
    if not left_out or not all(r.left_out for r in replicas):
        return 0
    return int(position[left_out].min()) // protocol.batch_size
