"""What is concluded from few real runs, on synthetic effects whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fimo.linear_response.discrepancy import OWN, Correction, _shared, correct, correlations, earlier

STEPS = list(range(1, 101))
TESTS, LEFT_OUT = 6, 40
ALIKE = torch.ones(LEFT_OUT)
"""Sizes of effects."""


def walk(seed: int, rows: int, memory: float) -> Tensor:
    """[rows, E]: stationary processes of unit variance, correlated as exp(-lag / (memory * steps))."""
    time = torch.tensor(STEPS, dtype=torch.float64)
    # constant relative memory is constant memory in log time
    lag = (time[:, None].log() - time.log()).abs() / memory
    factor = torch.linalg.cholesky(torch.exp(-lag) + 1e-9 * torch.eye(len(time), dtype=torch.float64))
    noise = torch.randn(rows, len(time), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise @ factor.T


def effects(seed: int = 0) -> Tensor:
    """[E, J, L], slowly changing."""
    return walk(seed, TESTS * LEFT_OUT, 3.0).view(TESTS, LEFT_OUT, -1).permute(2, 0, 1)


def layout(draws: int) -> tuple[Tensor, Tensor]:
    """Every instance, with as many seeds."""
    instance = torch.arange(LEFT_OUT).repeat(draws)
    return instance, torch.arange(draws).repeat_interleave(LEFT_OUT)


def runs(truth: Tensor, instance: Tensor, seed: Tensor, noise: float) -> Tensor:
    """[K, E, J]: effects, an offset of each seed, and noise without memory."""
    generator = torch.Generator().manual_seed(5)
    found = truth[:, :, instance].permute(2, 0, 1)
    offset = torch.randn(int(seed.max()) + 1, len(truth), TESTS, generator=generator, dtype=torch.float64)
    return (
        found + 3 * offset[seed] + noise * torch.randn(found.shape, generator=generator, dtype=torch.float64)
    )


def agreement(found: Tensor, truth: Tensor) -> float:
    a, b = (x - x.mean(-1, keepdim=True) for x in (found, truth))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())


def unpredicted(steps: Sequence[int], real: Tensor, instance: Tensor, seed: Tensor) -> Correction:
    """Return what real runs say where nothing was predicted."""
    average = torch.zeros(len(steps), real.shape[2], LEFT_OUT, dtype=torch.float64)
    return correct(steps, real, torch.zeros_like(real), average, instance, seed, ALIKE)


def test_a_right_prediction_is_left_as_it_is_whatever_a_seed_s_runs_share() -> None:
    truth = effects()
    instance, seed = layout(2)
    real = runs(truth, instance, seed, noise=0.0)
    predicted = truth[:, :, instance].permute(2, 0, 1)
    found = correct(STEPS, real, predicted, truth, instance, seed, ALIKE)
    torch.testing.assert_close(found.scale, torch.ones(100, dtype=torch.float64))
    torch.testing.assert_close(found.correlation, torch.ones(100, dtype=torch.float64))
    assert found.remainder.abs().max() < 1e-8
    halved = correct(STEPS, real, 0.8 * predicted, 0.8 * truth, instance, seed, ALIKE)
    # the prior counts as one run of 80
    expected = (1.25 * 0.64 + 1 / 80) / (0.64 + 1 / 80)
    torch.testing.assert_close(
        halved.scale[:1], torch.tensor([expected], dtype=torch.float64)
    )  # none earlier
    assert (halved.explained - truth).norm() < 0.01 * truth.norm()
    opposite = correlations(STEPS, real, -predicted, seed)
    torch.testing.assert_close(opposite, -torch.ones(100, dtype=torch.float64))


def test_earlier_predictions_say_what_later_ones_have_lost() -> None:
    truth = effects()
    instance, seed = layout(2)
    real = runs(truth, instance, seed, noise=0.0)
    # what is predicted of the last half is something else
    predicted = torch.cat([truth[:50], effects(9)[50:]])
    of_runs = predicted[:, :, instance].permute(2, 0, 1)
    found = correct(STEPS, real, of_runs, predicted, instance, seed, ALIKE)
    late = slice(75, 100)
    assert agreement(found.explained[late], truth[late]) > agreement(predicted[late], truth[late]) + 0.3


def test_earlier_predictions_are_taken_in_the_unit_of_their_time() -> None:
    # losses of sure classes, and all effects on them, shrink by orders of magnitude
    truth = effects()
    shrinking = truth * torch.logspace(0, -8, 100, dtype=torch.float64)[:, None, None]
    instance, seed = layout(2)
    found = []
    for values in (truth, shrinking):
        predicted = torch.cat([values[:50], values[50:].roll(1, 2)])  # the last half is wrong
        of_runs = predicted[:, :, instance].permute(2, 0, 1)
        real = values[:, :, instance].permute(2, 0, 1)
        found.append(correct(STEPS, real, of_runs, predicted, instance, seed, ALIKE).explained)
    late = slice(75, 100)
    assert agreement(found[1][late], truth[late]) > agreement(found[0][late], truth[late]) - 0.02


def test_an_instance_of_which_much_is_missed_does_not_move_the_others() -> None:
    truth = effects()
    truth[:, :, 0] *= 300
    predicted = truth.clone()
    predicted[:, :, 0] *= 0.5
    ran = torch.arange(0, LEFT_OUT, 2)
    instance, seed = ran.repeat(2), torch.arange(2).repeat_interleave(len(ran))
    real, of_runs = (x[:, :, instance].permute(2, 0, 1) for x in (truth, predicted))
    size = truth.square().mean((0, 1))
    found = correct(STEPS, real, of_runs, predicted, instance, seed, size)
    values = found.explained + found.remainder
    # of the others, those that were run and those that were not keep their order and distance
    assert agreement(values[:, :, 1:], truth[:, :, 1:]) > 0.99
    unweighted = correct(STEPS, real, of_runs, predicted, instance, seed, ALIKE)
    assert agreement((unweighted.explained + unweighted.remainder)[:, :, 1:], truth[:, :, 1:]) < 0.9


def test_predictions_that_diverged_give_no_number_and_no_error() -> None:
    truth = effects()
    instance, seed = layout(2)
    average = truth.clone()
    average[90:] = torch.nan
    of_runs = average[:, :, instance].permute(2, 0, 1)
    size = torch.full((LEFT_OUT,), torch.nan)
    found = correct(STEPS, runs(truth, instance, seed, noise=0.1), of_runs, average, instance, seed, size)
    assert (found.explained + found.remainder)[90:].isnan().all()


def test_earlier_predictions_are_means_over_the_middle_of_the_time_before() -> None:
    predicted = torch.randn(10, 2, 3, dtype=torch.float64)
    found = earlier(range(1, 11), predicted)
    assert not found[0].any()  # there is none before the first
    torch.testing.assert_close(found[1], predicted[0])  # 1 of 2
    torch.testing.assert_close(found[9], predicted[2:7].mean(0))  # 3 to 7 of 10


def test_noise_that_passes_is_averaged_over_further_training() -> None:
    truth = effects()
    instance, seed = layout(1)
    real = runs(truth, instance, seed, noise=1.0)
    found = unpredicted(STEPS, real, instance, seed)
    alone = agreement(real.permute(1, 2, 0), truth)
    assert alone < 0.75
    assert agreement(found.remainder, truth) > 0.9


def test_changes_are_followed_where_there_is_no_noise() -> None:
    truth = walk(2, TESTS * LEFT_OUT, 1.0).view(TESTS, LEFT_OUT, -1).permute(2, 0, 1)
    instance, seed = layout(1)
    real = runs(truth, instance, seed, noise=0.0)
    found = unpredicted(STEPS, real, instance, seed)
    constant = truth.mean(0, keepdim=True).expand_as(truth)
    assert 1 - agreement(found.remainder, truth) < 0.4 * (1 - agreement(constant, truth))


def test_more_runs_of_an_instance_are_worth_more_and_their_error_bars_say_so() -> None:
    shared, own = effects(), [effects(seed) for seed in (11, 12, 13, 14)]
    few, many = layout(1), layout(4)
    found = []
    for instance, seed in (few, many):
        real = torch.zeros(len(instance), len(STEPS), TESTS, dtype=torch.float64)
        for k, (i, s) in enumerate(zip(instance.tolist(), seed.tolist(), strict=True)):
            real[k] = shared[:, :, i] + OWN**0.5 * own[s][:, :, i]
        found.append(unpredicted(STEPS, real, instance, seed))
    assert agreement(found[1].remainder, shared) > agreement(found[0].remainder, shared) + 0.05
    centred = shared - shared.mean(-1, keepdim=True)
    for one in found:
        z = ((one.remainder - centred) / one.variance.sqrt()).square().mean().sqrt()
        assert 0.6 < z < 1.5


@pytest.mark.parametrize("steps", [[7], [1, 2], [3, 10, 40, 200]])
def test_instances_without_a_run_keep_their_prediction_and_few_points_will_do(steps: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(5, len(steps), TESTS, generator=generator, dtype=torch.float64)
    instance, seed = torch.tensor([4, 7, 9, 4, 1]), torch.tensor([0, 0, 0, 1, 0])
    found = unpredicted(steps, real, instance, seed)
    others = [i for i in range(LEFT_OUT) if i not in (1, 4, 7, 9)]
    assert not found.remainder[:, :, others].any()
    assert found.remainder[:, :, [1, 4, 7, 9]].all()
    assert (found.variance[:, :, others] > found.variance[:, :, [7]]).all()


def test_one_seed_s_offset_is_found_though_it_runs_without_few_instances() -> None:
    truth = effects()
    instance = torch.cat([torch.arange(LEFT_OUT), torch.tensor([3, 8])])
    seed = torch.tensor([0] * LEFT_OUT + [1, 1])
    real = runs(truth, instance, seed, noise=0.0)
    moved = real.clone()
    moved[-2:] += 100.0
    found = [unpredicted(STEPS, r, instance, seed).remainder for r in (real, moved)]
    torch.testing.assert_close(found[0], found[1])


def test_test_instances_without_any_real_effect_change_nothing_for_the_others() -> None:
    truth = effects()
    instance, seed = layout(2)
    real = runs(truth, instance, seed, noise=0.3)
    average = 0.5 * truth
    found = correct(STEPS, real, average[:, :, instance].permute(2, 0, 1), average, instance, seed, ALIKE)
    still = torch.cat([real, 0 * real[:, :, :1], 1e-170 * real[:, :, 1:2]], 2)
    more = torch.cat([average, 1e-9 * average[:, :1], 1e-170 * average[:, 1:2]], 1)
    other = correct(STEPS, still, more[:, :, instance].permute(2, 0, 1), more, instance, seed, ALIKE)
    assert other.remainder.isfinite().all()
    assert other.remainder[:, -2:].abs().max() < 1e-8
    assert agreement(other.remainder[:, :-2], found.remainder) > 0.98
    nothing = torch.zeros_like(real)
    assert not unpredicted(STEPS, nothing, instance, seed).remainder.any()


def test_runs_that_agree_are_believed_nearly_whole() -> None:
    """Of four runs of each instance that agree exactly, next to nothing is put down to their seeds."""
    truth = effects()
    instance, seed = layout(4)
    real = truth[:, :, instance].permute(2, 0, 1)
    found = unpredicted(STEPS, real, instance, seed)
    centred = truth - truth.mean(-1, keepdim=True)
    share = (found.remainder * centred).sum() / centred.square().sum()
    assert 0.9 < share < 1.05


def test_seeds_that_share_no_instance_are_taken_to_have_nearly_the_same_offset() -> None:
    truth = effects() + 5.0  # all instances' effects have something in common
    instance, seed = torch.arange(LEFT_OUT), (torch.arange(LEFT_OUT) >= LEFT_OUT - 4).long()
    real = truth[:, :, instance].permute(2, 0, 1)
    found = unpredicted(STEPS, real, instance, seed)
    assert agreement(found.remainder, truth) > 0.9


def test_lasting_noise_of_single_runs_is_not_taken_for_what_seeds_share() -> None:
    truth = effects()
    large = range(8)  # seeds after the second have runs without these only, to which their offsets are fitted
    instance = torch.tensor([*range(LEFT_OUT), *range(0, LEFT_OUT, 2), *(i for _ in range(6) for i in large)])
    later = [s for s in range(2, 8) for _ in large]
    seed = torch.tensor([0] * LEFT_OUT + [1] * (LEFT_OUT // 2) + later)
    size = ALIKE.clone()
    size[list(large)] = 20
    scores, kept = [], []
    for draw in range(4):
        own = 2 * walk(40 + draw, len(seed) * TESTS, 3.0).view(len(seed), TESTS, -1).transpose(1, 2)
        predicted = truth[:, :, instance].permute(2, 0, 1)
        real = runs(truth, instance, seed, noise=0.0) + own
        found = correct(STEPS, real, predicted, truth, instance, seed, size)
        scores.append(agreement((found.explained + found.remainder)[50:], truth[50:]))
        kept.append(float((1 - found.unexplained[50:]).mean()))
    assert min(scores) > 0.98
    assert max(kept) < 0.15


def test_what_seeds_share_is_found_by_products_of_their_common_instances() -> None:
    instance, seed = torch.tensor([0, 1, 2, 3, 1, 2, 3, 4, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    values = torch.randn(7, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, number = _shared(values, instance, seed)
    one, other = values[:, [1, 2, 3]], values[:, [4, 5, 6]]
    centred = torch.eye(3, dtype=torch.float64) - 1 / 3
    expected = torch.einsum("eij,ik,ekj->e", one, centred, other) / 3
    torch.testing.assert_close(total, expected)
    assert number == 2  # seeds 0 and 2, and 1 and 2, have one instance in common
    offset = torch.tensor([1.0, -4.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(_shared(values + offset[seed][:, None], instance, seed)[0], expected)
