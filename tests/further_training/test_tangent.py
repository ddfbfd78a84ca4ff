"""The linearised companion against differences of runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training import Protocol, tangent_outputs
from fimo.further_training.adjoint import adjoint
from fimo.further_training.stacked_adjoint import adjoints
from fimo.further_training.unrolled_step import FullRun
from fimo.models.final_model import FinalModel
from fimo.models.losses import Huber, Loss, binary_cross_entropy, cross_entropy, mean_squared_error
from tests.cases import CASES, Case, mlp
from tests.further_training.test_gold_standard import OPTIMIZERS
from tests.reference.further_training import plain_run

UNITS: list[int | list[int]] = [0, 7, 11, [4, 9]]


def differences(case: Case, protocol: Protocol, seed: int, weight_change: float) -> Tensor:
    """Central differences ``[E, J, L]`` of mask runs' losses in the units' weights."""
    found = []
    for unit in UNITS:
        members = [unit] if isinstance(unit, int) else unit
        up, down = (
            plain_run(
                case.final_model,
                case.train,
                case.test,
                protocol,
                seed,
                members,
                weight=1 + sign * weight_change,
            )[0]
            for sign in (1, -1)
        )
        found.append((up - down) / (2 * weight_change))
    return torch.stack(found, -1)


DIFFERENTIABLE = [name for name in OPTIMIZERS if name != "lion"]
"""Lion's steps have no derivative; see tests/further_training/test_optimizers.py."""


def protocol_of(optimizer: str, **more) -> Protocol:
    settings = {
        "batch_size": 5,
        "epochs": 3,
        "leave_out": "mask",
        "dtype": "float64",
        **OPTIMIZERS[optimizer],
    }
    return Protocol(**{**settings, **more})


@pytest.mark.parametrize("optimizer", DIFFERENTIABLE)
def test_tangents_equal_small_differences(optimizer: str) -> None:
    case, protocol = CASES["mlp_regression"](), protocol_of(optimizer, eps=1e-4)
    found = tangent_outputs(case.final_model, case.train, case.test, protocol, 1, UNITS, chunk=3)
    assert found.derivative.shape == (3, 5, 4, 1)
    expected = differences(case, protocol, 1, 1e-4)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.loss_derivative, expected, rtol=0, atol=1e-5 * scale)
    network = plain_run(case.final_model, case.train, case.test, protocol, 1)[2].eval()
    torch.testing.assert_close(found.outputs[-1], network(case.test.inputs))


