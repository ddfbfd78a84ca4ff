"""Rescaled influence functions: the curvature that remains without an instance, and refitting without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.ekfac import Ekfac
from fimo.methods.exact import ExactInfluence
from fimo.methods.gradient import CurvatureMethod
from fimo.methods.kfac import Kfac
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, mean_squared_error
from tests.cases import CASES, Case
from tests.reference import attribution as dense

DAMPING = 0.05


def newton_steps(case: Case, of_instances: Tensor) -> Tensor:
    """[J, N]: (1/N) g_j^T (C - C_i / N + damping)^-1 g_i, one dense solve for each i.

    Args:
        of_instances: C_i ``[N, P, P]``.
    """
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train)
    n, total = len(train), of_instances.sum(0)
    eye = DAMPING * torch.eye(total.shape[0], dtype=total.dtype)
    moved = [
        torch.linalg.solve((total - c) / n + eye, g) / n for c, g in zip(of_instances, train, strict=True)
    ]
    return test @ torch.stack(moved, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_remaining_curvature_is_inverted(name: str) -> None:
    case = CASES[name]()
    j, h = dense.jacobians(case.final_model, case.train), dense.output_hessians(case.final_model, case.train)
    expected = newton_steps(case, torch.einsum("ndp,nde,neq->npq", j, h, j))
    method = ExactInfluence(DAMPING, rescaled=True)
    found = method.attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    small = case.final_model.size * 8 * 3 / 2**20  # three gradients at once
    blocks = ExactInfluence(DAMPING, rescaled=True, memory_mb=small)
    some = blocks.attribute(case.final_model, case.train, case.test, [7, 2]).values
    torch.testing.assert_close(some, expected[:, [7, 2]], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp_regression", "transformer"])
def test_of_the_empirical_fisher_an_instance_takes_its_gradient_away(name: str) -> None:
    case = CASES[name]()
    g = dense.instance_gradients(case.final_model, case.train)
    expected = newton_steps(case, g[:, :, None] * g[:, None])
    method = ExactInfluence(DAMPING, curvature="empirical", rescaled=True)
    found = method.attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def regression(n: int = 14, d: int = 6, outputs: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half as many inputs as instances, so that leverages are large."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return drawn(n, d), drawn(n, outputs), drawn(5, d), drawn(5, outputs)


@pytest.mark.parametrize(
    ("kind", "damping"),
    [(ExactInfluence, DAMPING), (Ekfac, DAMPING), (Kfac, DAMPING), (ExactInfluence, 1e-12)],
)
def test_leaving_one_out_of_least_squares_is_refitting_without_it(
    kind: type[CurvatureMethod], damping: float
) -> None:
    x, y, z, wanted = regression()
    n, outputs = y.shape

    def refitted(keep: list[int]) -> Tensor:
        # (1/N) sum over kept of the mean squared error + (damping / 2) |W|^2, with N fixed
        a, b = x[keep], y[keep]
        eye = damping * torch.eye(x.shape[1], dtype=x.dtype)
        factor = 2 / (outputs * n)
        return torch.linalg.solve(factor * a.T @ a + eye, factor * a.T @ b)

    def losses(weight: Tensor) -> Tensor:
        return (z @ weight - wanted).square().mean(1)

    network = nn.Sequential(nn.Linear(x.shape[1], outputs, bias=False)).double()
    network[0].weight.data = refitted(list(range(n))).T
    whole = losses(refitted(list(range(n))))
    truth = torch.stack([losses(refitted([k for k in range(n) if k != i])) - whole for i in range(n)], 1)
    run = (FinalModel(network, mean_squared_error, accept_poor=True), Instances(x, y), Instances(z, wanted))
    found = kind(damping, "outputs", rescaled=True).attribute(*run).values  # type: ignore[call-arg]
    torch.testing.assert_close(found, truth)
    usual = kind(damping, "outputs").attribute(*run).values
    assert usual.norm() < 0.7 * truth.norm()  # which knows nothing of leverages


def test_leaving_one_out_of_logistic_regression_is_nearer_to_refitting_than_influence() -> None:
    """The claim of the paper, where parameters are many."""
    x, _, z, _ = regression(n=24, d=8)
    y = (x[:, :3] + 0.5 * regression(n=24, d=8)[1].sum(1, keepdim=True)).argmax(1)
    n, classes = len(x), 3
    wanted = z[:, :3].argmax(1)

    def fitted(keep: list[int]) -> Tensor:
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype)
        for _ in range(30):  # Newton's method

            def objective(w: Tensor) -> Tensor:
                loss = F.cross_entropy(x[keep] @ w.T, y[keep], reduction="sum") / n
                return loss + DAMPING / 2 * w.square().sum()

            g = torch.autograd.functional.jacobian(objective, weight).flatten()
            h = torch.autograd.functional.hessian(objective, weight).reshape(len(g), len(g))
            weight = weight - torch.linalg.solve(h, g).view_as(weight)
        return weight

    def losses(weight: Tensor) -> Tensor:
        return F.cross_entropy(z @ weight.T, wanted, reduction="none")

    network = nn.Sequential(nn.Linear(x.shape[1], classes, bias=False)).double()
    network[0].weight.data = fitted(list(range(n)))
    whole = losses(network[0].weight.data)
    truth = torch.stack([losses(fitted([k for k in range(n) if k != i])) - whole for i in range(n)], 1)
    run = (FinalModel(network, cross_entropy, accept_poor=True), Instances(x, y), Instances(z, wanted))
    usual = ExactInfluence(DAMPING, "outputs").attribute(*run).values
    rescaled = ExactInfluence(DAMPING, "outputs", rescaled=True).attribute(*run).values
    assert (rescaled - truth).norm() < 0.5 * (usual - truth).norm()


def test_every_damping_has_its_own_leverages() -> None:
    case = CASES["mlp_classification"]()
    method = ExactInfluence(rescaled=True)
    curvature = method.fit(case.final_model, case.train)
    left, dampings = curvature.gradients.measurements(case.test), torch.tensor([0.01, 0.2, 3.0])
    problem = AttributionProblem(case.final_model, case.train, case.test)
    both = method.solved(curvature, left, problem, dampings).values
    for values, damping in zip(both, dampings.tolist(), strict=True):
        one = ExactInfluence(damping, rescaled=True).attribute(case.final_model, case.train, case.test)
        torch.testing.assert_close(values[:, 0] / len(case.train), one.values)


def test_with_little_curvature_of_an_instance_nothing_is_rescaled() -> None:
    case = CASES["mlp_regression"]()
    for kind in (ExactInfluence, Ekfac):
        run = (case.final_model, case.train, case.test)
        torch.testing.assert_close(
            kind(1e7, rescaled=True).attribute(*run).values, kind(1e7).attribute(*run).values
        )


def test_factors_that_lack_an_instance_s_own_curvature_are_refused() -> None:
    case = CASES["mlp_regression"]()
    with pytest.raises(InputError, match=r"rescaled: \d+ of 23 instances have more curvature .* `exact` has"):
        Ekfac(rescaled=True).attribute(case.final_model, case.train, case.test)
    sampled = Ekfac(fisher="sampled", rescaled=True)
    assert "not samples" in (sampled.inapplicable(case.final_model, case.train) or "")
    with pytest.raises(InputError, match="not samples"):
        sampled.attribute(case.final_model, case.train, case.test)
