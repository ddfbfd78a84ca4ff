"""Lightning callbacks that log what the two Trainers of a run do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.engine.job import Job
from fimo.engine.replicas import Replica
from fimo.errors import reason
from fimo.evaluation.ceiling import noise_ceilings
from fimo.evaluation.metrics import MetricName
from fimo.live.log import Log
from fimo.models.lightning_module import FinalModelModule

log = logging.getLogger(__name__)

EVERY_SECONDS = 3.0
"""At most so often progress is logged."""

MOST_TIME = 0.01
"""Largest share of a stage's time that is spent on measuring what is only logged."""

MEASURES = ("", "audit")
"""Stages whose further training is called by that name; others' have the stage's."""

MOST_TESTS = 100
"""Test instances, evenly spaced, that a ceiling is measured on while runs are made."""


class LogsOnly(pl.Callback):
    """A callback whose failure is a warning, and the end of what it logs.

    Args:
        live: None in processes of other devices, which log nothing.
    """

    def __init__(self, live: Log) -> None:
        self.live: Log | None = live  # `log` is what Lightning calls the module's own

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None}

    def tell(self, what: Callable[[Log], None]) -> None:
        """Call a function with the log."""
        if self.live is None:
            return
        try:
            what(self.live)
        except Exception as error:
            log.warning("%s logs no more: %s", type(self).__name__, reason(error))
            self.live = None


