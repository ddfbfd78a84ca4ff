"""What methods share that predict further training along its full runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.base import AttributionMethod
from fimo.models.final_model import FinalModel


class FollowingMethod(AttributionMethod):
    """A method whose scores are predictions for the given further training, averaged over its seeds.

    Attributes:
        score_sem: ``[E, J, L]`` after :meth:`attribute`, the standard error of the scores from their spread
            over seeds; None with one seed, or where no seed's run is followed.
    """

    estimates_loss_change: ClassVar[bool] = True
    follows_further_training = True
    score_sem: Tensor | None = None

    def fit(self, final_model: FinalModel, train: Instances) -> None:
        super().fit(final_model, train)
        self.score_sem = None

    @property
    def ft(self) -> FurtherTraining:
        if self.further_training is None:
            raise InputError("further_training", f"{type(self).__name__} follows it, but none was given")
        return self.further_training

    def average(self, seeds: Iterator[Tensor]) -> Tensor:
        """Return the mean of each seed's scores ``[E, J, L]``, and keep its standard error."""
        total = squares = None
        count = 0
        for scores in seeds:
            count += 1
            if total is None or squares is None:
                total, squares = torch.zeros_like(scores), torch.zeros_like(scores)
            delta = scores - total
            total += delta / count
            squares += delta * (scores - total)
        assert total is not None
        assert squares is not None
        dtype = next(iter(self.final_model.parameters().values())).dtype
        if count > 1:
            self.score_sem = (squares / (count - 1) / count).sqrt().to(dtype)
        return total.to(dtype)
