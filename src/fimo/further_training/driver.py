"""Further training under the Lightning Trainer.

A training step of the Trainer advances a chunk of replicas through evaluation points (or a block of
optimizer steps) for about ``BLOCK_SECONDS``, so that the Trainer's own time per step does not show.
Callbacks save to the store and show progress.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from torch.utils.data import IterableDataset

from fimo.further_training import records
from fimo.further_training.job import Job, Work

BLOCK_SECONDS = 0.25
"""About the time of one training step of the Trainer."""


class FurtherTrainingModule(pl.LightningModule):
    """Advances a job's chunks, one after another.

    Args:
        make_job: builds the job on the Trainer's device.

    Attributes:
        replica_steps, total_replica_steps: taken so far in this process, and to take for what the store
            lacked at the start.
    """

    def __init__(self, make_job: Callable[[torch.device], Job]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_job = make_job
        self.job: Job | None = None
        self.work: Work | None = None
        self.finished = False
        self.replica_steps = self.total_replica_steps = 0
        self._pace = 0.0

    def configure_optimizers(self) -> None:
        """The replicas' optimizers are the engine's own."""

    def on_fit_start(self) -> None:
        self.job = self.make_job(self.device)
        steps = self.job.setting.protocol.total_steps(len(self.job.setting.train))
        self.total_replica_steps = steps * (self.job.replicas - int(self.job.found))

    def train_dataloader(self) -> Iterator[int]:
        return _Rounds(self)  # type: ignore[return-value]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        assert self.job is not None
        start = time.monotonic()
        if self.work is None:
            self.work = self.job.next_work()
            if self.work is None:
                self.finished = True
                return
            self._pace = 0.0
        while True:
            self._advance(self.job, self.work, start)
            elapsed = time.monotonic() - start
            if self.work.done == len(self.job.points) or elapsed > BLOCK_SECONDS / 2:
                self.work.seconds += elapsed
                return

    def _advance(self, job: Job, work: Work, start: float) -> None:
        """Go to the next evaluation point, or as far towards it as the time of a block allows."""
        if work.done == len(job.points):
            return
        chunk = work.chunk
        before, began = chunk.step, time.monotonic()
        target = chunk.evaluation_steps[work.done]
        block = max(1, int(self._pace * (start + BLOCK_SECONDS - began))) if self._pace else 1
        chunk.advance(min(target, chunk.step + block))
        taken = chunk.step - before
        if taken and chunk.network.device.type == "cpu":
            self._pace = taken / max(time.monotonic() - began, 1e-9)
        elif taken:
            self._pace = 2.0 * block  # launches return at once; grow until evaluations set the rhythm
        self.replica_steps += taken * len(chunk.replicas)
        if chunk.step == target:
            losses, distance = chunk.evaluate()
            e = work.done
            work.values[:, e] = losses if work.full_losses is None else losses - work.full_losses[:, e]
            work.distance[:, e] = distance
            work.done += 1


class SaveToStore(pl.Callback):
    """Writes a chunk's results when it is finished, and its state every ``SAVE_SECONDS`` until then."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        job, work = module.job, module.work
        if work is None:
            return
        if work.done == len(job.points):
            module.work = None
            job.finish(work)
        elif time.monotonic() - work.saved > records.SAVE_SECONDS:
            job.save(work)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        work, module.work = module.work, None
        if work is not None and module.job is not None:  # interrupted
            module.job.records.release(work.chunk.replicas, work.lock)


class ReplicaProgress(TQDMProgressBar):
    """Replica-steps done and per second, time left, and the share that the store already had."""

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.unit, bar.unit_scale = "replica-step", True
        bar.bar_format = (
            "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        )
        return bar

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        bar, job = self.train_progress_bar, module.job
        bar.reset(total=module.total_replica_steps)
        found = f" ({job.found / job.replicas:.0%} of the runs found in the store)" if job.found else ""
        bar.set_description_str(f"Further training{found}")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        bar = self.train_progress_bar
        bar.update(min(module.replica_steps, bar.total or 0) - bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.train_progress_bar.refresh()


class _Rounds(IterableDataset):
    """One token per training step, until the job is finished."""

    def __init__(self, module: FurtherTrainingModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[int]:
        n = 0
        while not self.module.finished:
            yield n
            n += 1


def run_job(make_job: Callable[[torch.device], Job], trainer: Mapping[str, Any] | None = None) -> Job:
    """Run a job under a Trainer and return it.

    Args:
        trainer: arguments of :class:`pytorch_lightning.Trainer`, such as ``accelerator``, ``devices``,
            ``callbacks``, ``logger``, ``enable_progress_bar``.
    """
    module = FurtherTrainingModule(make_job)
    with _quiet():
        make_trainer(trainer, SaveToStore()).fit(module)
    assert module.job is not None
    return module.job


def make_trainer(trainer: Mapping[str, Any] | None, *more: pl.Callback) -> pl.Trainer:
    """Return a Trainer of the given arguments over quiet defaults, with further callbacks."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        **(trainer or {}),
    }
    callbacks = list(arguments.pop("callbacks", None) or [])
    if arguments["enable_progress_bar"] and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(ReplicaProgress())
    arguments["max_epochs"] = 1  # an epoch of the Trainer is the whole job
    return pl.Trainer(callbacks=[*callbacks, *more], **arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from announcing devices, and from warnings that don't apply here."""
    announcements = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = announcements.level
    announcements.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (".*configure_optimizers.*", ".*many workers.*", ".*GPU available but not used.*"):
                warnings.filterwarnings("ignore", message)
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own use of torch
            yield
    finally:
        announcements.setLevel(level)
