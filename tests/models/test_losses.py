"""Losses, measurements and their derivatives in the outputs, against formulas and autograd."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.data.instances import IGNORED
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss, OwnLoss
from fimo.models.losses import (
    LOSSES,
    MEASUREMENTS,
    Huber,
    correct_probability,
    language_modelling,
    logit_margin,
)


def example(name: str, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, 3, 4) if name.startswith("language_modelling") else (n, 4)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name in ("mse", "huber"):
        return outputs, torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "binary_cross_entropy":
        return outputs, torch.randint(2, shape, generator=generator).double()
    targets = torch.randint(4, shape[:-1], generator=generator)
    if name.startswith("language_modelling"):
        targets[0, 1:] = IGNORED
        targets[1, 0] = IGNORED
    return outputs, targets


def autograd_hessians(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    loss, shape = LOSSES[name], outputs.shape[1:]
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda o, y=y: loss(o.view(1, *shape), y[None])[0], o.flatten())
            for o, y in zip(outputs, targets, strict=True)
        ]
    )


@pytest.mark.parametrize("name", LOSSES)
def test_hessians_their_roots_and_samples_agree(name: str) -> None:
    outputs, targets = example(name)
    truth = autograd_hessians(name, outputs, targets)
    torch.testing.assert_close(LOSSES[name].hessian(outputs, targets), truth)
    rows = LOSSES[name].hessian_root(outputs, targets).flatten(2)
    torch.testing.assert_close(rows.transpose(1, 2) @ rows, truth)
    generator = torch.Generator().manual_seed(0)
    drawn = LOSSES[name].sampled_gradients(outputs, targets, 4000, generator).flatten(2)
    assert (drawn.transpose(1, 2) @ drawn - truth).norm() < 0.05 * truth.norm()


CLOSED = [*LOSSES.values(), Huber(0.3)]


@pytest.mark.parametrize("loss", CLOSED, ids=repr)
def test_closed_forms_are_those_of_automatic_differentiation(loss: Loss) -> None:
    outputs, targets = example(loss.name)
    own = OwnLoss(loss)
    torch.testing.assert_close(loss.gradient(outputs, targets), own.gradient(outputs, targets))
    torch.testing.assert_close(loss.hessian(outputs, targets), own.hessian(outputs, targets))
    n, d = len(outputs), outputs[0].numel()
    for k in (1, d + 1):  # fewer and more vectors than outputs
        vectors = torch.randn(n, k, d, dtype=torch.float64)
        expected = torch.einsum("nde,nke->nkd", own.hessian(outputs, targets), vectors)
        torch.testing.assert_close(loss.hessian_times(outputs, targets, vectors), expected)
        with torch.no_grad():
            torch.testing.assert_close(own.hessian_times(outputs, targets, vectors), expected)
    directions = torch.linalg.qr(torch.randn(n, d, 3, dtype=torch.float64))[0].transpose(1, 2)
    between = loss.hessian_between(outputs, targets, directions)
    torch.testing.assert_close(between, own.hessian_between(outputs, targets, directions))
    change = torch.randn(n, 3, 5, dtype=torch.float64)
    flat = outputs.flatten(1)
    for c in range(5):
        moved = flat + torch.einsum("nrd,nr->nd", directions, change[:, :, c])
        slope = own.gradient(moved.view_as(outputs), targets).flatten(1)
        found = loss.changed_gradient(flat, targets, directions, change)[:, :, c]
        torch.testing.assert_close(found, torch.einsum("nrd,nd->nr", directions, slope))


@pytest.mark.parametrize("loss", [f for f in CLOSED if f.targets != "tokens"], ids=repr)
@pytest.mark.parametrize("shared", [True, False])
def test_stacked_gradients_are_those_of_automatic_differentiation(loss: Loss, shared: bool) -> None:
    """Feature-major, of replicas on the same instances or each on its own."""
    parts = [example(loss.name, n=8 + r) for r in range(3)]
    outputs = torch.stack([f[:8].T for f, _ in parts])
    targets = torch.stack([y[-8:] for _, y in (parts[:1] if shared else parts)])
    weight = torch.rand(3, 8, dtype=torch.float64)
    found, expected = torch.empty_like(outputs), torch.empty_like(outputs)
    loss.stacked_gradient(outputs, targets, weight, found)
    OwnLoss(loss).stacked_gradient(outputs, targets, weight, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_scalar_of_a_loss_determines_it(classes: int) -> None:
    """TRAK's f: dloss = (dloss/df) df for any change of outputs that changes f."""
    outputs = torch.randn(6, classes, dtype=torch.float64)
    cases = [(LOSSES["cross_entropy"], outputs, torch.randint(classes, (6,)))]
    for name in ("mse", "huber"):
        cases.append((LOSSES[name], outputs[:, :1], torch.randn(6, 1, dtype=torch.float64)))
    for loss, at, targets in cases:
        slope = Loss.of(loss.scalar_output).gradient(at, targets)
        q = loss.scalar_slope(at, targets)
        torch.testing.assert_close(q[:, None] * slope, loss.gradient(at, targets))


