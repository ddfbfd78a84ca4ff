"""The response against real runs, dense matrix functions and its limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.engine.leave_out import LeaveOut, make_rule
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.evaluation import agreement
from fimo.further_training import full_runs
from fimo.further_training.trajectory import FurtherTraining
from fimo.linear_response.leave_out_weights import Step, steps
from fimo.linear_response.output_space import OutputSpace
from fimo.linear_response.path_points import Segment, segments, spread
from fimo.linear_response.phi import relaxation, times
from fimo.linear_response.recursion import _followed
from fimo.methods.exact import ExactInfluence
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response, turns
from fimo.models.losses import binary_cross_entropy, cross_entropy, huber, mean_squared_error
from tests.cases import CASES, LINEAR_CASES, Case, trained
from tests.reference import attribution as dense
from tests.reference.further_training import plain_run


def following(case: Case, protocol: Protocol, seeds: Sequence[int] = (0, 1)) -> FurtherTraining:
    points = tuple(protocol.evaluation_steps(len(case.train), len(case.train)))
    return FurtherTraining(
        protocol, points, tuple(seeds), lambda: full_runs(case.final_model, case.train, protocol, seeds)
    )


def real_changes(case: Case, protocol: Protocol, left_out: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """[E, J, L], averaged over seeds, by plain loops."""
    found = []
    for seed in seeds:
        full = plain_run(case.final_model, case.train, case.test, protocol, seed)[0]
        runs = [plain_run(case.final_model, case.train, case.test, protocol, seed, [i])[0] for i in left_out]
        # of a number of steps, a run of shorter epochs completes more epochs
        runs = [torch.cat([run[: len(full) - 1], run[-1:]]) for run in runs]
        found.append(torch.stack(runs, -1) - full[..., None])
    return torch.stack(found).mean(0)


def scores(case: Case, protocol: Protocol, left_out: Sequence[int], **arguments: Any) -> Tensor:
    method = Response(**{"removal": "own", **arguments})
    return method.attribute(
        case.final_model, case.train, case.test, torch.tensor(left_out), following(case, protocol)
    ).values


def linear_regression(n: int = 22, outputs: int = 2) -> Case:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        inputs = torch.randn(26, 3)
        targets = inputs @ torch.randn(3, outputs) + torch.randn(26, outputs)
        network = nn.Sequential(nn.Linear(3, outputs))
        return trained("linear", network, mean_squared_error, inputs, targets, n, steps=5)
    finally:
        torch.set_default_dtype(before)


HORIZONS: dict[str, dict[str, Any]] = {
    "epoch": {"epochs": 4},
    "1 step": {"epochs": 3, "evaluate_every": 1},
    "2 steps": {"epochs": 3, "evaluate_every": 2},
    "3 steps": {"epochs": 3, "evaluate_every": 3},
    "epochs and some steps": {"steps": 11},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "weight decay": {"weight_decay": 0.3},
    "both": {"momentum": 0.8, "weight_decay": 0.1},
    "nesterov and schedule": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "schedule": "cosine"},
}


@pytest.mark.parametrize(
    "size", [1, 4, 5, 11, 22]
)  # N = 22: without one, an epoch of batches of 1 is shorter
@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_linear_model_the_response_is_the_real_change(options: str, horizon: str, size: int) -> None:
    case = linear_regression(14)
    # each rule and number of segments with each of the others' choices
    choices = itertools.product(("shift", "mask", "every_batch", "reweighted"), (1, 3))
    which = list(OPTIONS).index(options) + list(HORIZONS).index(horizon) + size
    rule, segments = list(choices)[which % 6]
    check_exact(case, size, {**HORIZONS[horizon], **OPTIONS[options], "leave_out": rule}, segments)


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_where_leaving_out_shortens_the_epoch_a_run_makes_no_step(
    options: str, horizon: str, segments: int
) -> None:
    case = linear_regression(13)  # one instance is left for the last batch of 4
    check_exact(case, 4, {**HORIZONS[horizon], **OPTIONS[options], "leave_out": "shift"}, segments)


def check_exact(case: Case, size: int, options: dict[str, Any], segments: int, lr: float = 0.05) -> None:
    """Compare the response with real runs, to float64 rounding."""
    protocol = Protocol(lr=lr, batch_size=size, dtype="float64", **options)
    left_out = [0, 5, 12]
    found = scores(case, protocol, left_out, kernels="own", segments=segments)
    expected = real_changes(case, protocol, left_out, [0, 1])
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}, {"weight_decay": 0.3}])
def test_changes_of_earlier_segments_are_read_by_later_jacobians(options: dict[str, Any]) -> None:
    """Against the recursion on parameters, with each segment's dense Jacobians."""
    torch.manual_seed(0)
    inputs = torch.randn(26, 3, dtype=torch.float64)
    targets = torch.randn(26, 1, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    case = trained("tanh", network, mean_squared_error, inputs, targets, 22, steps=20)
    protocol = Protocol(
        lr=0.3, batch_size=8, epochs=8, leave_out="mask", dtype="float64", evaluate_every=1, **options
    )
    ft = following(case, protocol, [3])
    found = (
        Response(kernels="own", segments=4, removal="own")
        .attribute(case.final_model, case.train, case.test, torch.tensor([0, 5, 20]), ft)
        .values
    )
    (trajectory,) = ft.full_runs()
    model, names = case.final_model, list(case.final_model.parameters())

    def outputs(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model.network, dict(parameters), (x,))[:, 0]

    def jacobian(parameters: Any, x: Tensor) -> Tensor:
        found = torch.func.jacrev(outputs)(dict(parameters), x)
        return torch.cat([found[name].flatten(1) for name in names], 1)

    generator = torch.Generator().manual_seed(3)
    batches = [b for _ in range(8) for b in torch.randperm(22, generator=generator).split(8)]
    expected = torch.zeros_like(found)
    cuts = segments(ft.steps, 4)
    for column, i in enumerate([0, 5, 20]):
        change = velocity = torch.zeros(model.size, dtype=torch.float64)
        for segment in cuts:
            middle = trajectory.parameters[(segment.first + segment.last) // 2]
            rows, tests = jacobian(middle, case.train.inputs), jacobian(middle, case.test.inputs)
            for t in range(segment.first, segment.last):
                batch = batches[t]
                residual = outputs(trajectory.parameters[t], case.train.inputs) - case.train.targets[:, 0]
                pull = 2 * (rows @ change)[batch] * (batch != i) - 2 * residual[batch] * (batch == i)
                force = rows[batch].T @ pull / len(batch) + protocol.weight_decay * change
                velocity = protocol.momentum * velocity + force
                change = change - protocol.lr * velocity
                at = outputs(trajectory.parameters[t + 1], case.test.inputs) - case.test.targets[:, 0]
                expected[t, :, column] = (at + tests @ change).square() - at.square()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize(
    ("loss", "outputs"), [(cross_entropy, 2), (cross_entropy, 3), (binary_cross_entropy, 2), (huber, 2)]
)
def test_on_a_linear_classifier_the_response_is_the_real_change(
    loss: Any, outputs: int, rule: str, options: str
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        inputs = torch.randn(26, 3)
        targets = torch.randint(outputs, (26,)) if loss is cross_entropy else (inputs[:, :2] > 0).double()
        targets = 3 * inputs[:, :2].sin() if loss is huber else targets  # errors on both sides of delta
        network = nn.Sequential(nn.Linear(3, outputs))
        case = trained("linear", network, loss, inputs, targets, 22, steps=5)
    finally:
        torch.set_default_dtype(before)
    check_exact(case, 3, {"epochs": 4, "leave_out": rule, **OPTIONS[options]}, 3, lr=1.0)


@pytest.mark.parametrize("rule", ["shift", "mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("name", CASES)
def test_for_small_steps_the_response_is_nearly_the_real_change(name: str, rule: Any) -> None:
    case = CASES[name]()
    protocol = Protocol(lr=0.002, batch_size=5, epochs=2, leave_out=rule, dtype="float64")
    found = scores(case, protocol, [0, 3, 8, 12], kernels="own")
    expected = real_changes(case, protocol, [0, 3, 8, 12], [0, 1])
    assert agreement(found, expected, "cosine").min() > 0.995
    assert (found * expected).sum() / (expected * expected).sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_with_adam_the_response_is_close_once_its_second_moment_has_settled(name: str) -> None:
    case = CASES[name]()
    protocol = Protocol(
        optimizer="adam",
        lr=1e-3,
        betas=(0.9, 0.95),
        batch_size=5,
        epochs=6,
        leave_out="mask",
        dtype="float64",
    )
    found = scores(case, protocol, list(range(0, 23, 3)), kernels="own")
    expected = real_changes(case, protocol, list(range(0, 23, 3)), [0, 1])
    assert agreement(found, expected, "pearson")[-1].mean() > 0.8


@pytest.mark.parametrize("time", [1e-9, 0.3, 40.0])
@pytest.mark.parametrize("name", LINEAR_CASES)
def test_at_the_final_model_the_response_is_a_dense_matrix_exponential_s(name: str, time: float) -> None:
    case = CASES[name]()
    protocol = Protocol(lr=time / 10, steps=10, batch_size=23, evaluate_every=10, dtype="float64")
    found = scores(case, protocol, range(23), along="final", propagate="loss")
    curvature = dense.gauss_newton(case.final_model, case.train)
    # (1 - exp(-G t)) G^-1 as a block of one matrix exponential, which needs no inverse (Van Loan, 1978)
    p = len(curvature)
    block = torch.zeros(2 * p, 2 * p, dtype=torch.float64)
    block[:p, :p], block[:p, p:] = -curvature * time, torch.eye(p, dtype=torch.float64) * time
    phi = torch.linalg.matrix_exp(block)[:p, p:]
    left = dense.instance_gradients(case.final_model, case.test)
    right = dense.instance_gradients(case.final_model, case.train)
    torch.testing.assert_close(found[0], left @ phi @ right.T / 23, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_little_further_training_ranks_as_grad_dot_and_much_as_the_influence_function(name: str) -> None:
    case = CASES[name]()
    run = (case.final_model, case.train, case.test)
    little = Protocol(lr=1e-8, steps=1, batch_size=23, dtype="float64")
    found = scores(case, little, range(23), along="final", propagate="loss")
    torch.testing.assert_close(found[0] * 23 / 1e-8, GradDot().attribute(*run).values, rtol=1e-5, atol=1e-9)
    # the damped inverse and weight decay's flow have the same limit: (G + decay)^-1
    much = Protocol(lr=1e7, steps=1, batch_size=23, weight_decay=0.01, dtype="float64")
    found = scores(case, much, range(23), along="final", propagate="loss")
    torch.testing.assert_close(
        found[0], ExactInfluence(damping=0.01).attribute(*run).values, rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("along", ["path", "end", "final"])
def test_removing_a_duplicate_of_a_test_instance_gives_a_positive_score(along: Any) -> None:
    case = CASES["mlp_regression"]()
    test = case.train[:5]
    same = Case("same", case.final_model, case.train, test)
    protocol = Protocol(lr=0.02, batch_size=5, epochs=2, leave_out="mask", dtype="float64")
    found = scores(same, protocol, range(5), along=along)
    assert (found.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("along", ["path", "end", "final"])
@pytest.mark.parametrize("name", CASES)
def test_for_a_small_change_the_loss_is_linear_in_the_outputs(name: str, along: Any) -> None:
    case = CASES[name]()
    protocol = Protocol(lr=1e-4, batch_size=5, epochs=1, dtype="float64", leave_out="mask")
    both = [scores(case, protocol, [1, 4], along=along, propagate=p) for p in ("outputs", "loss")]
    torch.testing.assert_close(both[0], both[1], rtol=2e-2, atol=1e-9)


def test_the_scores_of_seeds_are_averaged_and_bars_that_can_t_be_known_withheld() -> None:
    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.02, batch_size=5, epochs=2, dtype="float64")
    each = []
    for seed in (0, 1, 2):
        method = Response(kernels="own", removal="own")
        each.append(
            method.attribute(
                case.final_model,
                case.train,
                case.test,
                torch.tensor([2, 3]),
                following(case, protocol, [seed]),
            )
        )
        assert each[-1].sem is None
        assert "single followed seed" in each[-1].withheld
    together = method.attribute(
        case.final_model, case.train, case.test, torch.tensor([2, 3]), following(case, protocol, [0, 1, 2])
    )
    torch.testing.assert_close(together.values, torch.stack([one.values for one in each]).mean(0))
    assert together.sem is None
    assert "fewer than 4 instances" in together.withheld


def test_directions_are_orthonormal_and_keep_the_instances_that_are_left_out() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(3, 20, 4, dtype=torch.float64), torch.randint(4, (20,))
    needed = torch.tensor([2, 19])
    for most in (60, 40, 20, 7):
        space = OutputSpace.choose(cross_entropy, outputs, targets, needed, most)
        m, r, _ = space.directions.shape
        assert m * r <= most
        assert set(needed.tolist()) <= set(space.kept.tolist())
        eye = torch.eye(r, dtype=torch.float64).expand(m, r, r)
        torch.testing.assert_close(space.directions @ space.directions.transpose(1, 2), eye)
    # D - 1 directions hold all of cross-entropy's gradient and curvature
    space = OutputSpace.choose(cross_entropy, outputs, targets, needed, 60)
    assert space.sample is None
    p = outputs[0].softmax(-1)
    norms = (p - nn.functional.one_hot(targets, 4)).norm(dim=1)
    torch.testing.assert_close(space.gradient(cross_entropy, outputs[0], targets).norm(dim=1), norms)
    trace = (p - p.square()).sum(1)
    hessian = space.hessian(cross_entropy, outputs[0], targets)
    torch.testing.assert_close(hessian.diagonal(dim1=1, dim2=2).sum(1), trace)


def test_segments_cover_the_evaluation_points_and_grow() -> None:
    steps = list(range(10, 5001, 10))
    cut = segments(steps, 6)
    assert cut[0].first == 0
    assert cut[-1].last == 500
    assert all(a.last == b.first for a, b in itertools.pairwise(cut))
    lengths = [s.last - s.first for s in cut]
    assert len(cut) <= 6
    assert lengths == sorted(lengths)
    assert segments([7], 6) == [Segment(0, 1)]
    assert spread([1, 2, 3], 6) == [1, 2, 3]


def test_relaxation_is_a_gradient_step_for_little_time_and_an_inverse_for_much() -> None:
    curvature = torch.tensor([0.0, 1e-12, 0.1, 10.0], dtype=torch.float64)
    torch.testing.assert_close(relaxation(1e-9)(curvature), torch.full((4,), 1e-9, dtype=torch.float64))
    torch.testing.assert_close(relaxation(1e9, 0.5)(curvature), 1 / (curvature + 0.5))
    assert times(Protocol(lr=0.1, steps=4, momentum=0.5), [2, 4]) == pytest.approx([0.4, 0.8])


def test_relaxation_has_no_step_where_its_series_takes_over() -> None:
    """Of (1 - exp(-x)) / x, below 1e-8 its series 1 - x / 2; at 1e-8 too."""
    x = torch.tensor([0.5e-8, 1e-8, 2e-8], dtype=torch.float64)
    torch.testing.assert_close(relaxation(1.0)(x), 1 - x / 2, rtol=1e-15, atol=0)


def rule_of(instances: int, protocol: Protocol) -> LeaveOut:
    return make_rule(protocol, Instances(torch.zeros(instances, 1), torch.zeros(instances, 1)))


def test_directions_and_batches_lie_where_the_outputs_do() -> None:
    """On a device without storage, so that what stays on the CPU would not fit."""
    like = torch.empty(0, dtype=torch.float64, device="meta")
    targets = torch.zeros(20, dtype=torch.int64, device="meta")
    # all directions, the one of two classes, leading ones
    for loss, d in ((mean_squared_error, 1), (cross_entropy, 2), (cross_entropy, 4)):
        for most in (60, 40):
            outputs = torch.empty(3, 20, d, dtype=torch.float64, device="meta")
            space = OutputSpace.choose(loss, outputs, targets, torch.tensor([2]), most)
            assert space.kept.is_meta
            assert space.directions.is_meta
    protocol = Protocol(batch_size=6, epochs=1)
    whole = steps([3], torch.tensor([2]), rule_of(20, protocol), protocol, like.dtype)
    for step in _followed(whole, space, 20):
        assert all(tensor.is_meta for tensor in (step.index, step.full, step.without))


@pytest.mark.parametrize(
    "wrong", [{"along": "start"}, {"propagate": "x"}, {"kernels": "x"}, {"segments": 0}, {"max_rows": 0}]
)
def test_a_wrong_argument_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Response(**wrong)


def test_what_the_response_ignores_is_said_at_run_time(caplog: pytest.LogCaptureFixture) -> None:
    case = linear_regression()
    protocol = Protocol(
        optimizer="adam", weight_decay=0.1, clip_norm=1.0, batch_size=4, epochs=1, dtype="float64"
    )
    scores(case, protocol, [0, 5])
    assert "Adam's L2 term" in caplog.text
    assert "clipping" in caplog.text
    assert "dropout" not in caplog.text


@pytest.mark.parametrize("propagate", ["outputs", "loss"])
def test_where_ekfac_is_exact_its_response_is_the_kernel_s(propagate: Any) -> None:
    case = linear_regression(outputs=1)  # one linear layer and a constant Hessian: G = E[a a^T]
    protocol = Protocol(lr=0.05, batch_size=4, epochs=5, weight_decay=0.1, dtype="float64")
    found, expected = (
        scores(case, protocol, range(22), along="final", propagate=propagate, form=form)
        for form in ("ekfac", "kernel")
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_ekfac_along_the_run_agrees_with_the_kernel_at_its_end(optimizer: Any) -> None:
    case = linear_regression(outputs=1)
    protocol = Protocol(optimizer=optimizer, lr=0.01, batch_size=4, epochs=5, dtype="float64")
    found = scores(case, protocol, range(22), form="ekfac")
    expected = scores(case, protocol, range(22), along="end")
    assert found.shape == expected.shape
    assert agreement(found, expected, "cosine").min() > (0.99 if optimizer == "sgd" else 0.8)


def test_too_many_outputs_take_ekfac_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fimo.methods.response.MAX_OUTPUTS", 1)
    case = CASES["mlp_classification"]()
    protocol = Protocol(lr=0.05, batch_size=5, epochs=2, dtype="float64")
    with caplog.at_level("INFO"):
        found = scores(case, protocol, [0, 1, 2])
    assert torch.isfinite(found).all()
    assert "EK-FAC" in caplog.text


def test_only_where_the_kernel_is_asked_for_too_many_outputs_make_the_response_inapplicable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fimo.methods.response.MAX_OUTPUTS", 2)
    case = CASES["mlp_classification"]()
    outputs = case.final_model.outputs(case.test)[0].numel()
    assert outputs > 2
    reasons = {form: Response(form=form).inapplicable(case.final_model, case.train)  # type: ignore[arg-type]
               for form in ("auto", "kernel", "ekfac")}  # fmt: skip
    assert reasons["auto"] is None
    assert reasons["ekfac"] is None
    assert f"at most 2 outputs of an instance, not {outputs}" in str(reasons["kernel"])


def test_of_a_batch_the_instances_that_are_not_followed_weigh_nothing() -> None:
    kept, one = torch.tensor([1, 4, 8]), torch.ones(3, 1, 1, dtype=torch.float64)

    def batches() -> Iterator[Step]:
        protocol = Protocol(batch_size=4, epochs=2)
        return steps([3, 5], torch.tensor([4]), rule_of(9, protocol), protocol, torch.float64)

    for step, whole in zip(_followed(batches(), OutputSpace(kept, one), 9), batches(), strict=True):
        for seed in range(2):
            found, expected = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(9, 2, dtype=torch.float64)
            weights, weights_of_all = (
                torch.cat([s.full.expand(s.index.shape)[seed][:, None], s.without[seed]], 1)
                for s in (step, whole)
            )
            found.index_add_(0, step.index[seed], weights)
            expected.index_add_(0, whole.index[seed], weights_of_all)
            torch.testing.assert_close(found, expected[kept])


@pytest.mark.parametrize(
    ("n", "size", "first", "every"),
    [(29304, 128, 46, 5), (29304, 128, 229, 28), (2000, 32, 63, 7), (9, 4, 1, 1)],
)
def test_even_removal_takes_each_instance_several_times_before_scores_are_wanted(
    n: int, size: int, first: int, every: int
) -> None:
    assert turns(n, size, first) == every
    assert every == 1 or first // every >= 8


def test_where_kernels_cost_more_than_the_runs_seeds_share_one() -> None:
    case = CASES["mlp_regression"]()
    protocol = Protocol(lr=0.1, batch_size=4, epochs=3, dtype="float64")
    found = scores(case, protocol, [0, 5], segments=4)
    shared, each, apart = (
        scores(case, protocol, [0, 5], kernels=kernels, segments=segments)
        for kernels, segments in (("shared", 1), ("shared", 4), ("own", 1))
    )
    torch.testing.assert_close(found, shared)
    for other in (each, apart):
        assert not torch.allclose(found, other, rtol=1e-4, atol=0)


def test_with_fewer_instances_followed_than_there_are_small_steps_are_answered_as_before() -> None:
    """To first order in the learning rate, only the left-out instances' own forces count."""
    case = CASES["mlp_regression"]()
    left_out = [5, 17, 22]
    protocol = Protocol(lr=1e-6, batch_size=5, epochs=2, dtype="float64", leave_out="mask")
    found = scores(case, protocol, left_out, max_rows=6)
    torch.testing.assert_close(found, real_changes(case, protocol, left_out, [0, 1]), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_in_float32_the_response_is_float64_s_rounded(options: str) -> None:
    case = linear_regression(14)
    found, expected = (
        scores(
            case, Protocol(lr=0.05, batch_size=4, epochs=4, dtype=dtype, **OPTIONS[options]), [0, 3, 7],
            segments=3,
        )
        for dtype in ("float32", "float64")
    )  # fmt: skip
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_adam_s_response_at_the_final_model_has_the_diagonal_that_its_batches_squares_have() -> None:
    case = CASES["mlp_regression"]()
    size, time = 5, 0.02
    protocol = Protocol(
        optimizer="adam",
        lr=time / 10,
        steps=10,
        batch_size=size,
        evaluate_every=10,
        eps=1e-3,
        dtype="float64",
    )
    found = scores(case, protocol, range(23), along="final", propagate="loss")
    right = dense.instance_gradients(case.final_model, case.train)
    left = dense.instance_gradients(case.final_model, case.test)
    squares = right.mean(0).square() + right.var(0, correction=0) / size  # of a mean of independent draws
    diagonal = 1 / (squares.sqrt() + protocol.eps)
    matrix = diagonal[:, None] * dense.gauss_newton(case.final_model, case.train)
    p = len(matrix)
    block = torch.zeros(2 * p, 2 * p, dtype=torch.float64)
    block[:p, :p], block[:p, p:] = -matrix * time, torch.eye(p, dtype=torch.float64) * time
    phi = torch.linalg.matrix_exp(block)[:p, p:]
    torch.testing.assert_close(found[0], left @ phi @ (diagonal * right).T / 23, rtol=1e-6, atol=1e-12)


def test_adam_s_pace_along_ekfac_is_the_mean_of_the_seeds_diagonals() -> None:
    """Where eps drowns the second moment, Adam's diagonal is 1 / eps for every seed."""
    case = linear_regression(outputs=1)
    eps = 1e4
    protocol = Protocol(
        optimizer="adam", lr=1e-3 * eps, eps=eps, batch_size=4, epochs=2, dtype="float64", leave_out="mask"
    )
    found = scores(case, protocol, range(22), form="ekfac", propagate="loss")
    expected = scores(case, protocol, range(22), along="end", propagate="loss")
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
