"""What a run measures: the protocol, the seeds, the left-out and the test instances."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig

from fimo.app.build import build_protocol, scaled
from fimo.data.datamodule import InstancesModule
from fimo.engine.protocol import Protocol
from fimo.errors import InputError, shortened
from fimo.further_training.seeds import other_seeds
from fimo.validation import choices

log = logging.getLogger(__name__)

SAME_SEEDS = "same"
"""Of ``further_training.followed_seeds``: methods follow the gold standard's own seeds."""


@dataclass(frozen=True)
class Plan:
    """The gold standard to make.

    Args:
        protocol: of further training.
        seeds: S.
        followed: seeds whose full runs are handed to methods that follow further training; of every part of
            a gold standard the same, and disjoint from the whole of it unless asked for.
        left_out: L training indices, or groups of them.
        test: J test indices.
        subtract_mean: of the adjustment.
        chunk: replicas advanced together, or ``auto``.
    """

    protocol: Protocol
    seeds: list[int]
    followed: list[int]
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
        seeds = choices.seeds(scaled(node.seeds, config.scale, least=2), "further_training.seeds")
        followed = followed_seeds(node.followed_seeds, seeds, config.scale)
        # an audit looks at all rows
        chosen = None if config.mode == "audit" else scaled(node.left_out, config.scale, least=3)
        left_out = choices.units(chosen, len(data.train))
        if node.shard is not None:
            seeds, left_out = shard(node.shard, seeds, left_out)
        key = "further_training.test"
        test = choices.indices(scaled(node.test, config.scale, least=3), len(data.test), key).tolist()
        if twice := sorted({j for j in test if test.count(j) > 1}):
            raise InputError(key, f"measured twice: {shortened(twice)}")
        protocol = build_protocol(config)
        for remark in remarks(protocol, len(data.train)):
            log.warning("%s", remark)
        return cls(
            protocol,
            seeds,
            followed,
            left_out,
            test,
            node.subtract_mean,
            node.chunk,
        )


def followed_seeds(value: Any, seeds: list[int], scale: float = 1) -> list[int]:
    """Return the seeds that methods follow: others than the gold standard's unless told otherwise.

    Args:
        value: None for as many others as the gold standard has, a number of others, ``same``, or a list.
        seeds: of the whole gold standard.

    Raises:
        InputError: ``further_training.followed_seeds`` is none of these.
    """
    key = "further_training.followed_seeds"
    if value is None:
        return other_seeds(seeds)
    if value == SAME_SEEDS:
        return seeds
    if isinstance(value, str):
        raise InputError(key, f"expected null, a number, a list or {SAME_SEEDS} but got {value!r}")
    chosen = choices.seeds(scaled(value, scale, least=2), key)
    return chosen if isinstance(value, ListConfig) else other_seeds(seeds, len(chosen))


def remarks(protocol: Protocol, instances: int) -> list[str]:
    """Return what is odd about a protocol on so many training instances, though it can be run."""
    found = []
    if protocol.batch_size > instances:
        found.append(
            f"further_training.batch_size: {protocol.batch_size} is more than the {instances} training "
            "instances, so that an epoch is one step"
        )
    steps = protocol.total_steps(instances)
    if isinstance(protocol.evaluate_every, int) and protocol.evaluate_every > steps:
        found.append(
            f"further_training.evaluate_every: {protocol.evaluate_every} is more than the {steps} steps of "
            "further training, so that losses are measured at its end only"
        )
    return found


def shard(text: str, seeds: list[int], left_out: list[Any]) -> tuple[list[int], list[Any]]:
    """Return the seeds and left-out instances of one part, ``k/n``, of a gold standard.

    Parts divide the seeds where there are enough of them, else the left-out instances.

    Raises:
        InputError: not of that form, or more parts than either.
    """
    k, n = part(text, "further_training.shard")
    if n <= len(seeds):
        return seeds[k::n], left_out
    if n <= len(left_out):
        return seeds, left_out[k::n]
    most = max(len(seeds), len(left_out))
    raise InputError("further_training.shard", f"expected at most {most} parts but got {n}")


def part(text: str, key: str) -> tuple[int, int]:
    """Return k and n of ``k/n``, the k-th of n parts.

    Raises:
        InputError: with ``key``: not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(key, f"expected k/n with k from 0 to n - 1 but got {text!r}")
    return int(match[1]), int(match[2])
