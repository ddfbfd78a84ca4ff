"""The gold standard: sensitivities by further training with and without instances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fimo.cost import Cost
from fimo.data.instances import Instances
from fimo.data.mapped import array
from fimo.engine.context import Setting, chunk_size
from fimo.engine.devices import trainer_device
from fimo.engine.job import Job
from fimo.engine.protocol import DTYPES, Protocol
from fimo.engine.records import Records
from fimo.engine.replicas import Replica, Unit
from fimo.errors import InputError
from fimo.further_training.resolution import measured_noise, repeats, warn_of_rounding
from fimo.further_training.sensitivity import Sensitivity
from fimo.models.final_model import FinalModel
from fimo.models.frozen import for_runs
from fimo.store.files import Store, written_aside
from fimo.store.fingerprint import Key, Problem, kept, runs_key
from fimo.validation import choices
from fimo.validation.admission import admit

KEEP_BYTES = 2**30
"""States of finished runs are kept, for adding epochs later, up to this size in all."""


def further_train(
    final_model: FinalModel,
    train: Instances,
    test: Instances,
    protocol: Protocol,
    seeds: int | Sequence[int],
    left_out: int | Sequence[int | Sequence[int]] | None,
    *,
    test_index: Sequence[int] | None = None,
    store: Store | None = None,
    chunk: int | Literal["auto"] = "auto",
    subtract_mean: bool = True,
    trainer: Mapping[str, Any] | None = None,
    cost: Cost | None = None,
    keep_states: bool | Literal["auto"] = "auto",
    problem: Problem | None = None,
) -> Sensitivity:
    """Continue training from the final model with and without instances, and compare test losses.

    For every seed s the full run and one run for each left-out instance (or group) i are made; then
    raw[s, t, j, i] = loss_j(leaving out i, at t) - loss_j(full, at t).

    Args:
        train: all N training instances.
        test: the J instances whose losses (the final model's measurement) are recorded.
        seeds: S of them (a list, array or tensor; a number N means 0 to N - 1); a seed fixes the data order
            and all other randomness of its runs.
        left_out: L indices into ``train``, or lists of indices that are left out together; a number means so
            many evenly spaced ones, None all.
        test_index: ``[J]``, what :attr:`Sensitivity.test` shall say; 0 to J - 1 when None.
        store: where results are kept as they are made, and read from; nothing is kept when None.
        chunk: replicas advanced together; ``auto`` chooses by cache or device memory.
        subtract_mean: see :class:`Sensitivity`.
        trainer: arguments of the Lightning Trainer (``accelerator``, ``devices``, ``strategy``,
            ``callbacks``, ``logger``, ``enable_progress_bar``); several devices share the chunks.
        cost: gets the gradients of all runs, the share found in the store, and what those took.
        keep_states: keep the runs' last states in the store, so that evaluation points can be added later;
            ``auto`` does so up to 1 GiB in all.
        problem: the description of ``final_model`` and ``train``, where it is known already.

    Returns:
        The sensitivity, with distances and the full runs' losses; on the CPU.

    Raises:
        InputError: naming the key under ``further_training`` at fault.
        OSError: the store can't be written.
    """
    train, test = admit(final_model, train, test)
    seeds, units = choices.seeds(seeds), choices.units(left_out, len(train))
    index = list(range(len(test))) if test_index is None else list(test_index)
    if len(index) != len(test):
        raise InputError("further_training.test_index", f"expected {len(test)} indices but got {len(index)}")
    if chunk != "auto" and (not isinstance(chunk, int) or chunk < 1):
        raise InputError("further_training.chunk", f"expected 'auto' or at least 1 but got {chunk!r}")
    points, epochs = evaluation_points(protocol, len(train))

    def key() -> Key:
        return runs_key(problem or Problem.of(final_model, train), test, protocol)

    with kept(store, "further_training", key) as folder:
        records = Records(folder)

        make_job = JobMaker(
            final_model, train, test, protocol, seeds, units, points, records, chunk,
            False if keep_states == "auto" and store is None else keep_states,
        )  # fmt: skip
        job = _run(make_job, trainer)
        if cost is not None:
            per_run = protocol.run_gradients(len(train))
            cost.gradient_evaluations += per_run * job.replicas
            cost.reused = job.found / job.replicas
            cost.seconds += job.found_seconds
            cost.peak_memory_mb = max(cost.peak_memory_mb, job.found_memory_mb)
        sensitivity = _assemble(job, seeds, units, points, epochs, index, subtract_mean)
        noise = _rounding(folder, job, sensitivity, units, trainer)
    warn_of_rounding(sensitivity, final_model, test, protocol, noise)
    return sensitivity


def _rounding(
    folder: Path, job: Job, sensitivity: Sensitivity, units: Sequence[Unit], trainer: Mapping[str, Any] | None
) -> Tensor | None:
    """Return the measured rounding noise ``[E]``, kept with the runs; None where it is not measured.

    That is where few runs are asked for, in float64 anyway, with random numbers of the network's own
    (dropout), which another dtype draws otherwise, on several devices, or on one without float64; and where
    all runs were there already.
    """
    setting, path, points = job.setting, folder / "rounding.json", sensitivity.step.tolist()
    if path.exists():
        known = {int(step): noise for step, noise in json.loads(path.read_text()).items()}
        if known.keys() >= set(points):
            return torch.tensor([known[step] for step in points], dtype=torch.float64)
    most, made = repeats(job.replicas), job.replicas - job.found
    if not (most and made) or setting.protocol.dtype == "float64" or setting.stochastic:
        return None
    if (kind := trainer_device(trainer).type) != setting.device.type or kind not in ("cpu", "cuda"):
        return None
    protocol = setting.protocol.in_float64()
    wide = Setting.build(setting.final_model, setting.train, setting.test, protocol, setting.device)
    noise = measured_noise(sensitivity, wide, units, most)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(dict(zip(points, noise.tolist(), strict=True))))
    return noise


@dataclass(frozen=True)
class JobMaker:
    """Builds a job on a device: where there are several, in the process of each."""

    final_model: FinalModel
    train: Instances
    test: Instances
    protocol: Protocol
    seeds: Sequence[int]
    units: Sequence[Unit]
    points: Sequence[int]
    records: Records
    chunk: int | Literal["auto"]
    keep_states: bool | Literal["auto"]

    def __call__(self, device: torch.device) -> Job:
        part = self.final_model, self.train, self.test
        if not self._all_made():
            dtypes = DTYPES[self.protocol.dtype], DTYPES[self.protocol.evaluation_dtype]
            part = for_runs(*part, dtypes, device)
        setting = Setting.build(*part, self.protocol, device)
        replicas = len(self.seeds) * (len(self.units) + 1)
        runs = len(self.seeds) * len(self.units)
        size = self.chunk if isinstance(self.chunk, int) else chunk_size(setting, runs)
        keep = self.keep_states
        if keep == "auto":
            keep = _state_bytes(self.final_model, self.protocol) * replicas <= KEEP_BYTES
        return Job(setting, self.seeds, self.units, self.points, self.records, size, keep)

    def _all_made(self) -> bool:
        """Return whether the records hold all runs, so that nothing is to be computed for them."""
        made = {r for record in self.records.finished() if record.holds(self.points) for r in record.replicas}
        return made >= {Replica(seed, unit) for seed in self.seeds for unit in ((), *self.units)}


def evaluation_points(protocol: Protocol, instances: int) -> tuple[list[int], list[int]]:
    """Return the optimizer steps ``[E]`` of the full run at evaluation points, and the epochs ``[E]`` begun.

    Args:
        instances: N.
    """
    steps = protocol.evaluation_steps(instances, instances)
    per_epoch = protocol.batches_per_epoch(instances)
    return steps, [-(-step // per_epoch) for step in steps]


def _run(make_job: Any, trainer: Mapping[str, Any] | None) -> Job:
    from fimo.engine.driver import run_job  # Lightning takes seconds to import

    return run_job(make_job, trainer)


def _state_bytes(final_model: FinalModel, protocol: Protocol) -> int:
    copies = 1 + len(protocol.update_rule.state)
    return copies * final_model.size * (8 if protocol.dtype == "float64" else 4)


def _assemble(
    job: Job,
    seeds: Sequence[int],
    units: Sequence[Unit],
    points: Sequence[int],
    epochs: Sequence[int],
    test_index: Sequence[int],
    subtract_mean: bool,
) -> Sensitivity:
    """Read a finished job's records, one seed at a time, into one result."""
    s, e, j, n = len(seeds), len(points), len(test_index), len(units)
    raw = array(s, e, j, n)
    distance_full, distance = torch.empty(s, e), torch.empty(s, e, n)
    full_losses = torch.empty(s, e, j, dtype=torch.float64)
    for at, seed in enumerate(seeds):
        rows = job.seed_rows(seed)
        full = rows[Replica(seed)]
        full_losses[at], distance_full[at] = full["values"], full["distance"]
        runs = [rows[Replica(seed, unit)] for unit in units]
        raw[at] = torch.stack([run["values"] for run in runs], -1)
        distance[at] = torch.stack([run["distance"] for run in runs], -1)
    width = max(len(u) for u in units)
    members = torch.tensor([[*u, *[-1] * (width - len(u))] for u in units])
    return Sensitivity(
        raw=raw,
        step=torch.tensor(points),
        epoch=torch.tensor(epochs),
        left_out=members[:, 0].clone(),
        test=torch.tensor(test_index, dtype=torch.int64),
        seeds=torch.tensor(seeds),
        subtract_mean=subtract_mean,
        distance_full=distance_full,
        distance=distance,
        full_losses=full_losses,
        groups=members if width > 1 else None,
    )
