"""LiSSA from a Krylov space against the recursion itself, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.krylov import BlockLanczos, KrylovSpace
from fimo.curvature.krylov_spaces import ParameterSpace
from fimo.curvature.operators import Operator, RowsOperator
from fimo.curvature.solvers import DivergenceError, lissa, lissa_in_krylov_space
from tests.cases import CASES, Case
from tests.reference import attribution as dense


class Dense(Operator):
    """A matrix as an operator."""

    def __init__(self, matrix: Tensor, case: Case) -> None:
        self.matrix, self.dtype, self.device = matrix, matrix.dtype, matrix.device
        self.shapes = InstanceGradients(case.final_model).shapes

    def times(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors


def operator_of(case: Case, curvature: str) -> tuple[Operator, Tensor]:
    """Return an operator and its eigenvalues."""
    if curvature == "hessian":
        matrix = dense.hessian(case.final_model, case.train)
        return Dense(matrix, case), torch.linalg.eigvalsh(matrix)
    matrix = dense.gauss_newton(case.final_model, case.train)
    rows = InstanceGradients(case.final_model).gauss_newton(case.train)
    return RowsOperator(rows), torch.linalg.eigvalsh(matrix)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("name", CASES)
def test_the_iterate_is_that_of_the_recursion_at_any_depth(name: str, curvature: str) -> None:
    case = CASES[name]()
    operator, values = operator_of(case, curvature)
    right = InstanceGradients(case.final_model).losses(case.test)
    damping = 0.2 + max(0.0, -values[0].item())
    for factor in (0.6, 1.1, 3.0):
        scale = factor * (values[-1].item() + damping)
        for depth in (1, 3, 20, 300):
            plain = lissa(ParameterSpace(operator, right), damping, scale, depth, tolerance=0.0)
            space = KrylovSpace(operator, right, max_vectors=10_000)
            found = lissa_in_krylov_space(space, damping, scale, depth, tolerance=1e-10)
            assert found is not None
            torch.testing.assert_close(found.vectors, plain.vectors, rtol=1e-7, atol=1e-9)


def test_its_tolerance_bounds_the_error_by_the_least_damped_eigenvalue() -> None:
    """The residual r of (C + damping) x = (1 - q^(d + 1)) g gives |error| <= |r| / (c_min + damping)."""
    case = CASES["transformer"]()
    operator, values = operator_of(case, "gauss_newton")
    right = InstanceGradients(case.final_model).losses(case.test)
    scale, lengths = 1.1 * values[-1].item() + 0.05, right.squared_norms()[:, 0].sqrt()
    plain = lissa(ParameterSpace(operator, right), 0.05, scale, 100, tolerance=0.0)
    sizes = []
    for tolerance in (1e-1, 1e-2, 1e-4):
        space = KrylovSpace(operator, right, max_vectors=10_000)
        found = lissa_in_krylov_space(space, 0.05, scale, 100, tolerance)
        assert found is not None
        assert ((found.vectors - plain.vectors).norm(dim=0) <= tolerance * lengths / 0.05).all()
        sizes.append(space.krylov.size)
    assert sizes[0] < sizes[-1]


def test_one_space_serves_all_dampings() -> None:
    case = CASES["conv_net"]()
    operator, values = operator_of(case, "gauss_newton")
    right = InstanceGradients(case.final_model).losses(case.test)
    shared = KrylovSpace(operator, right, max_vectors=10_000)
    for damping in (1.0, 0.01, 0.1):
        scale = 1.05 * values[-1].item() + damping
        found = lissa_in_krylov_space(shared, damping, scale, 50, 1e-10)
        plain = lissa(ParameterSpace(operator, right), damping, scale, 50, tolerance=0.0)
        assert found is not None
        torch.testing.assert_close(found.vectors, plain.vectors, rtol=1e-7, atol=1e-9)


def test_repeated_and_zero_right_hand_sides_and_an_exhausted_space_are_exact() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix @ matrix.T
    g = torch.randn(6, 2, dtype=torch.float64)
    right = torch.cat([g, g, 1e-9 * g[:, :1], torch.zeros_like(g[:, :1])], 1)
    krylov = BlockLanczos(lambda v: matrix @ v, right)
    widths = [krylov.width]
    while not krylov.exhausted:
        krylov.grow()
        widths.append(krylov.width)
    assert krylov.size == 6
    assert widths == [2, 2, 2]
    found = krylov.combine(krylov.coefficients(lambda c: 1 / (c + 0.1)))
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(6).double(), right)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-16)
    with pytest.raises(ValueError, match="exhausted"):
        krylov.grow()


def test_divergence_is_told_from_the_extreme_eigenvalues() -> None:
    case = CASES["mlp_classification"]()
    operator, values = operator_of(case, "hessian")
    right = InstanceGradients(case.final_model).losses(case.test)
    low, high = values[0].item(), values[-1].item()
    with pytest.raises(DivergenceError, match="more negative than the damping"):
        lissa_in_krylov_space(KrylovSpace(operator, right, 1000), -low / 2, high, 5000)
    with pytest.raises(DivergenceError, match="raise the scale"):
        lissa_in_krylov_space(KrylovSpace(operator, right, 1000), -2 * low, 0.4 * high, 5000)


def test_it_declines_where_memory_does_not_suffice() -> None:
    case = CASES["mlp_regression"]()
    operator, values = operator_of(case, "gauss_newton")
    right = InstanceGradients(case.final_model).losses(case.test)
    space = KrylovSpace(operator, right, max_vectors=5)
    assert lissa_in_krylov_space(space, 1e-3, 1.1 * values[-1].item(), 1000, 1e-10) is None


def test_a_basis_is_orthonormal_in_single_precision() -> None:
    torch.manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(300, 300))[0]
    matrix = (orthogonal * torch.logspace(-6, 2, 300)) @ orthogonal.T
    krylov = BlockLanczos(lambda v: matrix @ v, torch.randn(300, 7))
    for _ in range(20):
        if not krylov.exhausted:
            krylov.grow()
    basis = torch.cat(krylov.basis.parts(), 1)
    assert basis.shape == (300, 147)
    assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-5
    assert krylov.values[-1].item() == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("columns", [1, 2, 5, 17])
def test_blocks_of_any_width_span_the_krylov_space(columns: int) -> None:
    """Narrow blocks share matrices: the span is that of powers, the projection that of the whole basis."""
    torch.manual_seed(0)
    matrix = torch.randn(90, 90, dtype=torch.float64)
    matrix = (matrix + matrix.T) / 90**0.5
    right = torch.randn(90, columns, dtype=torch.float64)
    krylov = BlockLanczos(lambda v: matrix @ v, right)
    for _ in range(3):
        krylov.grow()
    basis = torch.cat(krylov.basis.parts(), 1)
    powers = torch.cat([torch.linalg.matrix_power(matrix, k) @ right for k in range(4)], 1)
    torch.testing.assert_close(basis @ (basis.T @ powers), powers)
    torch.testing.assert_close(basis.T @ matrix @ basis, krylov.projected)
    ritz = krylov.ritz_vectors()
    torch.testing.assert_close(ritz.T @ matrix @ ritz, torch.diag(krylov.values))


def test_what_lissa_s_iterate_leaves_is_said() -> None:
    """The residual is |(C + damping) x - g| / |g|, up to the tolerance."""
    case, damping, tolerance = CASES["mlp_classification"](), 0.05, 1e-8
    operator, values = operator_of(case, "gauss_newton")
    rows = InstanceGradients(case.final_model).losses(case.test)
    right, scale = rows.dense()[:, 0].T, 1.1 * (values[-1].item() + damping)
    for depth, converged in ((5, False), (60, False), (20_000, True)):
        found = lissa_in_krylov_space(KrylovSpace(operator, rows, 1000), damping, scale, depth, tolerance)
        assert found is not None
        left = operator.times(found.vectors) + damping * found.vectors - right
        share = (left.norm(dim=0) / right.norm(dim=0)).tolist()
        assert found.residuals.tolist() == pytest.approx(share, abs=2 * tolerance)
        assert found.converged == converged


def test_a_krylov_space_never_outgrows_its_memory() -> None:
    case = CASES["mlp_classification"]()
    operator, _ = operator_of(case, "gauss_newton")
    right = InstanceGradients(case.final_model).losses(case.test[:3])
    for vectors in (3, 5, 8, 9):
        space = KrylovSpace(operator, right, vectors)
        assert lissa_in_krylov_space(space, 1e-5, 100.0, 100_000, 1e-12) is None
        assert space.krylov.size == vectors // 3 * 3
