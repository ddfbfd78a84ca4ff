"""Further training under the Lightning Trainer.

A training step of the Trainer advances a chunk of replicas through evaluation points (or a block of
optimizer steps) for about ``BLOCK_SECONDS``, so that the Trainer's own time per step does not show.
Callbacks save states to the store and show progress.

On several devices, Lightning starts a process for each, and every process claims chunks until none is left;
they meet only in the store, and to agree on when to end.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import IterableDataset

from fimo.engine import records
from fimo.engine.context import worker_threads
from fimo.engine.devices import Launched
from fimo.engine.job import Job, Work
from fimo.engine.pace import LEAST_SECONDS, about, expected_seconds, least_seconds, measure_pace
from fimo.errors import InputError
from fimo.models.progress import Lines, on_terminal

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
BLOCK_SECONDS = 0.5
"""About the time of one training step of the Trainer."""

WAIT_SECONDS = 0.02
"""Between a worker's looks for work that becomes free when another worker's chunk is finished."""

STRATEGIES = ("auto", "ddp", "ddp_spawn")
"""Of several devices; they mean the same here."""


class FurtherTrainingModule(pl.LightningModule):
    """Advances a job's chunks and writes their results.

    On a CPU, a chunk's operations run on one thread, and as many chunks are advanced at a time as
    there are threads: none waits for another within a step, and a result does not depend on their number.
    (Where copies of a network may share state, one chunk is advanced at a time, by one thread as well;
    several processes on one store share such a job.)
    Chunks are advanced by worker threads also where there is but one: an interrupt, which reaches the main
    thread, then never falls between the halves of an optimizer step, and what was done can be saved.
    A worker writes a chunk's results before it begins another, so that memory holds one chunk of each.

    Args:
        make_job: builds the job on the Trainer's device.
        processes: how many share the job under this Trainer.

    Attributes:
        work: the chunk under way of each worker.
        replica_steps, total_replica_steps: taken so far in this process, and to take for what the store
            lacked at the start.
    """

    def __init__(self, make_job: Callable[[torch.device], Job], processes: int = 1) -> None:
        super().__init__()
        if processes > 1:  # Lightning's strategies for several devices refuse a module without any
            self.unused = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.make_job = make_job
        self.job: Job | None = None
        self.work: dict[int, Work] = {}
        self.finished = False
        self.replica_steps = self.total_replica_steps = 0

    def configure_optimizers(self) -> None:
        """The replicas' optimizers are the engine's own."""

    def on_fit_start(self) -> None:
        self.job = self.make_job(self.device)
        steps = self.job.setting.protocol.total_steps(len(self.job.setting.train))
        self.total_replica_steps = steps * (self.job.replicas - int(self.job.found))
        self.threads = torch.get_num_threads()
        self.workers = worker_threads(self.job.setting)
        each = 1 if self.device.type == "cpu" else self.threads
        self.pool = ThreadPoolExecutor(self.workers, initializer=_start_worker, initargs=(each, self.device))
        self.stop = threading.Event()
        if self.global_rank == 0:
            self._announce(self.job)

    def _announce(self, job: Job) -> None:
        """Say how long the job will take, where it is long enough for a measurement not to matter."""
        least = least_seconds(job.setting, self.total_replica_steps)
        if least < LEAST_SECONDS:
            return
        pace = measure_pace(job.setting, job.size, min(1.5, max(0.2, 0.05 * least)), self.pool)
        missing = 1 - job.found / job.replicas
        seconds = missing * expected_seconds(
            job.setting, pace, len(job.full), len(job.runs) // len(job.full), len(job.points), job.size
        )
        log.info(
            "further training: %d runs of %d steps%s, %s (%s replica-steps a second)",
            job.replicas,
            job.setting.protocol.total_steps(len(job.setting.train)),
            f", {job.found / job.replicas:.0%} of them in the store" if job.found else "",
            about(seconds / self.trainer.world_size),
            f"{1 / pace.step:,.0f}",
        )

    def train_dataloader(self) -> Iterator[int]:
        return _Rounds(self)  # type: ignore[return-value]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        assert self.job is not None
        steps = list(self.pool.map(self._block, range(self.workers)))
        self.replica_steps += sum(steps)
        idle = not self.work
        # together: Lightning's processes must take equally many training steps
        self.finished = self.trainer.strategy.reduce_boolean_decision(idle and self.job.is_finished)
        if idle and not self.finished:
            time.sleep(POLL_SECONDS)  # another process works on all that is left

    def _block(self, slot: int) -> int:
        """Advance chunks, one after another, for the time of a block; return the replica-steps."""
        assert self.job is not None
        steps = 0
        until = time.monotonic() + BLOCK_SECONDS
        # at least once: a time that is over before this thread runs would leave its chunk where it is
        while not self.stop.is_set():
            if slot not in self.work:
                work = self.job.next_work()
                if work is None:
                    if not self.work:
                        break
                    self.stop.wait(WAIT_SECONDS)  # others may need the full run that another worker takes
                    if time.monotonic() >= until:
                        break
                    continue
                self.work[slot] = work
                # taken before, or by the full run
                steps += work.chunk.step * len(work.chunk.replicas)
            work = self.work[slot]
            began = time.monotonic()
            steps += advance(work, len(self.job.points), until - began, self.stop)
            work.seconds += (time.monotonic() - began) / self.workers
            if work.done == len(self.job.points):
                self.job.finish(work)
                del self.work[slot], work  # its memory, before the next takes its own
            if time.monotonic() >= until:
                break
        return steps

    def on_fit_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Save what is under way, if anything is, and give up claims and threads."""
        if getattr(self, "pool", None) is None:
            return
        self.stop.set()
        self.pool.shutdown()
        torch.set_num_threads(self.threads)  # workers' setting reaches the matrix library's own
        assert self.job is not None
        for work in self.work.values():
            try:
                if work.sound:
                    self.job.save(work)
            except OSError as error:  # a full disk, of which the caller hears otherwise
                log.warning("the state of %d runs could not be saved (%s)", len(work.chunk.replicas), error)
            finally:
                self.job.records.release(work.chunk.replicas, work.lock)
        self.work = {}


