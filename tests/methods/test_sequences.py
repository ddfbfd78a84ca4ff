"""Methods that follow further training, on outputs of more than one axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.data.instances import IGNORED, Instances
from fimo.engine.protocol import Protocol
from fimo.evaluation import agreement
from fimo.linear_response.recursion import outputs_at
from fimo.methods.graddot import GradDot
from fimo.methods.response import Response
from fimo.methods.unrolled import Unrolled
from fimo.models.final_model import FinalModel
from fimo.models.losses import binary_cross_entropy, language_modelling, mean_squared_error
from tests.cases import Case
from tests.methods.test_response import following, real_changes
from tests.reference.further_training import plain_run

LENGTH, LEFT_OUT = 4, [0, 5, 11]


class Sequences(nn.Module):
    """Applies a network at each position, so that it isn't one of linear layers on flat inputs."""

    def __init__(self, at_position: nn.Module) -> None:
        super().__init__()
        self.at_position = at_position

    def forward(self, x: Tensor) -> Tensor:
        return self.at_position(x)


def regression(at_position: nn.Module) -> Case:
    """Outputs and targets [n, T, 1]; as many test instances as positions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12 + LENGTH, LENGTH, 3, generator=generator, dtype=torch.float64)
    y = x[..., :1].sin() + 0.3 * torch.randn(12 + LENGTH, LENGTH, 1, generator=generator, dtype=torch.float64)
    model = FinalModel(Sequences(at_position).double(), mean_squared_error)
    return Case("sequences", model, Instances(x[:12], y[:12]), Instances(x[12:], y[12:]))


def classification(at_position: nn.Module) -> Case:
    """Outputs and 0/1 targets [n, T, 2]."""
    case = regression(at_position)
    model = FinalModel(case.final_model.network, binary_cross_entropy)

    def signs(part: Instances) -> Instances:
        assert isinstance(part.inputs, Tensor)
        return Instances(part.inputs, (part.inputs[..., :2] > 0).double())

    return Case("signs", model, signs(case.train), signs(case.test))


def language(network: nn.Module, vocabulary: int = 7, length: int = 5) -> Case:
    """Outputs [n, T, V], targets [n, T] of which some are ignored; an instance has none at all."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(vocabulary, (12 + LENGTH, length), generator=generator)
    y = torch.cat([x[:, 1:], torch.full((len(x), 1), IGNORED)], 1)
    y[1, 2:] = IGNORED
    y[3] = IGNORED
    model = FinalModel(network.double(), language_modelling)
    return Case("language", model, Instances(x[:12], y[:12]), Instances(x[12:], y[12:]))


def linear_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {
        "regression": regression(nn.Linear(3, 1)),
        "classification": classification(nn.Linear(3, 2)),
        "language": language(nn.Embedding(7, 7)),  # logits are the parameters themselves
    }


def curved_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {
        "regression": regression(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))),
        "language": language(TinyLanguageModel()),
    }


class TinyLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(vocabulary, width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        before = nn.functional.pad(h[:, :-1], (0, 0, 1, 0))
        return self.head(torch.tanh(self.mix(torch.cat([h, before], -1))))


@pytest.mark.parametrize("name", ["regression", "classification", "language"])
def test_on_a_linear_sequence_model_the_response_is_the_real_change(name: str) -> None:
    case = linear_cases()[name]
    protocol = Protocol(lr=0.5, batch_size=5, epochs=3, dtype="float64", momentum=0.5, weight_decay=0.1)
    found = following_scores(Response(kernels="own", removal="own"), case, protocol)
    expected = real_changes(case, protocol, LEFT_OUT, [0, 1])
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["regression", "language"])
def test_unrolled_evaluates_the_loss_of_sequences_at_outputs_changed_by_their_derivative(
    name: str, mode: Any
) -> None:
    case = curved_cases()[name]
    protocol = Protocol(lr=0.1, batch_size=5, epochs=2, leave_out="mask", dtype="float64", momentum=0.5)
    model, test = case.final_model, case.test

    def outputs(i: int, weight: float) -> Tensor:
        network = plain_run(model, case.train, test, protocol, 0, [i], weight)[2]
        return outputs_at(model, dict(network.named_parameters()), test)

    h = 1e-5
    change = [(outputs(i, 1 - h) - outputs(i, 1 + h)) / (2 * h) for i in LEFT_OUT]
    at = outputs(0, 1.0).requires_grad_()
    losses = model.loss(at, test.targets)
    (slope,) = torch.autograd.grad(losses.sum(), at)
    expected = {
        "outputs": [model.loss(at.detach() + c, test.targets) - losses.detach() for c in change],
        "loss": [(slope * c).flatten(1).sum(1) for c in change],
    }
    for propagate, each in expected.items():
        found = following_scores(Unrolled(mode, propagate), case, protocol, [0])  # type: ignore[arg-type]
        torch.testing.assert_close(found[-1], torch.stack(each, -1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("along", ["path", "end", "final"])
@pytest.mark.parametrize("name", ["regression", "language"])
def test_for_small_steps_the_response_of_sequences_is_nearly_the_real_change(name: str, along: Any) -> None:
    case = curved_cases()[name]
    protocol = Protocol(lr=0.01, batch_size=12, epochs=3, leave_out="mask", dtype="float64")
    expected = real_changes(case, protocol, LEFT_OUT, [0, 1])
    for form in ("kernel", "ekfac") if along == "final" else ("kernel",):
        found = following_scores(Response(along, form=form, removal="own"), case, protocol)  # type: ignore[arg-type]
        assert agreement(found, expected, "cosine").min() > 0.995
        assert (found * expected).sum() / (expected * expected).sum() == pytest.approx(1, abs=0.1)


def test_a_step_on_a_sequence_model_is_grad_dot() -> None:
    case = curved_cases()["language"]
    protocol = Protocol(lr=1e-6, steps=1, batch_size=12, dtype="float64", leave_out="mask")
    found = following_scores(Response(propagate="loss", removal="own"), case, protocol, [0])
    expected = GradDot().attribute(case.final_model, case.train, case.test).values[:, LEFT_OUT]
    torch.testing.assert_close(found[0] * 12 / 1e-6, expected, rtol=1e-5, atol=1e-9)


def following_scores(method: Any, case: Case, protocol: Protocol, seeds: Any = (0, 1)) -> Tensor:
    arguments = (case.final_model, case.train, case.test, torch.tensor(LEFT_OUT))
    found: Tensor = method.attribute(*arguments, following(case, protocol, seeds)).values
    return found