@pytest.mark.parametrize("name", CASES)
def test_the_error_of_central_differences_falls_with_the_square_of_the_weight_change(name: str) -> None:
    # tanh, GELU: smooth; a ReLU's kinks would hide the order
    case = CASES[name]()
    if name == "mlp_classification":
        pytest.skip("ReLU")
    protocol = protocol_of("momentum", epochs=2)
    found = tangent_outputs(case.final_model, case.train, case.test, protocol, 0, UNITS).loss_derivative
    errors = [(differences(case, protocol, 0, h) - found).abs().max().item() for h in (0.2, 0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_dropout_masks_are_those_of_the_run() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    data = CASES["mlp_classification"]()
    case = Case("dropout", FinalModel(network, cross_entropy), data.train, data.test)
    protocol = protocol_of("sgd")
    found = tangent_outputs(case.final_model, case.train, case.test, protocol, 2, UNITS)
    expected = differences(case, protocol, 2, 1e-4)
    torch.testing.assert_close(
        found.loss_derivative, expected, rtol=0, atol=1e-6 * expected.abs().max().item()
    )


def test_every_batch_tangents_equal_small_differences() -> None:
    case = CASES["mlp_regression"]()
    protocol = protocol_of("momentum", leave_out="every_batch")
    found = tangent_outputs(case.final_model, case.train, case.test, protocol, 0, [3, [4, 9]]).loss_derivative
    for column, unit in enumerate([[3], [4, 9]]):
        up, down = (
            plain_run(case.final_model, case.train, case.test, protocol, 0, unit, weight=1 + h)[0]
            for h in (1e-4, -1e-4)
        )
        expected = (up - down) / 2e-4
        torch.testing.assert_close(
            found[..., column], expected, rtol=0, atol=1e-6 * expected.abs().max().item()
        )


@pytest.mark.parametrize("rule", ["mask", "every_batch", "reweighted"])
@pytest.mark.parametrize("optimizer", DIFFERENTIABLE)
def test_reverse_mode_equals_forward_mode(optimizer: str, rule: str) -> None:
    case, protocol = CASES["mlp_regression"](), protocol_of(optimizer, leave_out=rule)
    data = (case.final_model, case.train, case.test, protocol, 1)
    forward = tangent_outputs(*data, range(len(case.train)))
    backward = adjoint(*data, chunk=7)
    assert backward.shape == (3, 5, 23)
    scale = forward.loss_derivative.abs().max().item()
    torch.testing.assert_close(backward, forward.loss_derivative, rtol=0, atol=1e-10 * scale)
    outputs = adjoint(*data, of="outputs", points=[2, 0])
    expected = forward.derivative.transpose(2, 3)[[2, 0]]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("rule", ["mask", "shift", "every_batch", "reweighted"])
def test_the_adjoint_of_a_weighted_sum_of_test_losses_is_the_sum_of_their_adjoints(rule: str) -> None:
    case, protocol = CASES["mlp_regression"](), protocol_of("momentum", leave_out=rule)
    data = (case.final_model, case.train, case.test, protocol, 1)
    weight = torch.tensor([[0.2] * 5, [0.0, 0.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
    each = adjoint(*data)
    found = adjoint(*data, weight=weight)
    torch.testing.assert_close(found, torch.einsum("mj,ejn->emn", weight, each), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(adjoint(*data, weight=weight, chunk=1), found, rtol=1e-10, atol=1e-14)
    end = replace(protocol, evaluate_every="end")
    torch.testing.assert_close(adjoint(*data[:3], end, 1, weight=weight), found[-1:], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("rule", ["mask", "every_batch", "reweighted", "with_duplicates"])
@pytest.mark.parametrize("optimizer", DIFFERENTIABLE)
def test_seeds_followed_together_have_the_adjoints_of_each(
    optimizer: str, rule: str, clip_norm: float | None
) -> None:
    case = CASES["mlp_regression"]()
    protocol = protocol_of(optimizer, leave_out=rule, clip_norm=clip_norm)
    data = (case.final_model, case.train, case.test, protocol)
    weight = torch.tensor([[0.2] * 5, [0.0, 0.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
    each = torch.stack([adjoint(*data, seed, weight=weight)[-1] for seed in (3, 1, 2)])
    found = adjoints(*data, [3, 1, 2], weight)
    torch.testing.assert_close(found, each, rtol=0, atol=1e-13 * each.abs().max().item())
    torch.testing.assert_close(adjoints(*data, [1], weight)[0], each[1], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", ["mlp_classification", "conv_net"])
def test_seeds_of_other_networks_have_the_adjoints_of_each(name: str) -> None:
    case, protocol = CASES[name](), protocol_of("sgd_decayed")
    data = (case.final_model, case.train, case.test, protocol)
    weight = torch.rand(2, len(case.test), dtype=torch.float64)
    each = torch.stack([adjoint(*data, seed, weight=weight)[-1] for seed in (0, 5)])
    torch.testing.assert_close(adjoints(*data, [0, 5], weight), each, rtol=1e-9, atol=1e-12)


def test_threads_that_follow_seeds_keep_each_other_s_tangents() -> None:
    case, protocol = CASES["conv_net"](), protocol_of("sgd_decayed")
    data = (case.final_model, case.train, case.test, protocol)
    weight, seeds = torch.rand(2, len(case.test), dtype=torch.float64), list(range(8))
    each = torch.stack([adjoint(*data, seed, weight=weight)[-1] for seed in seeds])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = adjoints(*data, seeds, weight)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, each, rtol=1e-9, atol=1e-12)


def test_weights_of_other_test_instances_than_there_are_are_refused() -> None:
    case = CASES["mlp_regression"]()
    with pytest.raises(InputError, match=r"weight: expected weights \[M, 5\] of test losses"):
        adjoint(case.final_model, case.train, case.test, protocol_of("sgd"), 0, weight=torch.ones(1, 4))


@pytest.mark.parametrize("name", ["mlp_classification", "conv_net", "transformer"])
def test_reverse_mode_equals_forward_mode_for_any_network(name: str) -> None:
    case, protocol = CASES[name](), protocol_of("adam", epochs=2)
    data = (case.final_model, case.train, case.test, protocol, 0)
    forward = tangent_outputs(*data, range(len(case.train)))
    torch.testing.assert_close(adjoint(*data), forward.loss_derivative, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU])
@pytest.mark.parametrize("loss", [mean_squared_error, cross_entropy, binary_cross_entropy, Huber(0.3)])
def test_products_written_out_equal_automatic_ones(activation: type[nn.Module], loss: Loss) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), mlp(4, (6, 5), 3, activation), activation()).double()
    inputs = torch.randn(9, 2, 2, dtype=torch.float64)
    targets = torch.randint(3, (9,)) if loss is cross_entropy else torch.rand(9, 3, dtype=torch.float64)
    run = FullRun(FinalModel(network, loss), Instances(inputs, targets), protocol_of("sgd"), 0)
    parameters, batch = run.start()["parameters"], next(run.batches())
    directions = {n: torch.randn(4, *p.shape, dtype=torch.float64) for n, p in parameters.items()}
    weights = torch.randn(4, 5, dtype=torch.float64)
    assert run.layers is not None
    written_out = run.gradient_and_tangents(parameters, directions, batch, weights)
    run.layers = None
    automatic = run.gradient_and_tangents(parameters, directions, batch, weights)
    torch.testing.assert_close(written_out, automatic)


def test_a_test_instances_adjoint_takes_fewer_operations_than_four_runs() -> None:
    torch.manual_seed(0)
    data = Instances(torch.randn(96, 8), torch.randn(96, 1))
    train, test = data[:64], data[64:]
    model = FinalModel(mlp(8, (32, 32), 1, nn.ReLU), mean_squared_error)
    protocol = Protocol(batch_size=16, epochs=3, leave_out="mask", lr=0.01)
    with FlopCounterMode(display=False) as of_one_run:
        plain_run(model, train, test[:1], protocol, 0)
    with FlopCounterMode(display=False) as of_all:
        adjoint(model, train, test, protocol, 0, points=[2], chunk=32)
    assert 0 < of_all.get_total_flops() < 4 * len(test) * of_one_run.get_total_flops()
