"""Rows by what enters and leaves layers, of every kind of layer, against plain per-instance gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.curvature.arranged_rows import ArrangedRows, calls_of
from fimo.curvature.cotangents import GradientOf
from fimo.curvature.covariances import layer_moments
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows, Rows, split
from fimo.curvature.kronecker import fit_factors
from fimo.curvature.layer_projection import LayerProjection
from fimo.curvature.module_rows import ConvolutionCall
from fimo.curvature.recording import recorder_for, tokens_of
from fimo.data.instances import IGNORED, Inputs, Instances
from fimo.models.final_model import FinalModel
from fimo.models.huggingface import pooled, trimmed
from fimo.models.losses import cross_entropy, language_modelling
from tests.cases import CASES
from tests.reference import attribution as dense


class Transposed(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Transposed.__name__, Transposed.__module__ = "Conv1D", "transformers.pytorch_utils"


class Language(nn.Module):
    """Tied embeddings, positions for all instances, a layer that is called twice, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(6, 4, padding_idx=0), nn.Embedding(5, 4)
        self.mix, self.shared = Transposed(4, 4), nn.Linear(4, 4)
        self.norm, self.scale = nn.LayerNorm(4), nn.RMSNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1])[None])
        h = h + torch.tanh(self.shared(self.norm(h)))
        h = h.cumsum(1) + self.mix(self.scale(torch.tanh(self.shared(h))))
        return self.head(h)[:, -1]


class Image(nn.Module):
    """Convolutions with stride, dilation, groups and padding of all kinds, and normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2))
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, dilation=2, padding="same")
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False, padding=1)
        self.batch, self.group = nn.BatchNorm2d(4), nn.GroupNorm(3, 6)
        self.batch.running_mean, self.batch.running_var = torch.randn(4), 1 + torch.rand(4)
        self.along = nn.Conv1d(6, 3, 2, padding="valid")
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.batch(self.first(x)))
        x = torch.tanh(self.depthwise(self.group(self.grouped(x))))
        return self.head(self.along(x.flatten(2)).mean(2))


class Windows(nn.Module):
    """A layer on parts of instances, parameters outside of layers, and weights used as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(3, 4), nn.Linear(8, 3)
        self.gain, self.number = nn.Parameter(torch.rand(4)), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inside(x.reshape(-1, 3)).view(len(x), 2, 4) * self.gain
        h = torch.tanh(parts.flatten(1))
        h = torch.cat([h[:, :4], F.linear(self.number(h[:, 4:]), self.number.weight).sin()], 1)
        return self.outside(h)


