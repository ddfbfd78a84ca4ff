"""Methods that follow further training in float64 give scores of the final model's own dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.data.instances import Instances
from fimo.further_training import Protocol, evaluation_points, full_runs
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.base import AttributionMethod
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.response import Response
from fimo.methods.unrolled import Unrolled
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy


@pytest.mark.parametrize("method", [Response, CalibratedResponse, Unrolled])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_float32_model_is_followed_through_runs_in_float64(
    method: type[AttributionMethod], optimizer: str
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(20, 3)
    train = Instances(inputs, (inputs[:, 0] > 0).long())
    model = FinalModel(nn.Sequential(nn.Linear(3, 2)), cross_entropy)
    protocol = Protocol(
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=0.1, batch_size=5, epochs=2, dtype="float64", leave_out="mask",
    )  # fmt: skip
    steps = tuple(evaluation_points(protocol, len(train))[0])
    runs = FurtherTraining(protocol, steps, (0, 1), lambda: full_runs(model, train, protocol, [0, 1]))
    scores = method().attribute(model, train, train[:5], torch.arange(8), runs).values
    assert scores.dtype == torch.float32
    assert scores.shape == (2, 5, 8)
    assert torch.isfinite(scores).all()
