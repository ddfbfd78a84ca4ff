"""Causal language models: tokens, padding and tied weights, by plain computation in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

from fimo.app.displayed import of_tokens
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.kronecker import fit_factors
from fimo.data.instances import IGNORED, Instances
from fimo.data.language import by_token
from fimo.data.packing import packed
from fimo.engine.protocol import Protocol
from fimo.further_training import further_train
from fimo.methods.datainf import DataInf
from fimo.methods.ekfac import Ekfac
from fimo.methods.graddot import GradDot
from fimo.methods.kfac import Kfac
from fimo.models.final_model import FinalModel
from fimo.models.huggingface import causal_lm
from fimo.models.losses import language_modelling, language_modelling_sum

VOCABULARY, N = 13, 9


def model(loss: object = language_modelling) -> FinalModel:
    torch.manual_seed(0)
    network = causal_lm(VOCABULARY, width=8, heads=2, layers=1, positions=12).double()
    return FinalModel(network, loss, accept_poor=True)  # type: ignore[arg-type]


def instances(n: int = N, seed: int = 1) -> Instances:
    """Sequences of 3 to 7 tokens, padded on the right, and of every second one the first two are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (n, 8), generator=generator)
    length = 3 + torch.arange(n) % 5
    positions = torch.arange(7)
    kept = (positions < length[:, None] - 1) & ((torch.arange(n) % 2 == 0)[:, None] | (positions > 0))
    targets = torch.where(kept, ids[:, 1:], IGNORED)
    inside = positions < length[:, None] - 1
    return Instances({"input_ids": torch.where(inside, ids[:, :-1], 0)}, targets)


def alone(part: Instances, row: int) -> Instances:
    """One instance without its padding."""
    assert isinstance(part.inputs, dict)
    length = int((part.targets[row] != IGNORED).nonzero().max()) + 1
    return Instances({"input_ids": part.inputs["input_ids"][[row], :length]}, part.targets[[row], :length])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [language_modelling, language_modelling_sum], ids=lambda loss: loss.name)
def test_tokens_losses_add_up_to_the_instance_s(loss: object) -> None:
    final_model, part = model(loss), instances()
    outputs = final_model.outputs(part)
    each = language_modelling.by_token(outputs, part.targets)
    assert torch.equal(each.isnan(), part.targets == IGNORED)
    expected = each.nansum(1) if loss is language_modelling_sum else each.nanmean(1)
    close(final_model.losses(part), expected)
    logs = outputs.log_softmax(-1)
    close(each[2, 1], -logs[2, 1, part.targets[2, 1]])


@pytest.mark.parametrize("loss", [language_modelling, language_modelling_sum], ids=lambda loss: loss.name)
def test_padding_changes_no_loss_and_no_score(loss: object) -> None:
    final_model, train, test = model(loss), instances(), instances(4, 2)
    padded = GradDot().attribute(final_model, train, test).values
    for i in range(N):
        one = alone(train, i)
        close(final_model.losses(one), final_model.losses(train)[[i]])
        close(GradDot().attribute(final_model, one, test).values[:, 0], padded[:, i])


def test_sequences_that_share_a_row_have_the_numbers_that_they_have_alone() -> None:
    final_model, train, test = model(language_modelling_sum), instances(), instances(4, 2)
    rows, members = packed(train, 10)
    assert sum(map(len, members)) == N
    assert 1 < len(rows) < N
    losses, scores = final_model.losses(train), GradDot().attribute(final_model, train, test).values
    found = GradDot().attribute(final_model, rows, test).values
    for k, inside in enumerate(members):
        close(final_model.losses(rows)[k], losses[inside].sum())
        close(found[:, k], scores[:, inside].sum(1))
    each = language_modelling.by_token(final_model.outputs(rows), rows.targets)
    alone = language_modelling.by_token(final_model.outputs(train), train.targets)
    close(each[~each.isnan()], alone[~alone.isnan()])
    packed_mean = model().losses(rows)
    tokens = (rows.targets != IGNORED).sum(1)
    close(packed_mean * tokens, final_model.losses(rows))


