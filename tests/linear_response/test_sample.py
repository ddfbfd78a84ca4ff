"""A sample of training instances that stands for all of them, where there are too many to follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fimo.engine.leave_out import make_rule
from fimo.engine.protocol import Protocol
from fimo.further_training import full_runs
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.leave_out_weights import Step, steps
from fimo.linear_response.output_space import OutputSpace, Sample, _inclusion
from fimo.linear_response.sampled_steps import sampled
from fimo.methods.response import Response
from fimo.models.losses import cross_entropy, mean_squared_error
from tests.cases import Case, trained
from tests.reference.further_training import plain_run


def test_chances_are_in_proportion_to_sizes_and_add_up() -> None:
    size = torch.tensor([1.0, 2.0, 3.0, 100.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(_inclusion(size, 3), torch.tensor([0.2, 0.4, 0.6, 1.0, 0.8]).double())
    torch.testing.assert_close(_inclusion(size, 5), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("most", [600, 2000])
def test_a_sample_has_the_mean_curvature_of_all(most: int) -> None:
    """As in a sum over instances of J^T H J, with inputs that differ from instance to instance."""
    torch.manual_seed(0)
    outputs, targets = 3 * torch.randn(2, 3000, 4, dtype=torch.float64), torch.randint(4, (3000,))
    inputs = torch.randn(3000, 3, dtype=torch.float64)
    hessian = (cross_entropy.hessian(outputs[0], targets) + cross_entropy.hessian(outputs[1], targets)) / 2

    def mean(curvature: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("nij,nk,nl->ijkl", curvature, x, x) / len(x)

    sample = Sample.draw(cross_entropy, outputs, targets, torch.tensor([2]), most)
    assert len(sample.kept.unique()) == len(sample.kept) == pytest.approx(most, abs=1)
    columns = sample.directions.transpose(1, 2)
    along = sample.directions @ hessian[sample.kept] @ columns
    found = mean(sample.weight[:, None, None] * columns @ along @ sample.directions, inputs[sample.kept])
    expected = mean(hessian, inputs)
    assert (found - expected).norm() < 4 / most**0.5 * expected.norm()


def test_where_few_instances_have_nearly_all_of_the_curvature_they_are_followed_themselves() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 300, 4, dtype=torch.float64), torch.randint(4, (300,))
    assert OutputSpace.choose(cross_entropy, outputs, targets, torch.tensor([2]), 40).sample is not None
    hard = torch.arange(7, 300, 10)
    sure = 60 * nn.functional.one_hot(targets, 4).double() * (torch.arange(300) % 10 != 7)[:, None]
    space = OutputSpace.choose(cross_entropy, outputs + sure, targets, torch.tensor([2]), 40)
    assert space.sample is None
    assert len(space.kept) == len(space.directions) == 40
    assert {2, *hard.tolist()} <= set(space.kept.tolist())


@pytest.mark.parametrize("leave_out", ["mask", "every_batch", "reweighted"])
def test_steps_take_off_the_left_out_and_leave_the_rest_to_the_sample(leave_out: str) -> None:
    protocol = Protocol(batch_size=4, epochs=3, leave_out=leave_out)  # type: ignore[arg-type]
    n, left_out, rank = 12, torch.tensor([3, 5, 11]), 2
    kept, weight = torch.tensor([0, 3, 7, 8, 10]), torch.tensor([0.5, 2.0, 1.0, 1.5, 0.25]).double()
    sample = Sample(left_out, kept, torch.ones(5, 1, 1), weight)
    space = OutputSpace(torch.cat([left_out.repeat_interleave(rank), kept]), torch.ones(11, 1, 1), sample)

    def batches() -> Iterator[Step]:
        return steps([3, 5], left_out[:2], make_rule(protocol, n), protocol, torch.float64)

    drawn = torch.zeros(5, dtype=torch.int64)
    for found, whole in zip(sampled(batches(), space, sample, [3, 5], 4, n), batches(), strict=True):
        others = {"mask": 1.0, "every_batch": 1.0, "reweighted": n / (n - 1)}[leave_out]
        for seed in range(2):
            # by instance, as a plain loop over the batch has it: what differs from weighing as the others do
            expected = torch.zeros(n, 2, dtype=torch.float64)
            for b, i in enumerate(whole.index[seed].tolist()):
                expected[i] += whole.without[seed, b] - whole.full[b] * others
            own = found.index[seed] < len(left_out) * rank
            by_row = torch.zeros(len(left_out) * rank, 2, dtype=torch.float64)
            by_row.index_add_(0, found.index[seed][own], found.without[seed][own])
            torch.testing.assert_close(by_row, expected[left_out].repeat_interleave(rank, 0))
            assert not found.full[seed][own].any()
            rows = found.index[seed][~own] - len(left_out) * rank
            drawn += torch.bincount(rows, minlength=5)
            torch.testing.assert_close(found.full[seed][~own], weight[rows] / len(rows))
            torch.testing.assert_close(
                found.without[seed][~own], (others * weight[rows] / len(rows))[:, None].expand(-1, 2)
            )
    assert drawn.max() - drawn.min() <= 2  # each as often as any other


def regression(n: int = 1200) -> Case:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        inputs = torch.randn(n + 10, 5)
        targets = torch.tanh(inputs) @ torch.randn(5, 2) + 0.5 * torch.randn(n + 10, 2)
        network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
        return trained("regression", network, mean_squared_error, inputs, targets, n, steps=30)
    finally:
        torch.set_default_dtype(before)


def scores(case: Case, protocol: Protocol, left_out: list[int], max_rows: int) -> Tensor:
    points = tuple(protocol.evaluation_steps(len(case.train), len(case.train)))
    following = FurtherTraining(
        protocol, points, (0, 1), lambda: full_runs(case.final_model, case.train, protocol, [0, 1])
    )
    method = Response(max_rows=max_rows, removal="own", kernels="shared", checks=0)
    return method.attribute(case.final_model, case.train, case.test, torch.tensor(left_out), following).values


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.1}, {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.01}, {"optimizer": "adam", "lr": 0.005}],
    ids=lambda options: str(options.get("optimizer", options.get("momentum", "sgd"))),
)
def test_with_a_sixth_followed_changes_are_those_of_real_runs(options: dict[str, object]) -> None:
    case, left_out = regression(), [3, 50, 77, 420, 900, 1130]
    protocol = Protocol(batch_size=30, epochs=2, dtype="float64", leave_out="mask", **options)  # type: ignore[arg-type]
    real = []
    for seed in (0, 1):
        full = plain_run(case.final_model, case.train, case.test, protocol, seed)[0]
        runs = [plain_run(case.final_model, case.train, case.test, protocol, seed, [i])[0] for i in left_out]
        real.append(torch.stack(runs, -1) - full[..., None])
    expected = torch.stack(real).mean(0)
    found = scores(case, protocol, left_out, max_rows=400)
    likeness = nn.functional.cosine_similarity(found.flatten(1), expected.flatten(1))
    size = found.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # all rows followed: .95 to .99 after both epochs, and sizes of .8 to 1.0
    assert likeness[0] > 0.75
    assert likeness[-1] > 0.94
    assert ((size > 0.7) & (size < 1.4)).all()


def test_what_is_said_of_an_instance_does_not_depend_on_the_others_that_are_asked_about() -> None:
    case, protocol = (
        regression(),
        Protocol(lr=0.1, batch_size=30, epochs=1, dtype="float64", leave_out="mask"),
    )
    several = scores(case, protocol, [3, 77, 420], max_rows=400)
    torch.testing.assert_close(several[..., 1:2], scores(case, protocol, [77], max_rows=400))
