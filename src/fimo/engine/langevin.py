"""Stochastic gradient Langevin dynamics around the final model, its chains advanced together as replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.choice import stack_network
from fimo.engine.context import Setting, chunk_size, evaluation_batch, worker_threads
from fimo.engine.leave_out import Batch
from fimo.engine.stacked import StackedNetwork
from fimo.engine.threads import side_by_side
from fimo.models.loss_function import Loss

PASS = 256
"""Most training instances of a forward and backward pass of all chains."""


@dataclass(frozen=True)
class Langevin:
    """Dynamics whose law, for small steps, has the density exp(-U) up to a factor.

        U(theta) = precision * L(theta) + localisation / 2 * |theta - theta^f|^2
        theta += -step_size / 2 * dU(theta) + sqrt(step_size) * normal

    with L the mean training loss (Welling and Teh, 2011). Batches are drawn with replacement, and their
    gradients' noise is lessened by the same batch's gradient at the final model, of which the mean is known
    (Baker et al., 2019). What is left heats a chain the more, the farther it is from the final model: where
    precision is so large that chains drift farther than they spread, only the whole training set will do.

    Args:
        precision: of the mean training loss, n * beta.
        localisation: gamma.
        step_size: epsilon; chains are stable below 4 / (precision * largest curvature + localisation).
        burn_in, draws, thinning: steps before the first draw; draws; steps from one to the next.
        batch_size: at most N, which takes the whole training set.
        seed: of batches and noise; those of a chain do not depend on how many there are.
    """

    precision: float
    localisation: float
    step_size: float
    burn_in: int
    draws: int
    thinning: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Of a chain."""
        return self.burn_in + self.draws * self.thinning

    def losses(self, setting: Setting, chains: int, read: Sequence[tuple[Instances, Loss]]) -> list[Tensor]:
        """Return losses ``[C, T, n]`` of sets of instances, at each draw of each chain; on the CPU.

        Args:
            setting: on whose training set, in whose mode and dtype.
            read: instances in the evaluation dtype, and what to read of them.
        """
        each = 1 if self._whole(setting) else 2
        parts = torch.arange(chains).split(max(1, chunk_size(setting, chains) // each))

        def run(part: Tensor) -> list[Tensor]:
            return self._run(setting, part.tolist(), read)

        found = side_by_side(run, parts, worker_threads(setting))
        return [torch.cat([each[k] for each in found]) for k in range(len(read))]

    def _whole(self, setting: Setting) -> bool:
        return self.batch_size >= len(setting.train)

    @torch.no_grad()
    def _run(
        self, setting: Setting, chains: list[int], read: Sequence[tuple[Instances, Loss]]
    ) -> list[Tensor]:
        count = len(chains)
        # with batches, as many copies that stay at the final model
        replicas = max(2, count if self._whole(setting) else 2 * count)
        network = stack_network(
            setting.final_model,
            replicas,
            setting.evaluation_model,
            setting.engine,
            setting.mode,
            vocabulary=setting.vocabulary,
        )
        known = None if self._whole(setting) else self._mean_gradient(network, setting)
        generators = [torch.Generator().manual_seed(1_000_003 * self.seed + c) for c in chains]
        found: list[list[Tensor]] = [[] for _ in read]
        for step in range(1, self.steps + 1):
            if known is None:
                gradient = self._mean_gradient(network, setting)
            else:
                change = self._batch_change(network, setting, generators)
                gradient = {name: c + known[name][:1] for name, c in change.items()}
            self._move(network, generators, gradient)
            if step > self.burn_in and (step - self.burn_in) % self.thinning == 0:
                for losses, (instances, loss) in zip(found, read, strict=True):
                    of_all = network.test_losses(instances, evaluation_batch(setting), loss)
                    losses.append(of_all[:count].cpu())
        return [torch.stack(losses, 1) for losses in found]

    def _move(
        self, network: StackedNetwork, generators: list[torch.Generator], gradient: dict[str, Tensor]
    ) -> None:
        """Make a step of the first replicas, a generator each."""
        # in float64 whatever the dtype, which would draw other numbers
        size = sum(p.numel() for p in network.initial.values())
        noise = torch.stack([torch.randn(size, generator=g, dtype=torch.float64) for g in generators])
        noise = noise.mul_(self.step_size**0.5).to(network.device, network.dtype)
        parts = noise.split([p.numel() for p in network.initial.values()], 1)
        for (name, start), normal in zip(network.initial.items(), parts, strict=True):
            p = network.parameters[name][: len(generators)]
            drift = self.precision * gradient[name][: len(generators)] + self.localisation * (p - start)
            p.add_(drift, alpha=-self.step_size / 2).add_(normal.view_as(p))

    def _batch_change(
        self, network: StackedNetwork, setting: Setting, generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """Return estimates ``[C, ...]`` of how the mean gradient differs from that at the final model."""
        count, n = len(generators), len(setting.train)
        drawn = [torch.randint(n, (self.batch_size,), generator=g) for g in generators]
        index = torch.stack(drawn * 2).to(network.device)
        weight = torch.full(index.shape, 1 / self.batch_size, dtype=network.dtype, device=network.device)
        network.differentiate(setting.train, Batch(index, weight), 0)
        return {name: g[:count] - g[count:] for name, g in network.gradients.items()}

    def _mean_gradient(self, network: StackedNetwork, setting: Setting) -> dict[str, Tensor]:
        """Return the gradients ``[R, ...]`` of the mean training loss, in passes of one batch size."""
        n = len(setting.train)
        total: dict[str, Tensor] = {}
        for index in torch.arange(n, device=setting.device).split(min(n, self.batch_size, PASS)):
            weight = torch.full(
                (network.replicas, len(index)), 1 / n, dtype=network.dtype, device=network.device
            )
            network.differentiate(setting.train, Batch(index[None], weight), 0)
            for name, g in network.gradients.items():
                total[name] = total[name] + g if name in total else g.clone()
        return total