def _start_worker(threads: int, device: torch.device) -> None:
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def advance(work: Work, points: int, seconds: float, stop: threading.Event | None = None) -> int:
    """Advance a chunk through evaluation points, for about the given time; return its replica-steps.

    What is computed does not depend on the time. At least one step is made, however short it is.

    Args:
        stop: set to end at the next block of optimizer steps.
    """
    chunk, began = work.chunk, time.monotonic()
    first = chunk.step
    launched = Launched(chunk.network.device, first)
    work.sound = False  # an error may leave a step half made
    while work.done < points:
        target = chunk.evaluation_steps[work.done]
        pace = (launched.done - first) / max(time.monotonic() - began, 1e-9)
        block = max(1, int(pace * (began + seconds - time.monotonic()))) if chunk.step > first else 1
        chunk.advance(min(target, chunk.step + block))
        if chunk.step == target:
            losses, distance = chunk.measured()
            e = work.done
            work.values[:, e] = losses if work.full_losses is None else losses - work.full_losses[:, e]
            work.distance[:, e] = distance
            work.done += 1
        launched.block(chunk.step)
        if time.monotonic() - began >= seconds or (stop is not None and stop.is_set()):
            break
    launched.finish()
    work.sound = True
    return (chunk.step - first) * len(chunk.replicas)


class SaveToStore(pl.Callback):
    """Saves the state of chunks under way every ``SAVE_SECONDS``, and when the Trainer ends early
    (interrupted, terminated, after an error, or stopped by a callback)."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        for work in module.work.values():
            if time.monotonic() - work.saved > records.SAVE_SECONDS:
                module.job.save(work)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        module.close()


class ReplicaProgress(TQDMProgressBar):
    """Replica-steps done and per second, time left, and the share that the store already had."""

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.unit, bar.unit_scale = "replica-step", True
        bar.bar_format = (
            "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        )
        return bar

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """The bar begins with the job's length: Lightning's own would first be an empty one."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.train_progress_bar = self.init_train_tqdm()
        bar, job = self.train_progress_bar, module.job
        bar.reset(total=module.total_replica_steps)
        found = f" ({job.found / job.replicas:.0%} of the runs found in the store)" if job.found else ""
        bar.set_description_str(f"Further training{found}")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        bar = self.train_progress_bar
        done = module.replica_steps * trainer.world_size  # the other processes' are not known here
        bar.update(min(done, bar.total or 0) - bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        bar = self.train_progress_bar
        if module.finished:  # others took the rest, or epochs of runs leaving out are shorter
            bar.update((bar.total or 0) - bar.n)
        bar.refresh()


class ReplicaLines(ProgressBar):
    """Replica-steps done, in a line every half minute: what a log file can hold."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.lines = Lines("further training", "replica-steps")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            total = module.total_replica_steps
            self.lines.at(min(module.replica_steps * trainer.world_size, total), total)

    def disable(self) -> None:
        """As a bar's; lines are rare."""


class _Rounds(IterableDataset[int]):
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
    with _quiet():
        lightning = make_trainer(trainer, SaveToStore())
        module = FurtherTrainingModule(make_job, lightning.world_size)
        if lightning.world_size > 1:
            return _run_on_devices(module, lightning)
        _fit(lightning, module)
    assert module.job is not None
    return _finished(module.job)


def _fit(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    try:
        trainer.fit(module)
    except SIGTERMException as terminated:  # whose own exit status is that of success
        raise SystemExit(128 + signal.SIGTERM) from terminated


def _finished(job: Job) -> Job:
    """Refuse a job that the Trainer stopped."""
    if not job.is_finished:
        raise InputError(
            "trainer", "stopped before all runs were finished; what is done is kept in the store"
        )
    return job


def _run_on_devices(module: FurtherTrainingModule, trainer: pl.Trainer) -> Job:
    """Run a job in one process for each device; this process reads what they stored."""
    job = module.make_job(torch.device("cpu"))
    if job.is_finished:
        return job
    try:
        pickle.dumps(module.make_job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            "trainer.devices", f"several need a network and losses that can be sent to processes ({error})"
        ) from None
    _fit(trainer, module)
    return _finished(job)


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
        callbacks.append(ReplicaProgress() if on_terminal() else ReplicaLines())
    arguments["max_epochs"] = 1  # an epoch of the Trainer is the whole job
    made = pl.Trainer(callbacks=[*callbacks, *more], **arguments)
    if made.num_nodes > 1:
        raise InputError(
            "trainer.num_nodes", f"expected 1 but got {made.num_nodes}; start a process on each, on one store"
        )
    if made.world_size == 1:
        return made
    if arguments.get("strategy", "auto") not in STRATEGIES:
        raise InputError(
            "trainer.strategy", f"expected one of {', '.join(STRATEGIES)} but got {arguments['strategy']!r}"
        )
    # processes that run nothing but the job: those of `ddp` would repeat the whole program
    arguments["strategy"] = "ddp_spawn"
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
