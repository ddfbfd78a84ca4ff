"""Training from scratch leaving instances out: the gold standard of access to the training algorithm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.modules.batchnorm import _BatchNorm

from fimo.app.build import build_final_model, build_module
from fimo.app.environment import trainer_settings
from fimo.cost import Cost
from fimo.data.datamodule import InstancesModule
from fimo.engine.optimizers import make_optimizer
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.further_training.sensitivity import Sensitivity
from fimo.tasks.base import Judged, Task, seeds_of

KEY = "evaluation.tasks.retraining"


class Retraining(Task):
    """The sensitivity of training from scratch, on the same left-out and test instances.

    Args:
        seeds: trainings of each; a seed fixes the initial parameters and the data order, in the full training
            and in those leaving an instance out. None for as many as the gold standard has.
    """

    def __init__(self, seeds: int | None = None) -> None:
        self.seeds = seeds

    def check(self, config: DictConfig, data: InstancesModule) -> None:
        check_retraining(config, data, KEY)

    def __call__(self, run: Judged) -> Sensitivity:
        return retrain(run, run.plan.left_out, seeds_of(self.seeds, run.plan, f"{KEY}.seeds"))


def retrain(run: Judged, left_out: Sequence[Any], seeds: Sequence[int]) -> Sensitivity:
    """Train from scratch with and without instances, by the protocol of the final model's own training.

    Each seed has initial parameters of its own; all trainings of a seed are replicas of one batched
    computation. Instances are left out by the run's rule.

    Args:
        left_out: L indices, or groups.
        seeds: S.

    Returns:
        raw changes ``[S, 1, J, L]`` after the last epoch.
    """
    protocol = training_protocol(run.config, run.data, run.plan.protocol)
    found = []
    for seed in seeds:
        config = OmegaConf.merge(
            run.config, {"seed": seed, "model": {"checkpoint": None, "accept_poor": True}}
        )
        assert isinstance(config, DictConfig)
        initial = build_final_model(build_module(config, run.data), config)
        cost = Cost("retraining")
        one = further_train(
            initial,
            run.data.train,
            run.data.test[run.plan.test],
            protocol,
            [seed],
            left_out,
            test_index=run.plan.test,
            store=run.store,
            chunk=run.plan.chunk,
            subtract_mean=run.plan.subtract_mean,
            trainer=trainer_settings(run.config),
            cost=cost,
            keep_states=False,
        )
        run.cost.gradient_evaluations += cost.gradient_evaluations
        found.append(one)
    return joined(found)


def training_protocol(config: DictConfig, data: InstancesModule, further: Protocol) -> Protocol:
    """Return the protocol of the final model's training as the engine's, with the rule of leaving out."""
    return Protocol(
        optimizer=config.model.optimizer,
        lr=config.model.lr,
        batch_size=data.batch_size,
        epochs=config.trainer.max_epochs,
        leave_out=further.leave_out,
        **dataclasses.asdict(make_optimizer(config.model.optimizer, config.model)),
        clip_norm=config.trainer.gradient_clip_val,
        dtype=further.dtype,
        evaluation_dtype=further.evaluation_dtype,
    )


def joined(found: Sequence[Sensitivity]) -> Sensitivity:
    """Return the last evaluation point of sensitivities of one seed each, as one of all seeds."""

    def last(name: str) -> torch.Tensor:
        return torch.cat([getattr(one, name)[:, -1:] for one in found])

    return dataclasses.replace(
        found[0],
        raw=last("raw"),
        step=found[0].step[-1:],
        epoch=found[0].epoch[-1:],
        seeds=torch.cat([one.seeds for one in found]),
        distance_full=last("distance_full"),
        distance=last("distance"),
        full_losses=last("full_losses"),
    )


def check_retraining(config: DictConfig, data: InstancesModule, key: str) -> None:
    """Refuse what the engine can't train from scratch.

    Raises:
        InputError: with ``key``: batch statistics that would have to be learned, or no epochs.
    """
    without = OmegaConf.merge(config, {"model": {"checkpoint": None}})
    assert isinstance(without, DictConfig)
    network = build_module(without, data).network
    if any(isinstance(m, _BatchNorm) and m.track_running_stats for m in network.modules()):
        raise InputError(key, "batch normalisation can't be trained from scratch: its statistics stay fixed")
    if config.trainer.max_epochs < 1:
        raise InputError(key, "needs trainer.max_epochs of at least 1")
