"""A network, a loss and a data set that don't belong together are refused before any training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fimo.app.build import check_fit
from fimo.data.custom import CustomData
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.losses import Loss, cross_entropy, mean_squared_error


def data(targets: Tensor, inputs: Tensor | None = None) -> CustomData:
    everything = Instances(torch.randn(len(targets), 4) if inputs is None else inputs, targets)
    found = CustomData(everything, everything)
    found.setup()
    return found


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets).mean()


CLASSES = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("network", "loss", "key", "said"),
    [
        (
            nn.Linear(5, 3),
            cross_entropy,
            "model.network",
            "(inputs (4,) float32 each): mat1 and mat2",
        ),
        (nn.Linear(4, 2), cross_entropy, "model.network", "outputs of shape (2,) for 3 classes"),
        (
            nn.Linear(4, 3),
            mean,
            "model.loss",
            "expected one value for each of 4 instances but got",
        ),
        (
            nn.Linear(4, 3),
            mean_squared_error,
            "model.loss",
            "shape (3,) for each instance don't go",
        ),
    ],
)
def test_what_does_not_fit_is_named(network: nn.Module, loss: Loss, key: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_fit(network, loss, data(CLASSES))
    assert caught.value.key == key
    assert said in caught.value.problem
    assert "\n" not in str(caught.value)


def test_trying_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    check_fit(network, cross_entropy, data(CLASSES, torch.ones(4, 4)))
    assert all(map(torch.equal, network.state_dict().values(), before.values()))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
