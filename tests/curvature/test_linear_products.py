"""The written-out Hessian of linear layers against the dense one, and against autograd's products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.curvature.hessian import hessian
from fimo.curvature.linear_products import LinearHessian
from fimo.curvature.operators import Hessian
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss, OwnLoss
from fimo.models.losses import binary_cross_entropy, cross_entropy, huber, mean_squared_error
from tests.cases import CASES, LINEAR_CASES
from tests.reference import attribution as dense

LOSSES = [mean_squared_error, cross_entropy, binary_cross_entropy, huber, OwnLoss(huber)]
ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh")]


def setting(activation: nn.Module, loss: Loss, bias: bool = True) -> tuple[FinalModel, Instances]:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5, bias=bias), activation, nn.Linear(5, 4), activation, nn.Linear(4, 3)
    ).double()
    x = torch.randn(11, 2, 3).double()
    y = torch.randn(11, 3).double()
    targets = {cross_entropy: y.argmax(1), binary_cross_entropy: (y > 0).double()}.get(loss, y)
    return FinalModel(network, loss), Instances(x, targets)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_products_are_those_of_the_dense_hessian(activation: nn.Module, loss: Loss) -> None:
    model, train = setting(activation, loss)
    operator = hessian(model, train)
    assert isinstance(operator, LinearHessian)
    truth = dense.hessian(model, train)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_pieces_and_batches_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    truth = dense.hessian(case.final_model, case.train)
    index = torch.tensor([3, 0, 11, 12, 7])
    of_some = dense.hessian(case.final_model, case.train[index])
    eye = torch.eye(len(truth), dtype=torch.float64)
    for piece in (1, 50, 1000):
        monkeypatch.setattr("fimo.curvature.linear_products.PIECE", piece)
        operator = LinearHessian(case.final_model, case.train)
        torch.testing.assert_close(operator.times(eye[:, ::9]), truth[:, ::9], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            operator.of_batch(index)(eye[:, ::9]), of_some[:, ::9], rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("trainable", [("5.*",), ("1.weight", "3.bias"), ("*.bias",)])
def test_frozen_parameters_have_no_rows_and_columns(trainable: tuple[str, ...]) -> None:
    model, train = setting(nn.Tanh(), cross_entropy, bias=False)
    model = FinalModel(model.network, model.loss, trainable=trainable)
    found = hessian(model, train).dense()
    torch.testing.assert_close(found, dense.hessian(model, train), rtol=1e-9, atol=1e-12)


def test_other_networks_go_through_autograd() -> None:
    case = CASES["conv_net"]()
    assert isinstance(hessian(case.final_model, case.train), Hessian)
    with pytest.raises(ValueError, match="linear layers"):
        LinearHessian(case.final_model, case.train)


def test_products_are_counted() -> None:
    case, counted = CASES["mlp_regression"](), []
    operator = LinearHessian(case.final_model, case.train, counted.append)
    operator.times(torch.zeros(operator.p, 3, dtype=torch.float64))
    operator.of_batch(torch.arange(4))(torch.zeros(operator.p, 2, dtype=torch.float64))
    assert counted == [23 * 3, 4 * 2]
