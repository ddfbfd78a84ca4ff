"""What an attribution method is given: one frozen problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fimo.curvature.shared_rows import shared_at
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.models.final_model import FinalModel
from fimo.models.train_mode import TrainMode


@dataclass(frozen=True, eq=False)
class AttributionProblem:
    """Whose influence on what is asked for.

    Args:
        final_model: on the device to compute on.
        train: all N training instances, on that device.
        test: the J instances to explain, on that device.
        left_out: ``[L]`` int64, indices into ``train``; None for all N.
        further_training: what scores predict, for methods that follow it.
    """

    final_model: FinalModel
    train: Instances
    test: Instances
    left_out: Tensor | None = None
    further_training: FurtherTraining | None = None

    @cached_property
    def index(self) -> Tensor:
        """``[L]`` int64, the left-out instances' indices into ``train``."""
        return torch.arange(len(self.train)) if self.left_out is None else self.left_out

    @cached_property
    def removed(self) -> Instances:
        """The L left-out instances."""
        if self.left_out is None:
            return self.train
        found = self.train[self.left_out.to(self.train.targets.device)]
        shared = shared_at(self.final_model)
        return found if shared is None else shared.set_of(found)

    @cached_property
    def stochastic(self) -> bool:
        """Whether steps of further training draw random numbers, as dropout does."""
        return TrainMode.of(self.final_model, self.train).stochastic

    @property
    def dtype(self) -> torch.dtype:
        """Of scores: the final model's."""
        return next(iter(self.final_model.parameters().values())).dtype

    @property
    def followed(self) -> FurtherTraining:
        """The further training to predict.

        Raises:
            InputError: none was given.
        """
        if self.further_training is None:
            raise InputError("further_training", "the method follows it, but none was given")
        return self.further_training

    @property
    def run_gradients(self) -> int:
        """Instance gradients of one run of further training."""
        return self.followed.protocol.run_gradients(len(self.train))

    def along(self, further_training: FurtherTraining) -> AttributionProblem:
        """Return the same for other further training, such as a part of it."""
        return replace(self, further_training=further_training)