class Text(nn.Module):
    """Padded texts, cut to the longest of a batch."""

    def __init__(self, tokens: int = 6) -> None:
        super().__init__()
        self.token, self.mix, self.head = nn.Embedding(tokens, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        input_ids, attention_mask = trimmed(input_ids, attention_mask)
        h = torch.tanh(self.mix(self.token(input_ids)))
        return self.head(pooled(h.cumsum(1), attention_mask, "mean"))


class Sequence(nn.Module):
    """Positions before instances, which looks like instances of a batch of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(torch.tanh(self.inside(x.transpose(0, 1))).mean(0))


def padded() -> dict[str, Tensor]:
    mask = torch.arange(6) < torch.tensor([3, 6, 1, 4, 2, 5, 2])[:, None]
    return {"input_ids": torch.randint(6, (7, 6)), "attention_mask": mask.long()}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "language": (Language, lambda: torch.randint(6, (7, 5))),
    "image": (Image, lambda: torch.randn(7, 2, 7, 6)),
    "windows": (Windows, lambda: torch.randn(7, 6)),
    "text": (Text, padded),
    "sequence": (Sequence, lambda: torch.randn(7, 6, 2)),
}


KNOWN = ["language", "image", "windows", "text"]


def problem(name: str) -> tuple[FinalModel, Instances]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        make, inputs = NETWORKS[name]
        outputs = 6 if name == "language" else 3
        return FinalModel(make(), cross_entropy), Instances(inputs(), torch.randint(outputs, (7,)))
    finally:
        torch.set_default_dtype(torch.float32)


def by_layers(model: FinalModel, train: Instances, form: int) -> Rows:
    """Return Gauss-Newton rows whole, made anew whenever they are used, or kept in blocks of two batches."""
    rank = model.loss.rank(model.outputs(train).shape[1:])
    each = recorder_for(model, train).bytes_each * rank / 2**20
    return InstanceGradients(model, (64, 3 * each, 24 * each)[form]).gauss_newton(train, form="calls")


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_rows_by_layers_are_those_of_automatic_differentiation(
    name: str, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == 1:
        monkeypatch.setattr("fimo.curvature.module_terms.SLICE", 20)
    if form == 2:
        monkeypatch.setattr("fimo.curvature.gradients.BATCH", 2)
    model, train = problem(name)
    rows = by_layers(model, train, form)
    assert all(calls_of(b) for b in rows.blocks())
    assert any(isinstance(b, ArrangedRows) for b in rows.blocks()) == (form == 2)
    jacobians = dense.jacobians(model, train)
    roots = model.loss.hessian_root(model.outputs(train), train.targets)
    truth = torch.einsum("nrd,ndp->nrp", roots, jacobians)
    torch.testing.assert_close(rows.dense(), truth)
    torch.testing.assert_close(rows.gram(rows), torch.einsum("nrp,msp->nrms", truth, truth))
    torch.testing.assert_close(rows.own_gram(), truth @ truth.mT)
    torch.testing.assert_close(rows.squares().dense(), truth.square())
    torch.testing.assert_close(rows.squared_norms(), truth.square().sum(-1))
    for k in (1, 3):
        vectors = torch.randn(rows.p, k, dtype=torch.float64)
        torch.testing.assert_close(rows.times(vectors), truth @ vectors)
        torch.testing.assert_close(
            rows.transposed_times(rows.times(vectors)), torch.einsum("nrp,nrk->pk", truth, truth @ vectors)
        )
    formed = DenseRows(truth, rows.shapes)
    for left, right in ((formed, rows), (rows, formed)):
        torch.testing.assert_close(left.gram(right), torch.einsum("nrp,msp->nrms", truth, truth))
    for each, part in rows.grams(rows).items():
        at = torch.cat([torch.full((s.numel(),), n == each) for n, s in rows.shapes.items()])
        torch.testing.assert_close(part, torch.einsum("nrp,msp->nrms", truth[..., at], truth[..., at]))
    pieces = list(rows.pieces(2 * rows.r * rows.p * 8 / 2**20))
    assert max(p.n for p in pieces) <= 2
    torch.testing.assert_close(torch.cat([p.dense() for p in pieces]), truth)
    single = rows.to(torch.float32)
    assert single.dense().dtype == single.dtype == torch.float32


def test_parameters_that_hooks_do_not_see_whole_are_left_to_automatic_differentiation() -> None:
    found = {name: recorder_for(*problem(name)) for name in NETWORKS}
    assert found["language"].names == set(problem("language")[0].parameters())
    assert found["image"].names == set(problem("image")[0].parameters())
    assert found["windows"].names == {"inside.weight", "inside.bias", "outside.weight", "outside.bias"}
    assert found["sequence"].names == {"outside.weight", "outside.bias"}
    model, train = problem("sequence")
    rows = InstanceGradients(model, 1e-3).losses(train)
    torch.testing.assert_close(rows.dense()[:, 0], dense.instance_gradients(model, train))


def test_a_network_is_left_as_it_was() -> None:
    model, train = problem("language")
    before = {n: t.clone() for n, t in model.state().items()}
    InstanceGradients(model).losses(train)
    assert all(torch.equal(t, before[n]) for n, t in model.state().items())
    assert not any(m._forward_hooks for m in model.network.modules())
    assert not any(p.requires_grad for p in model.network.parameters())


def test_one_forward_pass_serves_all_rows() -> None:
    case = CASES["conv_net"]()
    calls: list[int] = []
    handle = case.final_model.network.conv.register_forward_hook(lambda *_: calls.append(1))
    try:
        gradients = InstanceGradients(case.final_model)
        recorder = recorder_for(case.final_model, case.train)
        calls.clear()
        gradients._block(recorder, case.train, case.final_model.loss.hessian_root)
    finally:
        handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("name", KNOWN)
def test_second_moments_by_layers_are_those_along_the_eigenvectors(name: str) -> None:
    model, train = problem(name)
    factors = fit_factors(InstanceGradients(model), train, fisher="exact")
    rows = DenseRows(InstanceGradients(model).gauss_newton(train).dense(), factors.shapes)
    parts = split(rows.dense().flatten(0, 1), rows.shapes)
    kinds = {n: b.kind for b in factors.blocks for n in b.names}
    assert list(kinds) != []
    for b in factors.blocks:
        if b.kind == "kronecker":
            moments = b.rotate(b.gather(parts)).square().sum(0) / len(train)
            torch.testing.assert_close(b.values, moments)
            back: dict[str, Tensor] = {}
            b.scatter(b.rotate_back(b.rotate(b.gather(parts))), back, rows.shapes)
            for n, part in back.items():
                torch.testing.assert_close(part, parts[n])
    expected = {
        "language": {"mix.weight", "mix.bias", "token.weight"},
        "image": {"first.weight"},
        "windows": set(),
        "text": {"mix.weight", "mix.bias"},
    }
    assert expected[name] <= {n for n, kind in kinds.items() if kind == "kronecker"}


@pytest.mark.parametrize("name", KNOWN)
def test_layer_projections_are_those_of_whole_rows(name: str) -> None:
    model, train = problem(name)
    gradients = InstanceGradients(model)
    rows = gradients.gauss_newton(train, form="calls")
    projection = LayerProjection.random(rows.shapes, 2, 0, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(
        projection.project(rows), projection.project(DenseRows(rows.dense(), rows.shapes))
    )


def test_padding_is_no_position_of_a_factor() -> None:
    model, train = problem("text")
    gradients = InstanceGradients(model)
    rows = gradients.gauss_newton(train, form="calls")
    found = layer_moments(gradients, train, rows, model.loss.hessian_root)
    (mix,) = [m for m in found if "mix.weight" in m.names]
    tokens = train.inputs["input_ids"][train.inputs["attention_mask"].bool()]
    a = F.pad(model.network.token(tokens), (0, 1), value=1)
    torch.testing.assert_close(mix.entering, a.T @ a / len(a))
    recorder = recorder_for(model, train)
    assert recorder is not None
    recorded = recorder.rows(train, lambda outputs: torch.ones_like(outputs)[:, None])
    for at in (slice(1, 3), torch.tensor([2, 0])):
        assert torch.equal(recorded.some(at).mask, train.inputs["attention_mask"].bool()[at])


def test_tokens_without_a_mask_go_to_the_last_that_is_predicted() -> None:
    skip = IGNORED
    targets = torch.tensor([[4, skip, 5, skip, skip], [skip, 3, 2, 1, 6], [skip, skip, skip, skip, skip]])
    batch = Instances(torch.zeros(3, 5, dtype=torch.int64), targets)
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    found = tokens_of(batch, language_modelling)
    assert found is not None
    assert torch.equal(found, expected)
    assert tokens_of(batch, cross_entropy) is None


@pytest.mark.parametrize("name", KNOWN)
def test_factors_recorded_apart_are_those_of_rows_by_layers(name: str) -> None:
    model, train = problem(name)
    gradients, root = InstanceGradients(model), model.loss.hessian_root
    rows = gradients.gauss_newton(train, form="calls")
    formed = DenseRows(rows.dense(), rows.shapes)  # which don't say what enters and leaves layers
    by_rows, apart = (
        {m.names: m for m in layer_moments(gradients, train, each, root)} for each in (rows, formed)
    )
    assert by_rows.keys() <= apart.keys()
    assert by_rows
    for names, moments in by_rows.items():
        torch.testing.assert_close(apart[names].entering, moments.entering)
        torch.testing.assert_close(apart[names].leaving, moments.leaving)
        assert apart[names].transposed == moments.transposed


def test_positions_before_instances_are_positions_of_a_factor() -> None:
    model, train = problem("sequence")
    gradients = InstanceGradients(model)
    rows = DenseRows(gradients.losses(train).dense(), gradients.shapes)
    inside, outside = layer_moments(gradients, train, rows, GradientOf(model.loss))
    network: Any = model.network
    a = F.pad(train.inputs.reshape(-1, 2), (0, 1), value=1)
    torch.testing.assert_close(inside.entering, a.T @ a / len(a))
    leaving = network.inside(train.inputs).requires_grad_()
    pooled = torch.tanh(leaving).mean(1)
    model.loss(network.outside(pooled), train.targets).sum().backward()
    d = leaving.grad.flatten(0, 1)
    torch.testing.assert_close(inside.leaving, d.T @ d / len(train))
    a = F.pad(pooled.detach(), (0, 1), value=1)
    torch.testing.assert_close(outside.entering, a.T @ a / len(train))


class AsNumbers(nn.Module):
    """A layer whose weights are used, and which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.layer.weight, self.layer.bias)


