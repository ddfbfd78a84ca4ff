"""Every operator against the dense matrix in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.operators import GaussNewton, Hessian, Operator, RowsOperator
from fimo.data.instances import Instances
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from tests.cases import CASES, Case
from tests.reference import attribution as dense

Make = tuple[Callable[[Case], Operator], Callable[[FinalModel, Instances], Tensor]]


def rows_operator(case: Case) -> Operator:
    return RowsOperator(InstanceGradients(case.final_model).gauss_newton(case.train))


def fisher_operator(case: Case) -> Operator:
    return RowsOperator(InstanceGradients(case.final_model).losses(case.train))


OPERATORS: dict[str, Make] = {
    "rows": (rows_operator, dense.gauss_newton),
    "empirical": (fisher_operator, dense.empirical_fisher),
    "gauss_newton": (lambda c: GaussNewton(c.final_model, c.train, 5, 7), dense.gauss_newton),
    "hessian": (lambda c: Hessian(c.final_model, c.train, 5, 7), dense.hessian),
}


@pytest.mark.parametrize("operator_name", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrix(name: str, operator_name: str) -> None:
    case = CASES[name]()
    make, reference = OPERATORS[operator_name]
    operator = make(case)
    truth = reference(case.final_model, case.train)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-7, atol=1e-10)
    if isinstance(operator, RowsOperator):
        torch.testing.assert_close(operator.trace(), truth.trace().item())


def test_a_trace_estimate_is_near_the_trace() -> None:
    case = CASES["conv_net"]()
    truth = dense.gauss_newton(case.final_model, case.train).trace().item()
    assert abs(GaussNewton(case.final_model, case.train).trace() / truth - 1) < 0.3


def test_for_a_linear_softmax_model_gauss_newton_is_the_hessian() -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(nn.Linear(4, 3).double(), cross_entropy)
    gauss_newton, hessian = GaussNewton(model, case.train), Hessian(model, case.train)
    torch.testing.assert_close(gauss_newton.dense(), hessian.dense())


def test_a_module_used_twice_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    model = FinalModel(Twice().double(), cross_entropy)
    data = Instances(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0]))
    gradients = InstanceGradients(model).losses(data).dense()[:, 0]
    flat, h = dense.flat_parameters(model), 1e-6
    for k in range(len(flat)):
        step = torch.zeros_like(flat)
        step[k] = h
        up = model.loss(dense.outputs_of(model, flat + step, data), data.targets)
        down = model.loss(dense.outputs_of(model, flat - step, data), data.targets)
        torch.testing.assert_close(gradients[:, k], (up - down) / (2 * h), rtol=1e-5, atol=1e-8)
