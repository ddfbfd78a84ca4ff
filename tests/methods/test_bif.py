"""The Bayesian influence function against the closed form of quadratic losses under a normal law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.engine import langevin
from fimo.errors import InputError
from fimo.methods.bif import BayesianInfluence, covariance, largest_curvature
from fimo.models.final_model import FinalModel
from fimo.scores import Scores
from fimo.testing import check_method
from tests.cases import CASES, Case
from tests.methods.test_mirrored import linear_minimum
from tests.reference import attribution as dense

BETA, PULL = 4.0, 30.0


def away_from_the_minimum() -> Case:
    """A linear regression whose final model is not trained to the end."""
    case = linear_minimum()
    network = case.final_model.to().network
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1)
    model = FinalModel(network, case.final_model.loss, accept_poor=True)
    return Case("away", model, case.train, case.test)


def closed_form(case: Case, step: float) -> Tensor:
    """Return beta times the covariances ``[J, N]`` of quadratic losses, in the law of steps of that size.

    theta' - mean = (I - step K / 2) (theta - mean) + sqrt(step) normal has the covariance
    (K - step K^2 / 4)^-1, with K the curvature of the potential.
    """
    n, model = len(case.train), case.final_model
    pull = PULL * torch.eye(model.size, dtype=torch.float64)
    curvature = n * BETA * dense.gauss_newton(model, case.train) + pull
    gradient = n * BETA * dense.instance_gradients(model, case.train).mean(0)
    law = torch.linalg.inv(curvature - step / 4 * curvature @ curvature)
    shift = -torch.linalg.solve(curvature, gradient)
    parts = []
    for instances in (case.test, case.train):
        each = [dense.gauss_newton(model, instances[[k]]) for k in range(len(instances))]
        hessians = torch.stack(each)
        parts.append((dense.instance_gradients(model, instances) + hessians @ shift, hessians))
    (g, a), (h, b) = parts
    second = torch.einsum("jpq,qr,lrs,sp->jl", a, law, b, law) / 2
    return BETA * (g @ law @ h.T + second)


def normalised_errors(found: Scores, expected: Tensor) -> Tensor:
    assert found.sem is not None
    return (found.values - expected) / found.sem


def small_step(case: Case, share: float) -> float:
    return share / (len(case.train) * BETA * largest_curvature(case.final_model, case.train) + PULL)


@pytest.mark.parametrize("share", [0.2, 1.5])
def test_covariances_of_quadratic_losses_are_those_of_the_normal_law(share: float) -> None:
    case = away_from_the_minimum()
    step = small_step(case, share)
    method = BayesianInfluence(BETA, PULL, step, chains=64, burn_in=150, draws=150, thinning=10)
    found = method.attribute(case.final_model, case.train, case.test)
    expected = closed_form(case, step)
    error = normalised_errors(found, expected)
    assert 0.5 < error.square().mean() < 2, error
    assert error.abs().max() < 5
    # and the errors are small beside what they are errors of
    assert float(found.sem.square().mean() / expected.square().mean()) < 0.05**2  # type: ignore[union-attr]
    assert found.gradient_evaluations == 64 * (150 + 150 * 10) * len(case.train)


def test_batches_do_not_heat_the_chains() -> None:
    case = away_from_the_minimum()
    step = small_step(case, 0.1)
    method = BayesianInfluence(
        BETA, PULL, step, chains=64, burn_in=250, draws=100, thinning=20, batch_size=4, seed=3
    )
    found = method.attribute(case.final_model, case.train, case.test)
    expected = closed_form(case, step)
    apart = (found.values - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert apart < 0.06
    assert found.gradient_evaluations == 2 * 64 * (250 + 100 * 20) * 4


def test_near_a_minimum_it_is_the_damped_influence_function() -> None:
    case = linear_minimum()
    found = BayesianInfluence(1e6, 1e6, chains=32, draws=200).attribute(
        case.final_model, case.train, case.test
    )
    hessian, n = dense.gauss_newton(case.final_model, case.train), len(case.train)
    damped = hessian + torch.eye(len(hessian), dtype=torch.float64) / n
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train)
    expected = test @ torch.linalg.solve(damped, train.T) / n
    apart = (found.values - expected).norm() / expected.norm()
    assert apart < 0.1
    assert "a damping of 0.05" in found.notes[0]


@pytest.mark.parametrize("chains", [2, 5])
def test_covariances_and_their_errors_are_unbiased_though_draws_depend_on_one_another(chains: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.4]], dtype=torch.float64)
    repeats, draws = 4000, 6
    state = torch.randn(repeats, chains, 3, dtype=torch.float64, generator=generator)
    trace = []
    for _ in range(draws):  # stationary, with a correlation of .8 from draw to draw
        fresh = torch.randn(state.shape, dtype=torch.float64, generator=generator)
        state = 0.8 * state + 0.6 * fresh
        trace.append(state)
    samples = torch.stack(trace, 2)  # [repeats, C, T, 3]
    ours, theirs = 3 + samples @ mixing.T, samples
    each = [covariance(a, b) for a, b in zip(ours, theirs, strict=True)]
    values, sem, adjusted = (torch.stack([e[k] for e in each]) for k in range(3))
    error = values.std(0) / repeats**0.5
    assert ((values.mean(0) - mixing) / error).abs().max() < 4
    if chains > 2:
        torch.testing.assert_close(sem.square().mean(0).sqrt(), values.std(0), rtol=0.15, atol=0.02)
        centred = values - values.mean(2, keepdim=True)
        torch.testing.assert_close(adjusted.square().mean(0).sqrt(), centred.std(0), rtol=0.15, atol=0.02)


@pytest.mark.parametrize("name", ["mlp_classification", "conv_net"])
@pytest.mark.parametrize("batch_size", [4, 100])
def test_a_chain_does_not_depend_on_how_many_there_are(
    name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    few: dict[str, Any] = {"burn_in": 3, "draws": 2, "thinning": 2, "batch_size": batch_size}
    expected = BayesianInfluence(chains=5, **few).attribute(case.final_model, case.train, case.test)
    monkeypatch.setattr(langevin, "chunk_size", lambda setting, runs: 4)
    monkeypatch.setattr(langevin, "PASS", 5)
    found = BayesianInfluence(chains=5, **few).attribute(case.final_model, case.train, case.test)
    torch.testing.assert_close(found.values, expected.values)


def test_what_is_explained_is_the_measurement_and_a_constant_varies_with_nothing() -> None:
    case = CASES["mlp_regression"]()
    few: dict[str, Any] = {"chains": 4, "burn_in": 3, "draws": 5, "thinning": 1}
    model = FinalModel(case.final_model.network, case.final_model.loss, lambda f, y: 0 * f[:, 0] + 2)
    assert not BayesianInfluence(**few).attribute(model, case.train, case.test).values.any()
    plain = BayesianInfluence(**few).attribute(case.final_model, case.train, case.test).values
    twice = FinalModel(model.network, model.loss, lambda f, y: 2 * case.final_model.loss(f, y))
    found = BayesianInfluence(**few).attribute(twice, case.train, case.test).values
    torch.testing.assert_close(found, 2 * plain)


def test_the_claims_of_every_method_hold() -> None:
    few = BayesianInfluence(chains=8, burn_in=40, draws=20, thinning=3)
    check_method(few, cases=["mlp_regression", "conv_net"])


def test_what_means_nothing_is_refused() -> None:
    for key, wrong in (("beta", 0), ("localisation", -1), ("step_size", 0), ("chains", 1), ("draws", 0)):
        with pytest.raises(InputError, match=key):
            BayesianInfluence(**{key: wrong})
    case = CASES["mlp_regression"]()
    with pytest.raises(InputError, match="chains with steps of 10 diverge"):
        BayesianInfluence(step_size=10.0).attribute(case.final_model, case.train, case.test)
