"""The factored preconditioner against the diagonal that it stands for."""

from __future__ import annotations

import pytest
import torch

from fimo.curvature.gradients import InstanceGradients
from fimo.engine.protocol import Protocol
from fimo.linear_response.coefficient_optimizer import CoefficientOptimizer, preconditioner, scaled
from tests.cases import CASES

ADAM = Protocol(optimizer="adam", epochs=1)


def test_a_second_moment_of_rank_one_is_scaled_exactly() -> None:
    case = CASES["mlp_regression"]()
    gradients = InstanceGradients(case.final_model)
    rows = gradients.outputs(case.train)
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name, shape in rows.shapes.items():
        parts = [0.1 + torch.rand(n, generator=generator, dtype=torch.float64) for n in shape]
        moments[name] = parts[0][:, None] * parts[1] if len(parts) == 2 else parts[0]
    found = scaled(rows, moments, ADAM.update_rule)
    assert found is not None
    expected = rows.gram(rows, preconditioner(ADAM.update_rule, moments))
    torch.testing.assert_close(found.gram(found), expected, rtol=1e-5, atol=1e-8)


def test_a_real_second_moment_is_scaled_closely_and_unused_parameters_do_no_harm() -> None:
    case = CASES["mlp_classification"]()
    gradients = InstanceGradients(case.final_model)
    rows = gradients.losses(case.train)
    flat = rows.dense()[:, 0].square().mean(0)
    moments, start = {}, 0
    for name, shape in rows.shapes.items():
        moments[name] = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    found = scaled(rows, moments, ADAM.update_rule)
    assert found is not None
    inner, expected = (
        found.gram(found).flatten(),
        rows.gram(rows, preconditioner(ADAM.update_rule, moments)).flatten(),
    )
    assert torch.isfinite(inner).all()
    assert torch.nn.functional.cosine_similarity(inner, expected, dim=0) > 0.97


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_steps_with_a_fixed_second_moment_are_those_of_torch_where_eps_drowns_it(optimizer: str) -> None:
    """With eps far above the gradients torch's Adam divides by eps alone: momentum, its correction, decay."""
    torch.manual_seed(0)
    eps, decay = 1e9, 0.1 if optimizer == "adamw" else 0.0
    protocol = Protocol(optimizer=optimizer, lr=0.05, betas=(0.8, 0.99), weight_decay=decay, epochs=1)
    found = CoefficientOptimizer(protocol.update_rule, (6, 3), torch.zeros((), dtype=torch.float64))
    coefficients = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    found.coefficients.copy_(coefficients.detach())
    plain = torch.optim.AdamW(
        [coefficients], lr=0.05 * eps, betas=(0.8, 0.99), eps=eps, weight_decay=decay / eps
    )
    for k in range(5):
        index, gradient = torch.tensor([k, 2, 5]), torch.randn(3, 3, dtype=torch.float64)
        found.step(index, gradient, 0.05, 0.05)
        coefficients.grad = torch.zeros_like(coefficients).index_add(0, index, gradient)
        plain.step()
        torch.testing.assert_close(found.coefficients, coefficients.detach(), rtol=1e-6, atol=1e-9)
