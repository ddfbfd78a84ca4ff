"""The protocol of further training: all that defines its runs but seeds and left-out instances."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal

import torch

from fimo.engine.optimizers import Optimizer, make_optimizer
from fimo.engine.settings import (
    LEAVE_OUT_RULES,
    OPTIMIZERS,
    SCHEDULES,
    LeaveOutRule,
    OptimizerName,
    ScheduleName,
    check_range,
)
from fimo.errors import InputError

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Protocol:
    """How further training proceeds from the final model.

    The optimizer starts afresh (no state of the original training is known). The network is in train mode
    where that only means dropout; batch normalisation keeps the final model's statistics, since updating
    them would couple instances and change the model without a gradient step.

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``, as torch.optim implements them, or ``lion``.
        lr: learning rate.
        batch_size: instances per optimizer step.
        micro_batch_size: the most instances whose activations are kept at a time: a batch's gradient is the
            sum over parts of at most so many. None for whole batches. Results are the same to rounding. For
            networks with other layers than linear ones, whose steps draw no random numbers (dropout).
        epochs: passes over the training set; exactly one of ``epochs`` and ``steps`` is given.
        steps: optimizer steps.
        leave_out: ``shift`` removes the instance from the seed's permutation, so that later batches move
            up by one; ``mask`` keeps the batches and drops the instance's loss where it occurs, the divisor
            staying the batch's full size; ``every_batch`` subtracts its loss / N from every batch's mean
            loss; ``reweighted`` then multiplies by N / (N - 1), as ``shift`` does on average;
            ``with_duplicates`` is ``mask`` for the instance and all its exact duplicates.
        evaluate_every: ``epoch``, a number of optimizer steps, or ``end`` for the end alone.
        momentum, nesterov: of SGD.
        betas, eps: of Adam and AdamW; betas of Lion, whose authors take (0.9, 0.99).
        weight_decay: as the optimizer defines it (L2 for SGD and Adam, decoupled for AdamW and Lion).
        clip_norm: largest norm of a step's gradient; None for no clipping.
        schedule: learning rate over the whole of further training: ``constant``, or ``linear`` or
            ``cosine`` decay to zero.
        dtype: of the runs, ``float32`` or ``float64``.
        evaluation_dtype: of the test losses. Leaving one instance out changes a loss by about 1e-4 of it,
            which float32 resolves to three digits at best; parameters are widened before the losses.
        autocast: a GPU's lower precision of forward and backward passes: ``bfloat16`` runs them under
            autocast, ``tf32`` takes their products and convolutions in TensorFloat-32; None for neither.
        graphs: on a GPU, steps are recorded as CUDA graphs where every step is the same operations (no
            schedule, no dropout); results are the same either way.

    Raises:
        InputError: naming the key under ``further_training`` at fault.
    """

    optimizer: OptimizerName = "sgd"
    lr: float = 0.01
    batch_size: int = 32
    micro_batch_size: int | None = None
    epochs: int | None = None
    steps: int | None = None
    leave_out: LeaveOutRule = "shift"
    evaluate_every: Literal["epoch", "end"] | int = "epoch"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: ScheduleName = "constant"
    dtype: str = "float32"
    evaluation_dtype: str = "float64"
    autocast: Literal["bfloat16", "tf32"] | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("leave_out", self.leave_out, LEAVE_OUT_RULES)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("dtype", self.dtype, tuple(DTYPES))
        _require(
            "autocast",
            self.autocast in (None, "bfloat16", "tf32"),
            f"expected bfloat16, tf32 or null but got {self.autocast!r}",
        )
        _one_of("evaluation_dtype", self.evaluation_dtype, tuple(DTYPES))
        for key in ("batch_size", "micro_batch_size", "epochs", "steps"):
            value = getattr(self, key)
            if value is None and key != "batch_size":
                continue
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            _require(key, whole, f"expected a whole number but got {value!r}")
            _require(key, value >= 1, f"expected at least 1 but got {value}")
            object.__setattr__(self, key, int(value))  # NumPy's numbers too
        for key in ("lr", "momentum", "weight_decay", "eps", "clip_norm"):
            value = getattr(self, key)
            if value is None and key == "clip_norm":
                continue
            number = isinstance(value, Real) and not isinstance(value, bool)
            _require(key, number, f"expected a number but got {value!r}")
            object.__setattr__(self, key, value if isinstance(value, int) else float(value))
        for key in ("lr", "momentum", "weight_decay", "betas", "eps", "clip_norm"):
            check_range(f"further_training.{key}", getattr(self, key))
        _require(
            "nesterov", not self.nesterov or self.momentum > 0, "expected momentum > 0 where nesterov is true"
        )
        _require(
            "evaluate_every",
            self.evaluate_every in ("epoch", "end")
            or (isinstance(self.evaluate_every, int) and self.evaluate_every >= 1),
            f"expected 'epoch', 'end' or a number of steps but got {self.evaluate_every!r}",
        )
        _require(  # last, so that a bad value is named before a missing one
            "epochs",
            (self.epochs is None) != (self.steps is None),
            f"expected exactly one of epochs and steps but got epochs={self.epochs}, steps={self.steps}",
        )

    def key(self) -> dict[str, Any]:
        """Return what a run's result depends on: all but the horizon, unless the schedule depends on it.

        A shorter horizon is a prefix of a longer one, so that raising the epochs reuses what is there.
        """
        key = asdict(self)
        del key["graphs"]
        if self.kept_instances == self.batch_size:
            del key["micro_batch_size"]
        if self.schedule == "constant":
            del key["epochs"], key["steps"]
        return key

    @cached_property
    def update_rule(self) -> Optimizer:
        """The optimizer: what it keeps, and how it makes a step."""
        return make_optimizer(self.optimizer, vars(self))

    @property
    def kept_instances(self) -> int:
        """The most instances whose activations are kept at a time."""
        return min(self.batch_size, self.micro_batch_size or self.batch_size)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast, or None."""
        return torch.bfloat16 if self.autocast == "bfloat16" else None

    def in_float64(self) -> Protocol:
        """Return the same protocol with runs and losses in float64."""
        return replace(self, dtype="float64", evaluation_dtype="float64", autocast=None)

    def batches_per_epoch(self, instances: int) -> int:
        """Return the number of optimizer steps of one epoch over ``instances``; the last may be short."""
        return -(-instances // self.batch_size)

    def evaluation_steps(self, instances: int, total: int) -> list[int]:
        """Return the optimizer steps at which a run over ``instances`` records test losses.

        Args:
            instances: of the run, which is fewer than ``total`` where ``shift`` leaves some out.
            total: N.
        """
        full_epoch, epoch = self.batches_per_epoch(total), self.batches_per_epoch(instances)
        if self.evaluate_every == "end":
            return [replace(self, evaluate_every="epoch").evaluation_steps(instances, total)[-1]]
        if self.evaluate_every == "epoch":
            if self.epochs is not None:
                return [epoch * (e + 1) for e in range(self.epochs)]
            assert self.steps is not None
            complete = self.steps // full_epoch
            points = [epoch * (e + 1) for e in range(complete)]
            return points if complete * full_epoch == self.steps else [*points, self.steps]
        horizon = self.total_steps(total)
        points = list(range(self.evaluate_every, horizon + 1, self.evaluate_every))
        return points if points and points[-1] == horizon else [*points, horizon]

    def run_gradients(self, instances: int) -> int:
        """Return the gradients of single instances in a full run."""
        whole, rest = divmod(self.total_steps(instances), self.batches_per_epoch(instances))
        return whole * instances + rest * self.batch_size

    def total_steps(self, total: int) -> int:
        """Return the number of optimizer steps of a full run over all N = ``total`` instances."""
        return self.steps if self.steps is not None else self.batches_per_epoch(total) * (self.epochs or 0)

    def learning_rate(self, step: int, total: int) -> float:
        """Return the learning rate of optimizer step ``step`` (from 0), where a full run takes ``total``."""
        if self.schedule == "linear":
            return self.lr * max(0.0, 1 - step / total)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return self.lr


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    _require(key, value in allowed, f"expected one of {', '.join(allowed)} but got {value!r}")


def _require(key: str, condition: bool, problem: str) -> None:
    if not condition:
        raise InputError(f"further_training.{key}", problem)
