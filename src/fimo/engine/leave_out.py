"""Which instances a replica sees at each step, and with which weights: the leave-out rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica


@dataclass(frozen=True)
class Batch:
    """One step's instances of R replicas; the step's loss is the weighted sum of their losses.

    Args:
        index: ``[R, B]`` int64, into the training set; ``[1, B]`` where all replicas see the same.
        weight: ``[R, B]``, what each instance's loss is multiplied with.
        extra: ``[R, G]`` int64, instances whose losses are added besides (rule ``every_batch``), or None.
        extra_weight: ``[R, G]``.
    """

    index: Tensor
    weight: Tensor
    extra: Tensor | None = None
    extra_weight: Tensor | None = None


class BatchStream:
    """The batches of a chunk of replicas, epoch after epoch.

    A seed's order is drawn as by a plain loop: one generator seeded with the seed, one permutation of all N
    instances at the start of each epoch, whatever is left out. So a seed's runs agree in every permutation,
    and the state of the generator after an epoch does not depend on the left-out instance.

    Args:
        replicas: of one chunk (see :func:`~fimo.engine.replicas.plan_chunks`).
        instances: N.
        dtype, device: of the weights.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        instances: int,
        protocol: Protocol,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.instances, self.protocol, self.device = instances, protocol, device
        self.seeds = [r.seed for r in replicas]
        width = max((len(r.left_out) for r in replicas), default=0)
        # padded with -1, which is no instance
        rows = [list(r.left_out) + [-1] * (width - len(r.left_out)) for r in replicas]
        self.left_out = torch.tensor(rows, dtype=torch.int64).view(len(replicas), width)
        self.kept = instances - width if protocol.leave_out == "shift" else instances
        self.dtype = dtype
        self.shared = protocol.leave_out != "shift" and len(set(self.seeds)) == 1

    def starting_at(self, step: int) -> Iterator[Batch]:
        """Yield the batches from optimizer step ``step`` (from 0) on, without end."""
        first, skip = divmod(step, self.protocol.batches_per_epoch(self.kept))
        generators = {seed: torch.Generator().manual_seed(seed) for seed in self.seeds}
        epoch = 0
        while True:
            drawn = {s: torch.randperm(self.instances, generator=g) for s, g in generators.items()}
            if epoch >= first:
                order = torch.stack([drawn[seed] for seed in self.seeds])
                yield from self._epoch(order, skip if epoch == first else 0)
            epoch += 1

    def _epoch(self, order: Tensor, skip: int) -> Iterator[Batch]:
        size = self.protocol.batch_size
        left_out_here = (order[:, :, None] == self.left_out[:, None, :]).any(-1)
        weight = torch.ones(order.shape, dtype=self.dtype)
        extra = extra_weight = None
        if self.protocol.leave_out == "shift":
            order = order[~left_out_here].view(len(order), self.kept)
            weight = weight[:, : self.kept]
        elif self.protocol.leave_out == "mask":
            weight[left_out_here] = 0.0
        elif self.left_out.shape[1]:
            extra = self.left_out.clamp(min=0).to(self.device)
            present = (self.left_out >= 0).to(self.dtype)
            extra_weight = (-present / self.instances).to(self.device)
        order, weight = order[:1] if self.shared else order, weight.to(self.device)
        order = order.to(self.device)
        for start in range(skip * size, order.shape[1], size):
            index = order[:, start : start + size].contiguous()
            yield Batch(index, weight[:, start : start + size] / index.shape[1], extra, extra_weight)
