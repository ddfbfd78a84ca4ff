"""Spectral functions of Gauss-Newton matrices against dense matrix functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.spectrum import KernelSpectrum, kernel_dimension
from tests.cases import CASES
from tests.reference import attribution as dense

PHIS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": lambda c: 1 / (c + 0.01),
    "relaxation": lambda c: torch.where(c > 0, -torch.expm1(-20 * c) / c.where(c > 0, 1), 20.0),
    "decay": lambda c: torch.exp(-5 * c),
    "steps": lambda c: (1 - 0.1 * c) ** 40,
}


def matrix_function(matrix: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * phi(values.clamp(min=0))) @ vectors.T


@pytest.mark.parametrize("route", ["kernel", "parameters", "auto"])
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("name", CASES)
def test_a_spectral_function_is_the_dense_matrix_function(
    name: str, phi: str, route: Literal["kernel", "parameters", "auto"]
) -> None:
    case = CASES[name]()
    gradients = InstanceGradients(case.final_model)
    spectrum = KernelSpectrum(case.final_model, case.train, gradients, route=route)
    left, right = gradients.outputs(case.test), gradients.losses(case.train)
    found = spectrum.apply(PHIS[phi], left, right)
    function = matrix_function(dense.gauss_newton(case.final_model, case.train), PHIS[phi])
    expected = torch.einsum("nrp,pq,msq->nrms", left.dense(), function, right.dense())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    change = spectrum.parameter_change(PHIS[phi], right)
    torch.testing.assert_close(change, function @ right.dense()[:, 0].T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("route", ["kernel", "parameters"])
@pytest.mark.parametrize("name", CASES)
def test_a_diagonal_preconditioner_scales_parameters(
    name: str, route: Literal["kernel", "parameters"]
) -> None:
    case = CASES[name]()
    gradients = InstanceGradients(case.final_model)
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(case.final_model.size, generator=generator, dtype=torch.float64)
    spectrum = KernelSpectrum(case.final_model, case.train, gradients, column_scale=scale, route=route)
    left, right = gradients.losses(case.test), gradients.losses(case.train)
    matrix = dense.gauss_newton(case.final_model, case.train) * scale[:, None] * scale
    function = matrix_function(matrix, PHIS["inverse"])
    expected = (left.dense()[:, 0] * scale) @ function @ (right.dense()[:, 0] * scale).T
    found = spectrum.apply(PHIS["inverse"], left, right)[:, 0, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    change = spectrum.parameter_change(PHIS["inverse"], right)
    torch.testing.assert_close(change, function @ (right.dense()[:, 0] * scale).T, rtol=1e-6, atol=1e-8)


def test_a_singular_matrix_gives_finite_results() -> None:
    """Duplicated instances make the kernel singular, and a duplicate's score the original's."""
    case = CASES["mlp_classification"]()
    twice = case.train[torch.arange(len(case.train)).repeat(2)]
    gradients = InstanceGradients(case.final_model)
    spectrum = KernelSpectrum(case.final_model, twice, gradients, route="kernel")
    found = spectrum.apply(PHIS["inverse"], gradients.losses(case.test), gradients.losses(twice))[:, 0, :, 0]
    assert found.isfinite().all()
    n = len(case.train)
    torch.testing.assert_close(found[:, :n], found[:, n:], rtol=1e-6, atol=1e-9)


def test_float32_gradients_are_decomposed_in_float64() -> None:
    case = CASES["mlp_regression"]()
    single = case.to(torch.float32)
    gradients = InstanceGradients(single.final_model)
    spectrum = KernelSpectrum(single.final_model, single.train, gradients)
    assert spectrum.eigenvalues.dtype == torch.float64
    found = spectrum.apply(PHIS["inverse"], gradients.losses(single.test), gradients.losses(single.train))[
        :, 0, :, 0
    ]
    expected = dense.influence(case, dense.gauss_newton(case.final_model, case.train), 0.01) * len(case.train)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_dimension_is_the_smaller_of_parameters_and_rows() -> None:
    case = CASES["mlp_classification"]()
    assert kernel_dimension(case.final_model, case.train) == min(83, 3 * 23)
    spectrum = KernelSpectrum(case.final_model, case.train)
    assert spectrum.dimension == 2 * 23
    truth = dense.gauss_newton(case.final_model, case.train)
    assert abs(spectrum.mean_eigenvalue - truth.diagonal().mean().item()) < 1e-12
