"""Covariances over perturbed runs against dense closed forms and plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.methods.daunce import Daunce, covariance, signs_of
from fimo.models.final_model import FinalModel, apply
from fimo.testing import check_method
from tests.cases import CASES
from tests.methods.test_mirrored import linear_minimum
from tests.methods.test_response import following
from tests.reference import attribution as dense
from tests.reference.further_training import make_optimizer

LEFT_OUT = [0, 4, 9, 11]


def relaxed_gradients(epochs: int) -> tuple[Any, list[Tensor], Tensor, Tensor]:
    """A linear regression at its minimum; phi after each epoch, gradients of test and training instances."""
    case = linear_minimum()
    hessian = dense.gauss_newton(case.final_model, case.train)
    step = torch.eye(len(hessian), dtype=torch.float64) - 0.1 * hessian
    phi = [0.1 * sum(torch.linalg.matrix_power(step, k) for k in range(t + 1)) for t in range(epochs)]
    test, train = (dense.instance_gradients(case.final_model, x) for x in (case.test, case.train))
    return case, phi, test, train


def test_small_perturbations_give_the_covariances_of_relaxed_gradients() -> None:
    case, phi, test, train = relaxed_gradients(20)
    n = len(case.train)
    given = following(case, Protocol(lr=0.1, batch_size=n, epochs=20, dtype="float64"), (3,))
    method = Daunce(runs=7, strength=1e-5, seed=5)
    found = method.attribute(case.final_model, case.train, case.test, LEFT_OUT, given)
    force = signs_of(7, n, 5) @ train / n  # [K, P]
    for t in range(20):
        ours, theirs = (-force @ phi[t] @ g.T for g in (test, train[LEFT_OUT]))
        expected = n * torch.cov(torch.cat([ours, theirs], 1).T)[: len(test), len(test) :]
        torch.testing.assert_close(found.values[t], expected, rtol=1e-3, atol=1e-6)


def test_over_many_runs_they_are_those_with_the_empirical_fisher_matrix() -> None:
    case, phi, test, train = relaxed_gradients(4)
    n = len(case.train)
    given = following(case, Protocol(lr=0.1, batch_size=n, epochs=4, dtype="float64"), (3,))
    found = Daunce(2000, 1e-3).attribute(case.final_model, case.train, case.test, LEFT_OUT, given)
    expected = test @ phi[-1] @ (train.T @ train / n) @ phi[-1] @ train[LEFT_OUT].T
    assert found.sem is not None
    assert found.sem_adjusted is not None
    error = (found.values[-1] - expected) / found.sem[-1]
    assert 0.3 < error.square().mean() < 2
    assert error.abs().max() < 4
    centred = found.values[-1] - expected
    error = (centred - centred.mean(1, keepdim=True)) / found.sem_adjusted[-1]
    assert 0.3 < error.square().mean() < 2


def test_standard_errors_are_those_of_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5000, 12, 3, dtype=torch.float64, generator=generator)
    ours = samples @ torch.tensor([[1.0, 0.3], [0.5, -1.0], [0.2, 2.0]], dtype=torch.float64)
    each = [covariance(a, b) for a, b in zip(ours, samples, strict=True)]
    values, sem, _ = (torch.stack(part) for part in zip(*each, strict=True))
    torch.testing.assert_close(values[0], torch.cov(torch.cat([ours[0], samples[0]], 1).T)[:2, 2:])
    torch.testing.assert_close(sem.square().mean(0).sqrt(), values.std(0), rtol=0.15, atol=0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["mlp_classification", "conv_net", "transformer"])
def test_scores_are_covariances_of_plain_runs(name: str, optimizer: Any) -> None:
    case = CASES[name]()
    protocol = Protocol(optimizer=optimizer, lr=0.02, batch_size=5, epochs=2, dtype="float64")
    explained = case.final_model.loss if optimizer == "sgd" else lambda f, y: f.flatten(1)[:, 0]
    model = FinalModel(case.final_model.network, case.final_model.loss, explained)
    found = Daunce(runs=4, strength=0.8, seed=2).attribute(
        model, case.train, case.test, LEFT_OUT, following(case, protocol, (3, 4))
    )
    n, left_out = len(case.train), case.train[LEFT_OUT]
    signs, losses = signs_of(4, n, 2), []
    for k in range(4):
        network = copy.deepcopy(model.network).eval().requires_grad_(True)
        used = make_optimizer(list(network.parameters()), protocol)
        generator, points = torch.Generator().manual_seed(3), []
        for _ in range(2):
            for index in torch.randperm(n, generator=generator).split(5):
                used.zero_grad()
                each = model.loss(apply(network, case.train[index].inputs), case.train[index].targets)
                ((1 + 0.8 * signs[k, index]) * each).mean().backward()
                used.step()
            with torch.no_grad():
                ours = explained(apply(network, case.test.inputs), case.test.targets)
                theirs = model.loss(apply(network, left_out.inputs), left_out.targets)
            points.append(torch.cat([ours, theirs]))
        losses.append(torch.stack(points))
    for t in range(2):
        covariances = torch.cov(torch.stack([run[t] for run in losses], 1))
        expected = n / 0.8**2 * covariances[: len(case.test), len(case.test) :]
        torch.testing.assert_close(found.values[t], expected, rtol=1e-5, atol=1e-9)
    assert found.gradient_evaluations == 4 * 2 * n


def test_the_claims_of_every_method_hold() -> None:
    check_method(Daunce())


def test_what_means_nothing_is_refused() -> None:
    for key, wrong in (("runs", 2), ("strength", 0), ("strength", 1.1)):
        with pytest.raises(InputError, match=key):
            Daunce(**{key: wrong})
