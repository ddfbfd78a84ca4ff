"""Inverses by Krylov spaces against dense solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows, FactoredRows, LayerFactors, Rows
from fimo.curvature.krylov_inverses import KernelInverse, KrylovInverse, ParameterInverse, kernel_pays
from fimo.curvature.operators import RowsOperator
from tests.cases import CASES, LINEAR_CASES

DAMPINGS = [0.3, 0.01, 1e-4]


def inverses_of(rows: Rows, left: Rows, right: Rows) -> list[KrylovInverse]:
    return [
        ParameterInverse(RowsOperator(rows), left, right), KernelInverse(rows, rows.kernel(), left, right),
    ]  # fmt: skip


def rows_of(name: str) -> tuple[Rows, Rows, Rows, Tensor]:
    """Return Gauss-Newton rows, test and training gradients, and the dense matrix."""
    case = CASES[name]()
    gradients = InstanceGradients(case.final_model)
    rows = gradients.gauss_newton(case.train)
    dense = rows.dense().flatten(0, 1)
    return rows, gradients.measurements(case.test), gradients.losses(case.train[:7]), dense.T @ dense / rows.n


@pytest.mark.parametrize("name", LINEAR_CASES)
@pytest.mark.parametrize("decomposed", [0, 10_000])
@pytest.mark.parametrize("on_the_right", [1, 7])
def test_one_space_gives_the_dense_inverse_of_every_damping(
    name: str, decomposed: int, on_the_right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.curvature.krylov_inverses.DECOMPOSED", decomposed)
    rows, left, right, matrix = rows_of(name)
    right, eye = right.part(0, on_the_right), torch.eye(rows.p).to(matrix)
    g, other = left.dense()[:, 0], right.dense()[:, 0]
    expected = torch.stack([g @ torch.linalg.solve(matrix + d * eye, other.T) for d in DAMPINGS])
    for inverse in inverses_of(rows, left, right):
        inverse.grow(DAMPINGS, 1e-10, 1000, 10_000)
        torch.testing.assert_close(inverse.products(DAMPINGS)[..., 0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_residuals_are_those_in_parameter_space_or_bound_them(name: str) -> None:
    rows, left, _, matrix = rows_of(name)
    g, eye = left.dense()[:, 0], torch.eye(rows.p).to(matrix)
    # inner products with unit vectors are a solution's entries
    for inverse in inverses_of(rows, left, DenseRows(eye[:, None], rows.shapes)):
        for _ in range(3):
            for damping in DAMPINGS:
                x = inverse.products([damping])[0, :, :, 0]
                actual = (g - x @ (matrix + damping * eye)).norm(dim=1) / g.norm(dim=1)
                said = inverse.residuals(damping)
                assert (actual <= said + 1e-10).all()
                if isinstance(inverse, ParameterInverse):
                    torch.testing.assert_close(said, actual)
            inverse.krylov.grow()


def test_right_hand_sides_of_zero_are_solved_by_zero() -> None:
    rows, left, right, _ = rows_of("mlp_regression")
    nothing = DenseRows(torch.zeros_like(left.dense()), rows.shapes)
    for inverse in inverses_of(rows, nothing, right):
        assert inverse.grow(DAMPINGS, 1e-10, 1000, 10_000) == 1
        assert not inverse.products(DAMPINGS).any()
        assert not inverse.residuals(0.1).any()


def test_a_kernel_pays_for_rows_few_beside_parameters_and_within_memory() -> None:
    def rows(n: int) -> Rows:
        layer = LayerFactors("weight", None, torch.randn(n, 30), torch.randn(n, 1, 20))
        return FactoredRows((layer,), {"weight": torch.Size([20, 30])})

    assert kernel_pays(rows(500), 50, 2**30)
    assert not kernel_pays(rows(2000), 50, 2**30)
    assert not kernel_pays(DenseRows(rows(500).dense(), rows(500).shapes), 50, 2**30)
    assert not kernel_pays(rows(500), 50, 2 * 4 * 500**2 - 1)