def test_known_losses_are_themselves_in_partials_of_nothing_and_own_functions_are_wrapped_once() -> None:
    loss = LOSSES["huber"]
    assert Loss.of(functools.partial(functools.partial(loss))) is loss
    assert FinalModel(nn.Linear(2, 1), functools.partial(loss)).loss is loss

    def own(outputs: Tensor, targets: Tensor, power: float = 2.0) -> Tensor:
        return (outputs - targets).abs().pow(power).mean(1)

    model = FinalModel(nn.Linear(2, 1), functools.partial(own, power=3.0)).to(dtype=torch.float64)
    again = FinalModel(model.network, model.loss)
    assert isinstance(again.loss, OwnLoss)
    assert not isinstance(again.loss.function, Loss)
    f, y = torch.randn(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    torch.testing.assert_close(again.loss.gradient(f, y), 3 * f.abs() * f)
    assert again.loss.targets is None
    assert not again.loss.convex


class Weighted(Loss):
    """A loss of one's own with a formula, and with a tensor."""

    name = "weighted"
    convex = True

    def __init__(self) -> None:
        self.weights = torch.tensor([1.0, 2.0])

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() * self.weights).sum(1)


def test_tensors_of_a_loss_of_one_s_own_kind_follow_its_outputs() -> None:
    model = FinalModel(nn.Linear(2, 2), Weighted())
    wide = torch.randn(3, 2, dtype=torch.float64)
    assert model.loss.gradient(wide, torch.zeros_like(wide)).dtype == torch.float64
    assert model.loss(wide.float(), torch.zeros(3, 2)).dtype == torch.float32


def test_huber_s_loss_is_quadratic_up_to_delta_and_linear_beyond() -> None:
    outputs = torch.tensor([[0.5], [-2.0], [2.5], [-10.0]], dtype=torch.float64)
    expected = torch.tensor([0.125, 2.0, 2 * (2.5 - 1), 2 * (10 - 1)], dtype=torch.float64)
    torch.testing.assert_close(Huber(2.0)(outputs, torch.zeros_like(outputs)), expected)
    assert Huber(2.0) != LOSSES["huber"] == Huber()
    with pytest.raises(InputError, match=r"model.loss.delta: expected a positive number but got 0"):
        Huber(0)


def test_two_classes_need_one_row() -> None:
    outputs, targets = torch.randn(5, 2, dtype=torch.float64), torch.randint(2, (5,))
    rows = LOSSES["cross_entropy"].hessian_root(outputs, targets)
    assert rows.shape == (5, 1, 2)
    p = outputs.softmax(1)
    truth = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(rows.transpose(1, 2) @ rows, truth)


@pytest.mark.parametrize("name", LOSSES)
def test_an_instance_s_gradient_does_not_depend_on_its_batch(name: str) -> None:
    outputs, targets = example(name)
    together = LOSSES[name].gradient(outputs, targets)
    alone = [LOSSES[name].gradient(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_language_modelling_loss_averages_an_instance_s_own_tokens() -> None:
    outputs, targets = example("language_modelling")
    losses = language_modelling(outputs, targets)
    for i in range(len(outputs)):
        kept = targets[i] != IGNORED
        torch.testing.assert_close(losses[i], F.cross_entropy(outputs[i, kept], targets[i, kept]))
    padded = F.pad(outputs, (0, 0, 0, 2)), F.pad(targets, (0, 2), value=IGNORED)
    torch.testing.assert_close(language_modelling(*padded), losses)
    assert language_modelling(outputs[:1], torch.full((1, 3), IGNORED)).item() == 0


def test_margin_and_probability_are_those_of_the_correct_class() -> None:
    outputs, targets = example("cross_entropy")
    p = outputs.softmax(1)[torch.arange(len(outputs)), targets]
    torch.testing.assert_close(correct_probability(outputs, targets), p)
    torch.testing.assert_close(logit_margin(outputs, targets), (p / (1 - p)).log())
    sequence, tokens = example("language_modelling")
    kept = tokens[2:]  # without ignored tokens
    each = torch.stack([logit_margin(sequence[2:, t], kept[:, t]) for t in range(3)])
    torch.testing.assert_close(logit_margin(sequence, tokens)[2:], each.mean(0))
    assert logit_margin(sequence, tokens).isfinite().all()


def test_measurements_have_names() -> None:
    assert {"logit_margin", "correct_probability", *LOSSES} == set(MEASUREMENTS)
    assert all(f.name == name for name, f in MEASUREMENTS.items())


def test_threads_do_not_disturb_each_other_s_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    targets = (torch.rand(20, 3, generator=generator) > 0.5).double()
    p = outputs.sigmoid()
    expected = torch.diag_embed(p * (1 - p)) / 3

    def repeatedly(_: int) -> None:
        for _ in range(100):
            torch.testing.assert_close(LOSSES["binary_cross_entropy"].hessian(outputs, targets), expected)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(repeatedly, range(2)))
