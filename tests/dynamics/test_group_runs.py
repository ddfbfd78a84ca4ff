"""Group runs against plain loops, and what is concluded from them on synthetic effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fimo.dynamics.group_runs import choose_groups, correct, run_groups
from fimo.further_training.protocol import Protocol
from tests.cases import CASES
from tests.reference.further_training import plain_run


def test_groups_are_equal_parts_of_random_partitions() -> None:
    left_out = torch.arange(0, 400, 9)
    found = choose_groups(left_out, 400, (3, 5, 8), 12, torch.Generator().manual_seed(0))
    assert list(found) == [3, 5, 8]
    for groups in found.values():
        assert groups.shape == (4, 22)
        for first in (0, 2):  # halves
            members = groups[first : first + 2].flatten().tolist()
            assert len(set(members)) == 44
            assert set(members) <= set(left_out.tolist())
    everything = choose_groups(torch.arange(400), 400, (0,), 10, torch.Generator())
    assert everything[0].shape == (10, 40)


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch"])
@pytest.mark.parametrize("name", ["mlp_regression", "conv_net"])
def test_losses_without_a_group_are_those_of_a_plain_loop(name: str, rule: Any) -> None:
    case = CASES[name]()
    protocol = Protocol(lr=0.05, batch_size=4, epochs=2, leave_out=rule, dtype="float64")
    groups = {0: torch.tensor([[1, 5], [2, 9]]), 4: torch.tensor([[0, 3]])}
    found = run_groups(case.final_model, case.train, case.test, protocol, groups, at_once=2)
    masked = Protocol(
        lr=0.05, batch_size=4, epochs=2, leave_out="mask" if rule == "shift" else rule, dtype="float64"
    )
    for seed, rows in groups.items():
        for losses, group in zip(found[seed], rows.tolist(), strict=True):
            expected = plain_run(case.final_model, case.train, case.test, masked, seed, group)[0]
            torch.testing.assert_close(losses, expected)


def synthetic(runs: int, noise: float) -> Any:
    """Groups of 10 seeds over 30 instances with effects on 6 tests, and their real values."""
    generator = torch.Generator().manual_seed(1)
    groups = choose_groups(torch.arange(30), 10_000, range(10), runs, generator)
    rows = torch.cat(list(groups.values()))
    member = (rows[:, :, None] == torch.arange(30)).any(1)
    block = torch.arange(10).repeat_interleave(runs // 10)
    effects = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    real = member.double() @ effects.T
    return member, block, effects, real + noise * torch.randn(real.shape, generator=generator)


def test_a_right_response_is_left_as_it_is() -> None:
    member, block, _, real = synthetic(20, 0.0)
    found = correct(member, block, real, real, torch.ones(30, dtype=torch.float64), 10)
    assert found.scale == pytest.approx(1)
    assert found.correlation == pytest.approx(1)
    assert found.remainder.abs().max() < 1e-8
    halved = correct(member, block, real, real / 2, torch.ones(30, dtype=torch.float64), 10)
    assert halved.scale == pytest.approx(2)


def test_the_same_offset_of_all_a_seed_s_runs_changes_nothing() -> None:
    member, block, _, real = synthetic(40, 0.5)
    weight = torch.ones(30, dtype=torch.float64)
    predicted = torch.zeros_like(real)
    found = [correct(member, block, y, predicted, weight, 10) for y in (real, real + 7.0 * block[:, None])]
    torch.testing.assert_close(found[0].remainder, found[1].remainder)


def test_what_the_response_misses_is_found_by_enough_runs_with_honest_error_bars() -> None:
    member, block, effects, real = synthetic(100, 0.5)
    nothing = torch.zeros_like(real)
    found = correct(member, block, real, nothing, torch.ones(30, dtype=torch.float64), 10)
    centred = effects - effects.mean(1, keepdim=True)
    error = found.remainder - found.remainder.mean(1, keepdim=True) - centred
    assert torch.nn.functional.cosine_similarity(found.remainder, centred).min() > 0.95
    assert 0.4 < (error / found.variance.sqrt()).square().mean().sqrt() < 2.5


def test_runs_that_are_noise_leave_little() -> None:
    member, block, effects, real = synthetic(20, 0.0)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(real.shape, generator=generator, dtype=torch.float64)
    found = correct(member, block, noise, 0 * noise, torch.ones(30, dtype=torch.float64), 10)
    assert found.remainder.norm() < 0.3 * effects.norm()
