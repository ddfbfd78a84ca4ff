"""Solvers against dense solves, in parameter space and in the kernel's span."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.kronecker import fit_factors
from fimo.curvature.krylov_spaces import KernelSpace, ParameterSpace, Space, SpectralSpace
from fimo.curvature.operators import Hessian, Operator, RowsOperator
from fimo.curvature.solvers import (
    DivergenceError,
    conjugate_gradients,
    extreme_eigenvalues,
    lanczos,
    lissa,
    lissa_on_spectrum,
)
from fimo.curvature.spectrum import KernelSpectrum
from fimo.models.final_model import FinalModel
from fimo.models.losses import mean_squared_error
from tests.cases import CASES, Case
from tests.reference import attribution as dense

SPACES = ["parameters", "kernel", "spectrum"]


def setting(case: Case, space: str) -> tuple[Space, Tensor, InstanceGradients]:
    """Return a space for the test gradients, the dense matrix, and the gradients."""
    gradients = InstanceGradients(case.final_model)
    rows, test = gradients.gauss_newton(case.train), gradients.losses(case.test)
    matrix = dense.gauss_newton(case.final_model, case.train)
    found: Space = ParameterSpace(RowsOperator(rows), test)
    if space == "kernel":
        found = KernelSpace(rows, test, len(case.train))
    elif space == "spectrum":
        found = SpectralSpace(KernelSpectrum(case.final_model, case.train, gradients), test)
    return found, matrix, gradients


def solved(case: Case, matrix: Tensor, damping: float) -> Tensor:
    """Return g_j^T (C + damping)^-1 g_i, [J, N]."""
    return dense.influence(case, matrix, damping) * len(case.train)


@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("name", CASES)
def test_conjugate_gradients_reach_the_dense_solve_and_stay_there(name: str, space_name: str) -> None:
    case = CASES[name]()
    space, matrix, gradients = setting(case, space_name)
    # many more iterations than dimensions, and a tolerance below rounding, so that none stops early
    solution = conjugate_gradients(space, 0.01, tolerance=1e-30, max_iterations=1000)
    found = space.against(solution.vectors, gradients.losses(case.train))[..., 0]
    assert found.isfinite().all()
    torch.testing.assert_close(found, solved(case, matrix, 0.01), rtol=1e-6, atol=1e-8)
    stopped = conjugate_gradients(space, 0.01, tolerance=1e-8)
    assert stopped.converged
    assert stopped.iterations < 200
    assert (stopped.residuals <= 1e-8).all()


@pytest.mark.parametrize("name", CASES)
def test_all_spaces_take_the_same_iterates(name: str) -> None:
    case = CASES[name]()
    found = []
    for space_name in SPACES:
        space, _, gradients = setting(case, space_name)
        train = gradients.losses(case.train)
        for solution in (
            conjugate_gradients(space, 0.1, max_iterations=4, tolerance=1e-12),
            lissa(space, 0.1, scale=20.0, depth=7),
        ):
            found.append(space.against(solution.vectors, train))
            found.append(solution.residuals)
    parameters, kernel, spectrum = (found[k : k + 4] for k in (0, 4, 8))
    for one, other, third in zip(parameters, kernel, spectrum, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one, third, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_preconditioner_does_not_change_the_answer(name: str) -> None:
    case = CASES[name]()
    space, matrix, gradients = setting(case, "parameters")
    factors = fit_factors(gradients, case.train)
    damping = torch.tensor([1e-3])
    quick = conjugate_gradients(space, 1e-3, 1e-9, precondition=lambda v: factors.solve(v, damping)[0])
    assert quick.converged
    found = space.against(quick.vectors, gradients.losses(case.train))[..., 0]
    torch.testing.assert_close(found, solved(case, matrix, 1e-3), rtol=1e-5, atol=1e-6)


def test_an_exact_preconditioner_ends_conjugate_gradients_at_once() -> None:
    """EK-FAC is exact for one linear layer with one output. (For networks it need not save iterations.)"""
    case = CASES["mlp_regression"]()
    model = FinalModel(nn.Sequential(nn.Linear(4, 1)).double(), mean_squared_error)
    gradients = InstanceGradients(model)
    space = ParameterSpace(RowsOperator(gradients.gauss_newton(case.train)), gradients.losses(case.test))
    factors, damping = fit_factors(gradients, case.train), torch.tensor([1e-3])
    plain = conjugate_gradients(space, 1e-3, tolerance=1e-10)
    quick = conjugate_gradients(space, 1e-3, 1e-10, precondition=lambda v: factors.solve(v, damping)[0])
    assert quick.converged
    assert quick.iterations == 1 < plain.iterations


@pytest.mark.parametrize("space_name", SPACES)
@pytest.mark.parametrize("name", CASES)
def test_lissa_s_answer_is_the_dense_solve_whatever_its_scale(name: str, space_name: str) -> None:
    case = CASES[name]()
    space, matrix, gradients = setting(case, space_name)
    largest = torch.linalg.eigvalsh(matrix)[-1].item()
    for factor in (0.7, 1.0, 2.0):
        solution = lissa(space, 0.2, factor * (largest + 0.2), depth=5000, tolerance=1e-10)
        assert solution.converged
        found = space.against(solution.vectors, gradients.losses(case.train))[..., 0]
        torch.testing.assert_close(found, solved(case, matrix, 0.2), rtol=1e-6, atol=1e-8)


def test_lissa_s_sum_is_its_iterate() -> None:
    case = CASES["mlp_classification"]()
    space = setting(case, "spectrum")[0]
    assert isinstance(space, SpectralSpace)
    stepped, summed = lissa(space, 0.1, 20.0, 7, tolerance=0), lissa_on_spectrum(space, 0.1, 20.0, 7)
    torch.testing.assert_close(stepped.vectors, summed.vectors)
    with pytest.raises(DivergenceError):
        lissa_on_spectrum(space, 0.1, 1e-3, 7)


@pytest.mark.parametrize("space_name", SPACES)
def test_lissa_says_that_it_diverges(space_name: str) -> None:
    case = CASES["mlp_classification"]()
    space, matrix, _ = setting(case, space_name)
    largest = torch.linalg.eigvalsh(matrix)[-1].item()
    with pytest.raises(DivergenceError, match="raise"):
        lissa(space, 0.01, 0.3 * largest, depth=2000)


def test_lissa_diverges_where_the_hessian_is_more_negative_than_the_damping() -> None:
    case = CASES["mlp_classification"]()
    values = torch.linalg.eigvalsh(dense.hessian(case.final_model, case.train))
    assert values[0] < -0.01
    operator = Hessian(case.final_model, case.train)
    space = ParameterSpace(operator, InstanceGradients(case.final_model).losses(case.test))
    with pytest.raises(DivergenceError):
        lissa(space, -values[0].item() / 2, values[-1].item() * 1.1, depth=5000)


@pytest.mark.parametrize("name", CASES)
def test_lanczos_finds_eigenvalues_once(name: str) -> None:
    case = CASES[name]()
    truth = dense.gauss_newton(case.final_model, case.train)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(truth), generator=generator, dtype=torch.float64)
    values, vectors = lanczos(lambda v: truth @ v, start, len(truth))
    eye = torch.eye(len(values), dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, eye, rtol=0, atol=1e-8)
    largest = torch.linalg.eigvalsh(truth)[-5:]
    torch.testing.assert_close(values[-5:], largest, rtol=1e-8, atol=1e-10)


class Diagonal(Operator):
    """A diagonal matrix as an operator."""

    def __init__(self, values: Tensor, case: Case) -> None:
        self.values, self.dtype, self.device = values, values.dtype, values.device
        self.shapes = InstanceGradients(case.final_model).shapes

    def times(self, vectors: Tensor) -> Tensor:
        return self.values[:, None] * vectors


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_conjugate_gradients_take_as_many_products_as_there_are_distinct_eigenvalues(distinct: int) -> None:
    case = CASES["mlp_regression"]()
    rows = InstanceGradients(case.final_model).losses(case.test)
    values = 1.0 + torch.arange(case.final_model.size, dtype=torch.float64) % distinct
    space = ParameterSpace(Diagonal(values, case), rows)
    solution = conjugate_gradients(space, 0.5, tolerance=1e-10)
    assert (solution.iterations, solution.converged) == (distinct, True)
    torch.testing.assert_close(solution.vectors, rows.dense()[:, 0].T / (values[:, None] + 0.5))
    fewer = conjugate_gradients(space, 0.5, tolerance=1e-10, max_iterations=distinct - 1)
    assert (fewer.iterations, fewer.converged) == (distinct - 1, False)


SPECTRA = {
    "outliers": lambda n: torch.cat([0.01 * torch.linspace(-1, 1, n - 4), torch.tensor([-0.06, 1, 3, 9])]),
    "geometric": lambda n: torch.logspace(-8, 1, n) * torch.where(torch.arange(n) % 7 == n % 7, -0.01, 1.0),
    "positive": lambda n: torch.logspace(-8, 1, n),
    "uniform": lambda n: torch.linspace(-1, 3, n),
    "three": lambda n: torch.cat([torch.tensor([5, 2, -0.5]), torch.zeros(n - 3)]),
    "zero": torch.zeros,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_extreme_eigenvalues_are_bounded_closely(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = SPECTRA[name](120).double()
    basis = torch.linalg.qr(torch.randn(120, 120, generator=generator, dtype=torch.float64))[0]
    matrix, small = basis @ torch.diag(values) @ basis.T, 1e-10
    low, high = values.min().item(), values.max().item()
    for _ in range(5):
        start = torch.randn(120, 2, generator=generator, dtype=torch.float64)
        found = extreme_eigenvalues(lambda v: matrix @ v, start, most=120)
        assert found.converged
        allowed = 1e-4 * max(abs(low), high)
        assert low - max(0.1 * abs(low), 2 * allowed) - small <= found.lower <= low + small
        assert high - 0.01 * high - small <= found.upper <= high + 0.1 * high + small
    few = extreme_eigenvalues(lambda v: matrix @ v, start, most=4)
    assert few.converged == (name == "zero")
