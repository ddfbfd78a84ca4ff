"""Losses, measurements and their derivatives in the outputs, against formulas and autograd."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.curvature.outputs import output_gradient, output_hessian_rows, sampled_gradients
from fimo.data.instances import IGNORED
from fimo.models.losses import (
    LOSSES,
    MEASUREMENTS,
    correct_probability,
    language_modelling,
    logit_margin,
    loss_name,
    output_hessian,
)


def example(name: str, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, 3, 4) if name == "language_modelling" else (n, 4)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "mse":
        return outputs, torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "binary_cross_entropy":
        return outputs, torch.randint(2, shape, generator=generator).double()
    targets = torch.randint(4, shape[:-1], generator=generator)
    if name == "language_modelling":
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
    torch.testing.assert_close(output_hessian(LOSSES[name], outputs, targets), truth)
    rows = output_hessian_rows(LOSSES[name], outputs, targets).flatten(2)
    torch.testing.assert_close(rows.transpose(1, 2) @ rows, truth)
    generator = torch.Generator().manual_seed(0)
    drawn = sampled_gradients(LOSSES[name], outputs, targets, 4000, generator).flatten(2)
    assert (drawn.transpose(1, 2) @ drawn - truth).norm() < 0.05 * truth.norm()


def test_two_classes_need_one_row() -> None:
    outputs, targets = torch.randn(5, 2, dtype=torch.float64), torch.randint(2, (5,))
    rows = output_hessian_rows(LOSSES["cross_entropy"], outputs, targets)
    assert rows.shape == (5, 1, 2)
    p = outputs.softmax(1)
    truth = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(rows.transpose(1, 2) @ rows, truth)


@pytest.mark.parametrize("name", LOSSES)
def test_an_instance_s_gradient_does_not_depend_on_its_batch(name: str) -> None:
    outputs, targets = example(name)
    together = output_gradient(LOSSES[name], outputs, targets)
    alone = [
        output_gradient(LOSSES[name], outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))
    ]
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
    assert all(loss_name(f) == name for name, f in MEASUREMENTS.items())


def test_threads_do_not_disturb_each_other_s_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    targets = (torch.rand(20, 3, generator=generator) > 0.5).double()
    p = outputs.sigmoid()
    expected = torch.diag_embed(p * (1 - p)) / 3

    def repeatedly(_: int) -> None:
        for _ in range(100):
            torch.testing.assert_close(
                output_hessian(LOSSES["binary_cross_entropy"], outputs, targets), expected
            )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(repeatedly, range(2)))