def test_a_token_s_scores_and_sensitivities_average_to_its_instance_s() -> None:
    final_model, train, test = model(), instances(), instances(4, 2)
    each, where = by_token(test)
    rows = torch.tensor([row for row, _ in where])

    def averaged(values: Tensor) -> Tensor:
        return torch.stack([values[..., rows == j, :].mean(-2) for j in range(len(test))], -2)

    for method in (GradDot(), DataInf()):
        whole = method.attribute(final_model, train, test).values
        close(averaged(method.attribute(final_model, train, each).values), whole)
    protocol = Protocol(lr=0.1, batch_size=4, epochs=1, leave_out="mask", dtype="float64")
    truth, tokens = (further_train(final_model, train, t, protocol, [0], [1, 5]).raw for t in (test, each))
    torch.testing.assert_close(averaged(tokens), truth, rtol=1e-5, atol=1e-8)  # raw is kept as float32


def test_grad_dot_of_a_model_with_tied_embeddings_is_the_product_of_whole_gradients() -> None:
    final_model, train, test = model(), instances(), instances(4, 2)
    network = final_model.network
    assert network.model.lm_head.weight is network.model.transformer.wte.weight  # type: ignore[union-attr]

    def gradients(part: Instances) -> Tensor:
        found = []
        network.requires_grad_(True)
        for k in range(len(part)):
            inputs: Any = part[[k]].inputs
            loss = final_model.loss(network(**inputs), part.targets[[k]]).sum()
            found.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
            )
        network.requires_grad_(False)
        return torch.stack(found)

    expected = gradients(test) @ gradients(train).T
    close(GradDot().attribute(final_model, train, test).values, expected)


class OfLinearLayers(nn.Module):
    """GPT-2's blocks with ``nn.Linear`` for its own linear layers, whose weights are transposed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(True)
        for name, layer in list(self.network.named_modules()):
            if type(layer).__name__ == "Conv1D":
                rows, columns = layer.weight.shape  # type: ignore[union-attr,misc]
                linear = nn.Linear(rows, columns).double()  # type: ignore[arg-type]
                linear.load_state_dict({"weight": layer.weight.T, "bias": layer.bias})  # type: ignore[operator,union-attr]
                parent, _, attribute = name.rpartition(".")
                setattr(self.network.get_submodule(parent), attribute, linear)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network(input_ids)


@pytest.mark.parametrize("corrected", [True, False])
def test_kronecker_factors_know_gpt2_s_transposed_layers(corrected: bool) -> None:
    gpt2, train, test = model(), instances(), instances(4, 2)
    linear = FinalModel(OfLinearLayers(gpt2.network), language_modelling, accept_poor=True)
    factors = fit_factors(InstanceGradients(gpt2), train, corrected, fisher="empirical")
    assert factors.coverage == 1
    method = Ekfac(fisher="empirical", damping=0.1) if corrected else Kfac(fisher="empirical", damping=0.1)
    found, expected = (method.attribute(m, train, test).values for m in (gpt2, linear))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [Ekfac, Kfac])
def test_padding_changes_no_kronecker_factor(method: type[Ekfac] | type[Kfac]) -> None:
    final_model, train, test = model(), instances(), instances(4, 2)
    assert isinstance(train.inputs, dict)
    wider = Instances(
        {"input_ids": F.pad(train.inputs["input_ids"], (0, 3), value=5)},
        F.pad(train.targets, (0, 3), value=IGNORED),
    )
    found, expected = (
        method(fisher="empirical", damping=0.1).attribute(final_model, t, test).values for t in (wider, train)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_shown_losses_belong_to_the_tokens_that_they_are_of() -> None:
    losses = torch.tensor([math.nan, 1.23456, 2.0, math.nan])
    assert of_tokens(losses, 4) == (None, None, 1.23, 2.0)
    assert replace(language_modelling, total=True) == language_modelling_sum
