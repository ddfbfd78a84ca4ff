"""The full runs' trajectories, for methods that follow further training."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from fimo.cost import Cost
from fimo.data.instances import Instances
from fimo.engine.chunk import Chunk
from fimo.engine.context import Setting, chunk_size, worker_threads
from fimo.engine.devices import trainer_device
from fimo.engine.protocol import Protocol
from fimo.engine.replicas import Replica
from fimo.engine.threads import one_thread
from fimo.further_training.gold_standard import evaluation_points
from fimo.further_training.trajectory import Trajectory
from fimo.models.final_model import FinalModel
from fimo.store.files import Store, write_tensors, written_aside
from fimo.store.fingerprint import Key, Problem, folder_of, trajectory_key
from fimo.validation import choices
from fimo.validation.admission import admit


class _StoredTensors(Mapping[str, Tensor]):
    """Parameters at one evaluation point, read from the store when asked for."""

    def __init__(self, path: Path, prefix: str, names: Sequence[str], device: torch.device) -> None:
        self.path, self.prefix, self.names, self.device = path, prefix, tuple(names), str(device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, "pt", device=self.device) as file:
            tensor: Tensor = file.get_tensor(f"{self.prefix}.{name}")
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def full_runs(
    final_model: FinalModel,
    train: Instances,
    protocol: Protocol,
    seeds: int | Sequence[int],
    *,
    store: Store | None = None,
    device: torch.device | str | None = None,
    trainer: Mapping[str, Any] | None = None,
    problem: Problem | None = None,
    cost: Cost | None = None,
) -> Iterator[Trajectory]:
    """Yield the seeds' full runs: parameters at θ^f and at each evaluation point.

    Args:
        store: keeps them, one file for each evaluation point, read when a tensor is asked for; without one
            a trajectory is in memory while it is used.
        device: where the runs are made.
        trainer: arguments of the Lightning Trainer, whose accelerator is used where ``device`` is None.
        problem: the description of ``final_model`` and ``train``, where it is known already.
        cost: is charged with what runs that the store has already took to make, as far as they are used.

    Yields:
        One :class:`Trajectory` for each seed, in the protocol's dtype on the device. For Adam,
        ``second_moment`` is its second moment divided by 1 - beta2^t.
    """
    train, _ = admit(final_model, train)
    seeds = choices.seeds(seeds)
    device = trainer_device(trainer) if device is None else device
    setting = Setting.build(final_model, train, train[:1], protocol, device)

    @functools.cache
    def described() -> Problem:
        return problem or Problem.of(final_model, train)

    for start in range(0, len(seeds), together := _at_once(setting, len(seeds))):
        chosen = seeds[start : start + together]
        keys = [functools.partial(_key, described, protocol, seed) for seed in chosen]
        folders = [folder for key in keys if (folder := folder_of(store, "trajectory", key)) is not None]
        if len(folders) < len(chosen):
            yield from _in_memory(setting, chosen)
        else:
            yield from _stored(setting, chosen, folders, cost)


def _key(problem: Callable[[], Problem], protocol: Protocol, seed: int) -> Key:
    return trajectory_key(problem(), protocol, seed)


MEMORY = 2**28
"""Bytes of trajectories that are made together, as one chunk."""


def _at_once(setting: Setting, seeds: int) -> int:
    """Return how many seeds' full runs are advanced together."""
    if setting.stochastic:  # a chunk's replicas share their dropout masks
        return 1
    states = 1 + len(setting.protocol.update_rule.recorded)
    points = 1 + len(evaluation_points(setting.protocol, len(setting.train))[0])
    one = 8 * states * points * setting.final_model.size
    return max(1, min(seeds, chunk_size(setting, seeds * worker_threads(setting)), MEMORY // one))


def _points(
    setting: Setting, seeds: Sequence[int]
) -> Iterator[tuple[int, list[dict[str, dict[str, Tensor]]]]]:
    """Yield (step, each seed's tensors by kind and name) at θ^f and at each evaluation point."""
    chunk = Chunk(setting, [Replica(seed) for seed in seeds])
    for step in [0, *evaluation_points(setting.protocol, len(setting.train))[0]]:
        with _threads(setting):
            chunk.advance(step)
        yield step, [_tensors(chunk, row) for row in range(len(seeds))]


def _threads(setting: Setting) -> AbstractContextManager[None]:
    """Keep the small products of a linear network on one CPU thread, which is faster than sharing them."""
    small = setting.engine == "linear" and setting.device.type == "cpu"
    return one_thread() if small else contextlib.nullcontext()


def _tensors(chunk: Chunk, row: int) -> dict[str, dict[str, Tensor]]:
    network, optimizer = chunk.network, chunk.optimizer
    found = {"parameters": {n: p[row].clone() for n, p in network.parameters.items()}}
    for kind in optimizer.rule.recorded:
        moments = network.views(optimizer.state[kind])
        found[kind] = {n: optimizer.rule.unbiased(m[row], chunk.step) for n, m in moments.items()}
    return found


def _trajectory(seed: int, points: Sequence[Mapping[str, Any]]) -> Trajectory:
    moments = tuple(p["second_moment"] for p in points) if "second_moment" in points[0] else None
    return Trajectory(seed, tuple(p["parameters"] for p in points), moments)


def _in_memory(setting: Setting, seeds: Sequence[int]) -> Iterator[Trajectory]:
    points = [tensors for _, tensors in _points(setting, seeds)]
    for row, seed in enumerate(seeds):
        yield _trajectory(seed, [tensors[row] for tensors in points])


def _stored(
    setting: Setting, seeds: Sequence[int], folders: Sequence[Path], cost: Cost | None
) -> Iterator[Trajectory]:
    names = list(setting.final_model.parameters())
    kinds = ("parameters", *setting.protocol.update_rule.recorded)
    steps = [0, *evaluation_points(setting.protocol, len(setting.train))[0]]
    paths = {
        seed: [folder / f"step-{s:09d}.safetensors" for s in steps]
        for seed, folder in zip(seeds, folders, strict=True)
    }

    def missing() -> list[int]:
        return [seed for seed in seeds if not all(p.exists() for p in paths[seed])]

    made: list[int] = []
    with contextlib.ExitStack() as stack:
        if missing():
            for folder in sorted(
                folders
            ):  # always in the same order, so that no two processes wait in a ring
                stack.enter_context(FileLock(folder / ".lock"))
        if made := missing():
            start = time.perf_counter()
            for at, (_, tensors) in enumerate(_points(setting, made)):
                for seed, own in zip(made, tensors, strict=True):
                    if not paths[seed][at].exists():
                        contents = {f"{k}.{n}": t for k in kinds for n, t in own[k].items()}
                        write_tensors(paths[seed][at], contents)
            each = (time.perf_counter() - start) / len(made)
            for seed, folder in zip(seeds, folders, strict=True):
                if seed in made:
                    with written_aside(folder / "cost.json") as aside:
                        aside.write_text(json.dumps({"seconds": each, "steps": steps[-1]}))
    for seed, folder in zip(seeds, folders, strict=True):
        if cost is not None and seed not in made:
            cost.reuse(_seconds(folder, steps[-1]))
        yield _trajectory(
            seed, [{k: _StoredTensors(p, k, names, setting.device) for k in kinds} for p in paths[seed]]
        )


def _seconds(folder: Path, steps: int) -> float:
    """Return what the first steps of a stored run took to make; 0 where that was not written down."""
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((folder / "cost.json").read_text())
        return float(kept["seconds"] * min(1.0, steps / kept["steps"]))
    return 0.0
