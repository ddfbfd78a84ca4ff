"""The Hessian of shallow piecewise-linear networks, summed over instances once, against the dense one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fimo.curvature.hessian import hessian
from fimo.curvature.linear_products import LinearHessian
from fimo.curvature.piecewise import PiecewiseLinearHessian, is_shallow
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.losses import Loss, binary_cross_entropy, cross_entropy, huber, mean_squared_error
from tests.reference import attribution as dense

LOSSES = [mean_squared_error, cross_entropy, binary_cross_entropy, huber]


def setting(
    widths: tuple[int, ...], loss: Loss, bias: bool = True, activation: type[nn.Module] = nn.ReLU, n: int = 90
) -> tuple[FinalModel, Instances]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), activation()]
    x, y = torch.randn(n, widths[0]).double(), torch.randn(n, widths[-1]).double()
    targets = {cross_entropy: y.argmax(1), binary_cross_entropy: (y > 0).double()}.get(loss, y)
    return FinalModel(nn.Sequential(*layers[:-1]).double(), loss), Instances(x, targets)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("widths", [(3, 7, 2), (3, 7, 5, 2)])
def test_products_are_those_of_the_dense_hessian(widths: tuple[int, ...], loss: Loss, bias: bool) -> None:
    model, train = setting(widths, loss, bias)
    operator = hessian(model, train)
    assert isinstance(operator, PiecewiseLinearHessian)
    truth = dense.hessian(model, train)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-9, atol=1e-12)
    vectors = torch.randn(len(truth), 3, dtype=torch.float64)
    torch.testing.assert_close(operator.times(vectors), truth @ vectors, rtol=1e-9, atol=1e-12)


def test_layers_without_an_activation_between_them_and_with_one_at_the_end() -> None:
    model, train = setting((3, 7, 5, 2), mean_squared_error)
    linear = [module for module in model.network if isinstance(module, nn.Linear)]
    model = FinalModel(nn.Sequential(linear[0], linear[1], nn.ReLU(), linear[2], nn.ReLU()), model.loss)
    operator = hessian(model, train)
    assert isinstance(operator, PiecewiseLinearHessian)
    torch.testing.assert_close(operator.dense(), dense.hessian(model, train), rtol=1e-9, atol=1e-12)


def test_a_batch_has_its_own_hessian() -> None:
    model, train = setting((3, 7, 5, 1), mean_squared_error)
    operator = hessian(model, train)
    assert isinstance(operator, PiecewiseLinearHessian)
    index = torch.tensor([5, 1, 2, 80])
    truth = dense.hessian(model, train[index])
    found = operator.of_batch(index)(torch.eye(len(truth), dtype=torch.float64))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def test_products_are_counted() -> None:
    model, train = setting((3, 7, 5, 1), mean_squared_error)
    counted: list[int] = []
    operator = hessian(model, train, counted.append)
    assert isinstance(operator, PiecewiseLinearHessian)
    operator.times(torch.zeros(operator.p, 4, dtype=torch.float64))
    assert counted == [90 * 4]


def own(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.huber_loss(outputs, targets, reduction="none").mean(1)


def test_other_networks_of_linear_layers_keep_the_general_products() -> None:
    """Smooth activations, deep or wide networks, few instances, frozen parameters, a loss of one's own."""
    model, train = setting((3, 7, 5, 1), mean_squared_error)
    assert is_shallow(model, train)
    others = [
        setting((3, 7, 5, 1), mean_squared_error, activation=nn.Tanh),
        setting((3, 7, 7, 5, 1), mean_squared_error),
        setting((40, 20, 20, 5), mean_squared_error),
        setting((3, 7, 5, 1), mean_squared_error, n=4),
        (FinalModel(model.network, model.loss, trainable=("2.*",)), train),
        (FinalModel(model.network, own), train),
    ]
    for other, instances in others:
        assert not is_shallow(other, instances)
        assert type(hessian(other, instances)) is LinearHessian