def test_a_module_that_is_never_called_has_no_factors() -> None:
    model = FinalModel(AsNumbers().double(), cross_entropy)
    train = Instances(torch.randn(7, 3, dtype=torch.float64), torch.randint(3, (7,)))
    gradients = InstanceGradients(model)
    assert layer_moments(gradients, train, gradients.losses(train), GradientOf(model.loss)) == []
    assert {b.kind for b in fit_factors(gradients, train).blocks} == {"dense"}


@pytest.mark.parametrize(
    ("kernel", "dilation", "stride"),
    [((3, 3), (1, 1), (1, 1)), ((3, 2), (2, 1), (1, 2)), ((1, 1), (1, 1), (2, 2))],
)
def test_patches_of_a_convolution_are_those_of_unfold(
    kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    x = torch.randn(3, 4, 11, 9)
    call = ConvolutionCall(
        ("weight",), 0, "weight", None, x, torch.randn(3, 1, 1, 5), False, kernel, dilation, stride
    )
    expected = F.unfold(x, kernel, dilation, 0, stride).mT
    assert torch.equal(call.positions(), expected)
    assert torch.equal(call.entries(), expected.flatten(0, 1).T)
    row = ConvolutionCall(
        ("weight",), 0, "weight", None, x[:, :, 0], torch.randn(3, 1, 1, 5), False, kernel[1:], dilation[1:],
        stride[1:],
    )  # fmt: skip
    wide = F.unfold(x[:, :, :1], (1, kernel[1]), (1, dilation[1]), 0, (1, stride[1])).mT
    assert torch.equal(row.positions(), wide)


class Unpadded(nn.Module):
    """A layer is given the tokens of all instances alone, without padding."""

    def __init__(self, sort: bool) -> None:
        super().__init__()
        self.token, self.mix, self.head, self.sort = (
            nn.Embedding(9, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            sort,
        )

    def forward(self, x: Tensor) -> Tensor:
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        x = x[order] if self.sort else x
        there, h = x != 0, self.token(x)
        mixed = torch.zeros_like(h)
        mixed[there] = h[there].tanh() if self.sort else self.mix(h[there]).tanh()
        mean = mixed.sum(1) / there.sum(1, keepdim=True)
        outputs = self.head(self.mix(mean).tanh() if self.sort else mean)
        return outputs[order.argsort()] if self.sort else outputs


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("last", [5, 6])
def test_rows_that_a_network_selects_or_sorts_are_no_parts_in_turn(sort: bool, last: int) -> None:
    torch.manual_seed(0)
    data = Instances(torch.zeros(8, 6, dtype=torch.long), torch.randint(0, 3, (8,)))
    for k, length in enumerate([4, 4, 4, 2, 4, 4, 4, last]):  # with 6: eight times four in all
        data.inputs[k, :length] = torch.randint(1, 9, (length,))
    model = FinalModel(Unpadded(sort).double(), cross_entropy, accept_poor=True)
    rows = InstanceGradients(model).losses(data).dense()[:, 0]
    parameters = {n: p.clone().requires_grad_() for n, p in model.parameters().items()}
    for k in range(8):
        outputs = torch.func.functional_call(model.network, parameters, (data.inputs[[k]],))
        loss = model.loss(outputs, data.targets[[k]]).sum()
        found = torch.autograd.grad(loss, list(parameters.values()))
        torch.testing.assert_close(rows[k], torch.cat([g.flatten() for g in found]), rtol=1e-9, atol=1e-13)


class OneEach(nn.Module):
    """A word and a number of each instance, of no axis of their own, beside a row."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, word: Tensor, row: Tensor, age: Tensor) -> Tensor:
        return self.head((self.token(word) + self.mix(torch.cat([row, age[:, None]], 1))).tanh())


def test_inputs_of_one_number_each_are_taken() -> None:
    torch.manual_seed(0)
    inputs: Inputs = {
        "word": torch.randint(9, (7,)), "row": torch.randn(7, 4).double(), "age": torch.rand(7).double(),
    }  # fmt: skip
    data = Instances(inputs, torch.randint(3, (7,)))
    model = FinalModel(OneEach().double(), cross_entropy, accept_poor=True)
    rows = InstanceGradients(model).losses(data).dense()[:, 0]
    torch.testing.assert_close(rows, dense.instance_gradients(model, data), rtol=1e-9, atol=1e-13)
