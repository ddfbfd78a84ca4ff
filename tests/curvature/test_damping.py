"""Dampings as configured, and the time of gradient flow that matches further training."""

from __future__ import annotations

import pytest
import torch

from fimo.engine.protocol import Protocol
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.damping import Damping, training_time


def of(protocol: Protocol, *steps: int) -> FurtherTraining:
    return FurtherTraining(protocol, steps, (0,), lambda: iter(()))


def drift(optimizer: torch.optim.Optimizer, p: torch.Tensor, slope: float, noise: float, steps: int) -> float:
    """Return how far parameters move against a small slope under noisy gradients, on average, per slope."""
    start = p.detach().clone()
    for _ in range(steps):
        p.grad = slope + noise * torch.randn(p.shape, dtype=p.dtype)
        optimizer.step()
    return (start - p.detach()).mean().item() / slope


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_time_is_how_far_adam_drifts_along_a_slope_below_the_noise_of_its_batches(
    optimizer: str, batch_size: int
) -> None:
    """torch's Adam on 4,000 parameters whose instances' gradients have a standard deviation of 3."""
    torch.manual_seed(0)
    steps, noise = 400, 3 / batch_size**0.5
    p = torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    made = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]([p], lr=0.01, weight_decay=0)
    moved = drift(made, p, 0.1 * noise, noise, steps)
    protocol = Protocol(optimizer=optimizer, lr=0.01, batch_size=batch_size, steps=steps)
    found = training_time(of(protocol, steps // 4, steps), mean_squared_gradient=9.0)
    assert found[1].item() == pytest.approx(moved, rel=0.1)
    assert found[0].item() == pytest.approx(found[1].item() / 4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_time_is_how_far_sgd_moves_along_a_slope(momentum: float) -> None:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    moved = drift(torch.optim.SGD([p], lr=0.01, momentum=momentum), p, 0.3, 0.0, 2000)
    protocol = Protocol(lr=0.01, momentum=momentum, steps=2000)
    assert training_time(of(protocol, 2000), 9.0).item() == pytest.approx(moved, rel=0.01)


def test_a_schedule_s_time_is_the_sum_of_its_learning_rates() -> None:
    found = training_time(of(Protocol(lr=0.5, steps=4, schedule="linear"), 1, 3, 4), 1.0)
    assert found.tolist() == pytest.approx([0.5, 0.5 + 0.375 + 0.25, 0.5 + 0.375 + 0.25 + 0.125])


def test_each_form_of_a_damping_is_a_multiple_of_what_it_names() -> None:
    for value, expected in ((0.3, 0.3), ("0.3", 0.3), ("10x", 20.0), ({"relative": 0.5}, 1.0), ("auto", 0.7)):
        assert Damping.parse(value).resolve(2.0, 7.0).tolist() == pytest.approx([expected])
    matched = Damping.parse("time_matched").resolve(2.0, 7.0, of(Protocol(lr=0.5, steps=4), 2, 4))
    assert matched.tolist() == pytest.approx([1.0, 0.5])
