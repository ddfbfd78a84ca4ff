"""Trajectories of full runs against torch.optim's own state in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.further_training import full_runs
from fimo.further_training.trajectory import Trajectory
from fimo.store.files import Store
from tests.cases import CASES, Case
from tests.reference.further_training import make_optimizer


def plain_states(case: Case, protocol: Protocol, seed: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Parameters and torch's bias-corrected second moments at every evaluation point."""
    network = case.final_model.to(dtype=torch.float64).network
    trained = list(network.parameters())
    for p in trained:
        p.requires_grad_()
    optimizer = make_optimizer(trained, protocol)
    generator, found, step = torch.Generator().manual_seed(seed), [], 0
    n = len(case.train)
    points = protocol.evaluation_steps(n, n)
    while step < points[-1]:
        for index in torch.randperm(n, generator=generator).split(protocol.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = protocol.learning_rate(step, protocol.total_steps(n))
            optimizer.zero_grad()
            batch = case.train[index]
            case.final_model.loss(network(batch.inputs), batch.targets).mean().backward()
            optimizer.step()
            step += 1
            if step in points:
                moments = []
                for p in trained:
                    state = optimizer.state[p]
                    assert int(state["step"]) == step
                    moments.append(state["exp_avg_sq"] / (1 - protocol.betas[1] ** step))
                found.append(([p.detach().clone() for p in trained], moments))
            if step == points[-1]:
                break
    return found


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("every", ["epoch", 1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("name", ["mlp_regression", "conv_net"])
def test_the_second_moment_is_adam_s_own_without_its_bias_towards_zero(
    name: str, optimizer: Any, every: Any, stored: bool, tmp_path: Any
) -> None:
    case = CASES[name]()
    protocol = Protocol(
        optimizer=optimizer, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, batch_size=5, epochs=2,
        schedule="linear", dtype="float64", evaluate_every=every,
    )  # fmt: skip
    store = Store(tmp_path) if stored else None
    trajectories: list[Trajectory] = list(
        full_runs(case.final_model, case.train, protocol, [3, 4], store=store)
    )
    for trajectory, seed in zip(trajectories, (3, 4), strict=True):
        assert trajectory.second_moment is not None
        expected = plain_states(case, protocol, seed)
        assert len(trajectory.parameters) == len(trajectory.second_moment) == 1 + len(expected)
        for name_, p in case.final_model.parameters().items():
            torch.testing.assert_close(trajectory.parameters[0][name_], p)
            assert not trajectory.second_moment[0][name_].any()
        for e, (parameters, moments) in enumerate(expected, 1):
            own = trajectory.parameters[e], trajectory.second_moment[e]
            for k, name_ in enumerate(case.final_model.parameters()):
                torch.testing.assert_close(own[0][name_], parameters[k], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(own[1][name_], moments[k], rtol=1e-9, atol=1e-16)
