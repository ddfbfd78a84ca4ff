"""Language models' gradients without the logits of all tokens, against plain automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.recording import recorder_for
from fimo.data.instances import IGNORED, Instances
from fimo.models.class_losses import LanguageModelling
from fimo.models.final_model import FinalModel
from fimo.models.vocabulary import vocabulary_of


class Network(nn.Module):
    """A block between a table and a vocabulary of eleven tokens; ``last`` makes its outputs."""

    def __init__(
        self, last: Callable[[Network, Tensor], Tensor], bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.token, self.mix, self.drop = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Dropout(dropout)
        self.head, self.last, self.vectorisable = nn.Linear(4, 11, bias=bias), last, True

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        h = torch.tanh(self.mix(self.drop(self.token(x).cumsum(1))))
        if not self.vectorisable:
            assert float(h.detach().abs().max()) < 2
        return self.last(self, h)


def head(network: Network, h: Tensor) -> Tensor:
    return network.head(h)


def rarely(network: Network, h: Tensor) -> Tensor:
    """Return logits, a tenth of them for instances with the token 7: few of them look at the logits."""
    outputs, seven = network.head(h), (network.seen == 7).any(1)
    return torch.where(seven[:, None, None], outputs / 10, outputs) if bool(seven.any()) else outputs


LASTS: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "capped": lambda network, h: torch.tanh(network.head(h)),
    "clamped where they are large": lambda network, h: network.head(h).clamp(-9, 9),
    "clamped in place": lambda network, h: network.head(h).clamp_(-9, 9),
    "called twice": lambda network, h: (network.head(h.detach()), network.head(h))[1],
    "straight through": lambda network, h: (
        (y := network.head(h)).detach() + (2 * y - 2 * y.detach())  # the same values, other derivatives
    ),
    "beside another path": lambda network, h: (
        network.head(h)
        + (h - h.detach()).sum((1, 2), keepdim=True) * h.sin() @ torch.eye(4, 11, dtype=h.dtype)
    ),
    "of other tokens": lambda network, h: network.head(h[:, -1:]).expand(-1, h.shape[1], -1),
    "of flattened tokens": lambda network, h: network.head(h.flatten(0, 1)).view(*h.shape[:2], -1),
}


def problem(
    last: Callable[[Network, Tensor], Tensor],
    total: bool = False,
    trainable: str = "mix.*",
    bias: bool = True,
) -> tuple[FinalModel, Instances]:
    torch.manual_seed(0)
    network = Network(last, bias).double()
    tokens = torch.randint(11, (6, 5))
    tokens[0, 3:], tokens[4, :2] = IGNORED, IGNORED
    model = FinalModel(network, LanguageModelling(total), trainable=(trainable,), accept_poor=True)
    return model, Instances(torch.randint(11, (6, 5)), tokens)


def by_autograd(model: FinalModel, data: Instances) -> Tensor:
    names = model.parameters()
    parameters = {n: p.clone().requires_grad_() for n, p in names.items()}
    rows = []
    for k in range(len(data)):
        one = data[[k]]
        outputs = torch.func.functional_call(model.network, parameters, (one.inputs,))
        loss = model.loss(outputs, one.targets).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_without_logits_are_the_plain_ones(
    total: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.models.class_losses.LOGITS", 64 * 8 * 7)  # seven tokens at a time
    model, data = problem(head, total, bias=bias)
    recorder = recorder_for(model, data)
    assert recorder is not None
    assert recorder.vocabulary is model.network.head
    seen: list[int] = []
    linear = nn.Linear.forward

    def counted(layer: nn.Linear, x: Tensor) -> Tensor:
        seen.extend([1] if layer is model.network.head else [])
        return linear(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    gradients = InstanceGradients(model)
    rows = gradients.losses(data).dense()[:, 0]
    torch.testing.assert_close(rows, by_autograd(model, data), rtol=1e-10, atol=1e-14)
    assert gradients.evaluations == len(data)
    seen.clear()
    gradients.losses(data).dense()
    assert len(seen) <= 1  # of one instance, for the number of rows
    assert not model.network.head._forward_pre_hooks


@pytest.mark.parametrize("name", LASTS)
def test_outputs_that_a_layer_does_not_make_alone_are_computed(name: str) -> None:
    model, data = problem(LASTS[name])
    recorder = recorder_for(model, data)
    assert recorder is None or recorder.vocabulary is None
    rows = InstanceGradients(model).losses(data).dense()[:, 0]
    torch.testing.assert_close(rows, by_autograd(model, data), rtol=1e-10, atol=1e-14)


def without_sevens(data: Instances, rows: slice) -> None:
    """Leave the token 7 to the other rows, of which the last has one; no token is padding."""
    data.inputs.clamp_(min=1)
    data.inputs[rows] = torch.where(data.inputs[rows] == 7, 3, data.inputs[rows])
    data.inputs[-1, 2] = 7


def test_what_some_instances_alone_do_with_logits_is_seen() -> None:
    model, data = problem(rarely)
    without_sevens(data, slice(3))
    recorder = recorder_for(model, data)
    assert recorder is not None
    assert recorder.vocabulary is model.network.head  # as the first instances have it
    rows = InstanceGradients(model).losses(data).dense()[:, 0]
    torch.testing.assert_close(rows, by_autograd(model, data), rtol=1e-10, atol=1e-14)


def test_a_vocabulary_that_is_trained_is_recorded_itself() -> None:
    for trainable in ("*", "head.bias"):
        model, data = problem(head, trainable=trainable)
        recorder = recorder_for(model, data)
        assert recorder is not None
        assert recorder.vocabulary is None
    model, data = problem(head)
    model.network.head.weight = model.network.token.weight
    model = FinalModel(model.network, model.loss, trainable=("token.*", "mix.*"), accept_poor=True)
    recorder = recorder_for(model, data)
    assert recorder is not None
    assert recorder.vocabulary is None


def test_a_hook_behind_the_vocabulary_is_seen() -> None:
    model, data = problem(head)
    model.network.head.register_forward_hook(lambda _, __, output: 2 * output)
    recorder = recorder_for(model, data)
    assert recorder is not None
    assert recorder.vocabulary is None
    rows = InstanceGradients(model).losses(data).dense()[:, 0]
    torch.testing.assert_close(rows, by_autograd(model, data), rtol=1e-10, atol=1e-14)


def test_only_a_plain_frozen_layer_before_token_losses_is_a_vocabulary() -> None:
    def clamped(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.clamp(-9, 9)  # none of the logits that are tried

    model, data = problem(head)
    assert vocabulary_of(model, data) == "head"
    handle = model.network.head.register_forward_hook(clamped)
    assert vocabulary_of(model, data) is None
    handle.remove()
    model.network.head.forward = lambda x: nn.Linear.forward(model.network.head, x).clamp(-9, 9)  # type: ignore[method-assign]
    assert vocabulary_of(model, data) is None
    for trainable in ("*", "head.bias"):
        assert vocabulary_of(*problem(head, trainable=trainable)) is None
    model, data = problem(head)
    squares = FinalModel(model.network, lambda outputs, _: outputs.square().sum((1, 2)), accept_poor=True)
    assert vocabulary_of(squares, data) is None


def test_gradients_of_instances_without_tokens_are_zero() -> None:
    model, data = problem(head)
    none = Instances(data.inputs, torch.full_like(data.targets, IGNORED))
    layer = model.network.head
    entering = torch.randn(6, 5, 4, dtype=torch.float64)
    found = LanguageModelling().gradient_before(layer, entering, none.targets)
    assert found.shape == entering.shape
    assert not found.any()
    assert LanguageModelling().losses_before(layer, entering, none.targets).tolist() == [0.0] * 6


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_without_logits_are_the_plain_ones(
    total: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.models.class_losses.LOGITS", 64 * 8 * 7)
    model, data = problem(head, total, bias=bias)
    entering = 50 * torch.randn(6, 5, 4, dtype=torch.float64)  # whose exponentials alone would overflow
    layer = model.network.head
    found = LanguageModelling(total).losses_before(layer, entering, data.targets)
    torch.testing.assert_close(found, model.loss(layer(entering), data.targets), rtol=1e-12, atol=0)
