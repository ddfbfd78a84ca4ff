"""What a run measures: the protocol, the seeds, the left-out and the test instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from fimo.build import build_protocol, choose, choose_seeds, scaled
from fimo.data.datamodule import InstancesModule
from fimo.further_training.protocol import Protocol


@dataclass(frozen=True)
class Plan:
    """The gold standard to make.

    Args:
        protocol: of further training.
        seeds: S.
        left_out: L training indices, or groups of them.
        test: J test indices.
        subtract_mean: of the adjustment.
        chunk: replicas advanced together, or ``auto``.
    """

    protocol: Protocol
    seeds: list[int]
    left_out: list[Any]
    test: list[int]
    subtract_mean: bool
    chunk: Any

    @classmethod
    def of(cls, config: DictConfig, data: InstancesModule) -> Plan:
        """Read the plan from a configuration; ``scale`` multiplies its numbers of seeds and so on.

        Raises:
            InputError: naming the key of ``further_training`` at fault.
        """
        node = config.further_training
        return cls(
            build_protocol(config),
            choose_seeds(scaled(node.seeds, config.scale, least=2)),
            choose(
                scaled(node.left_out, config.scale, least=3), len(data.train), "further_training.left_out"
            ),
            choose(scaled(node.test, config.scale, least=3), len(data.test), "further_training.test"),
            node.subtract_mean,
            node.chunk,
        )