class LogsTraining(LogsOnly):
    """Logs the final model's ``train_loss`` of every epoch, and ``val_loss`` and ``val_accuracy``.

    These are of the given instances. They are measured by this callback, in eval mode and without a random
    number, so that the training is the same with or without it; in as many epochs as take a hundredth of the
    time, and in the last.

    Args:
        held_out: instances that are not trained on.
    """

    def __init__(self, live: Log, held_out: Instances) -> None:
        super().__init__(live)
        self.held_out = held_out
        self._sum, self._count, self._spent = torch.zeros(()), 0, 0.0
        self._began = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sum, self._count = torch.zeros((), device=pl_module.device), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            size = len(batch) if isinstance(batch, Instances) else 1
            self._sum, self._count = self._sum + size * loss.detach(), self._count + size

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tell(lambda live: self._say(live, trainer, pl_module))

    def _say(self, live: Log, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {"final_model/train_loss": float(self._sum / max(1, self._count))}
        now, last = time.monotonic(), trainer.current_epoch + 1 == trainer.max_epochs
        if last or not self._spent or self._spent < MOST_TIME * (now - self._began):
            values |= measured(pl_module, self.held_out)
            self._spent += time.monotonic() - now
        live.log(values, "final_model/epoch", trainer.current_epoch + 1)


def measured(module: Any, instances: Instances) -> dict[str, float]:
    """Return a module's mean loss on instances, and its accuracy where it has one."""
    if not isinstance(module, FinalModelModule):
        return {}
    training, losses, right = module.training, [], []
    module.eval()
    with torch.no_grad():
        for batch in instances.batches(256):
            batch = batch.to(module.device)
            outputs = module(batch.inputs)
            losses.append(module.loss(outputs, batch.targets).double())
            if module.accuracy is not None:
                right.append((outputs.argmax(-1) == batch.targets).double())
    module.train(training)
    found = {"final_model/val_loss": float(torch.cat(losses).mean())}
    return found | ({"final_model/val_accuracy": float(torch.cat(right).mean())} if right else {})


class LogsFurtherTraining(LogsOnly):
    """Logs further training as it goes on, under the name of the run's stage.

    - ``replica_steps``, and against these ``per_second``, ``time_left`` (seconds) and ``found_share``;
    - against ``step``, an evaluation point that all full runs have reached: the mean over seeds of their mean
      ``test_loss``, its standard deviation ``test_loss_sd``, and their ``distance`` from the final model;
      until then the first seed's ``test_loss_one_seed``;
    - against ``seeds``, those whose runs are all there: the noise ``ceiling`` at the last point.

    Args:
        metric: whose ceiling.
        subtract_mean: as the sensitivity is adjusted.
    """

    def __init__(self, live: Log, metric: MetricName, subtract_mean: bool = True) -> None:
        super().__init__(live)
        self.metric, self.subtract_mean = metric, subtract_mean

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._began = self._logged = time.monotonic()
        self._steps, self._spent, self._seeds = 0, 0.0, 1
        self._changes: list[Tensor] = []  # [J, L] of each finished seed, at the last point
        self._full: dict[Replica, tuple[Tensor, Tensor]] = {}
        self._alerted = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if time.monotonic() - self._logged > EVERY_SECONDS:
            self.tell(lambda live: self._say(live, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.tell(lambda live: self._say(live, pl_module))

    def _say(self, live: Log, module: Any) -> None:
        name = live.stage_name if live.stage_name not in MEASURES else "further_training"
        self._progress(live, name, module)
        self._full_runs(live, name, module)
        self._ceiling(live, name, module.job)
        self._logged = time.monotonic()

    def _progress(self, live: Log, name: str, module: Any) -> None:
        job, now = module.job, time.monotonic()
        steps = job.setting.protocol.total_steps(len(job.setting.train))
        found = steps * job.replicas - module.total_replica_steps
        done = min(module.replica_steps, module.total_replica_steps)
        left = module.total_replica_steps - done
        values = {"found_share": job.found / job.replicas}
        if done > self._steps:
            values["per_second"] = (done - self._steps) / max(1e-9, now - self._logged)
            values["time_left"] = left * (now - self._began) / done
            live.log({"time_left": values["time_left"] + live.later})
        self._steps = done
        live.log({f"{name}/{k}": v for k, v in values.items()}, f"{name}/replica_steps", found + done)

    def _full_runs(self, live: Log, name: str, module: Any) -> None:
        """Log the evaluation points that full runs have reached."""
        job, under_way = module.job, {}
        for work in list(module.work.values()):
            for r, replica in enumerate(work.chunk.replicas):
                under_way[replica] = (work.values[r, : work.done].mean(-1), work.distance[r, : work.done])
        for replica in job.full:
            if replica not in self._full and job.is_done(replica):
                row = job.row(replica)
                self._full[replica] = (row["values"].mean(-1), row["distance"])
        curves = [self._full.get(r) or under_way.get(r) for r in job.full]
        lengths = [0 if curve is None else len(curve[0]) for curve in curves]
        for e, step in enumerate(job.points[: max(lengths)]):
            there = [curve for curve, length in zip(curves, lengths, strict=True) if curve and length > e]
            losses = torch.stack([curve[0][e] for curve in there])
            if len(there) == len(curves):
                distance = torch.stack([curve[1][e] for curve in there])
                values = {"test_loss": losses.mean(), "distance": distance.mean()}
                values |= {"test_loss_sd": losses.std()} if len(there) > 1 else {}
            else:
                values = {"test_loss_one_seed": losses[0]} if there[0] is curves[0] else {}
            if values:
                live.log({f"{name}/{k}": float(v) for k, v in values.items()}, f"{name}/step", step)
            if not (self._alerted or losses.isfinite().all()):
                live.alert(
                    "further training diverged", f"a full run's test loss is {losses.max()} at {step} steps"
                )
                self._alerted = True

    def _ceiling(self, live: Log, name: str, job: Job) -> None:
        """Log the ceiling of the seeds that are finished, where it costs little enough."""
        began, seeds = time.monotonic(), job.finished_seeds()
        if seeds <= self._seeds or self._spent > MOST_TIME * (began - self._began):
            return
        every = max(1, len(job.setting.test) // MOST_TESTS)
        for replica in job.full[len(self._changes) : seeds]:
            rows = job.seed_rows(replica.seed)
            runs = [rows[r]["values"][-1, ::every] for r in sorted(rows) if r.left_out]
            self._changes.append(torch.stack(runs, -1))
        raw = torch.stack(self._changes)[:, None]
        found = noise_ceilings(raw, self.metric, self.subtract_mean, [seeds], generator=torch.Generator())
        live.log({f"{name}/ceiling": float(found.upper[-1, -1])}, f"{name}/seeds", seeds)
        self._seeds, self._spent = seeds, self._spent + time.monotonic() - began
