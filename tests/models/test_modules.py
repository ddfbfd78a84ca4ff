"""Modules that torch.func, Python's copy or another type of numbers trip over: right, or refused."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fimo
from fimo.data.instances import Instances
from fimo.engine.choice import choose_engine
from fimo.engine.stacked import FunctionalNetwork
from fimo.errors import InputError
from fimo.further_training import tangent_outputs
from fimo.further_training.adjoint import adjoint
from fimo.models.attention import plain_attention
from fimo.models.copied import copied
from fimo.models.final_model import FinalModel
from fimo.models.train_mode import TrainMode
from tests.reference.further_training import plain_run

X = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
PROTOCOL = fimo.Protocol(lr=0.05, batch_size=4, epochs=2, dtype="float64")


class Sloped(nn.Module):
    """PReLU as a function."""

    def __init__(self, slopes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.slope = nn.Parameter(torch.linspace(0.1, 0.5, slopes))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.prelu(self.first(x), self.slope))


def by_hand(network: nn.Module, train: int, test: int) -> Tensor:
    """Return Grad-Dot's scores ``[J, N]`` of the last instances for the first, one gradient at a time."""

    def gradient(i: int) -> Tensor:
        loss = F.cross_entropy(network(X[i : i + 1]), LABELS[i : i + 1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    ours, theirs = ([gradient(i) for i in some] for some in (range(24 - test, 24), range(train)))
    return torch.stack([torch.stack([a @ b for b in theirs]) for a in ours])


@pytest.mark.parametrize("train", [3, 4, 12])  # as many instances as outputs, too
@pytest.mark.parametrize("slopes", [1, 6])
@pytest.mark.parametrize("module", [False, True])
def test_prelu_has_each_instance_s_own_gradients(train: int, slopes: int, module: bool) -> None:
    torch.manual_seed(0)
    network: nn.Module = Sloped(slopes)
    if module:
        network = nn.Sequential(nn.Linear(4, 6), nn.PReLU(slopes), nn.Linear(6, 3))
    network = network.double()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    torch.testing.assert_close(model.network(X), network(X).detach(), rtol=0, atol=0)
    data = ((X[:train], LABELS[:train]), (X[21:], LABELS[21:]))
    scores = fimo.attribute(model, *data, "graddot")
    torch.testing.assert_close(scores.values, by_hand(network, train, 3), rtol=1e-9, atol=1e-12)
    truth = fimo.further_train(model, *data, PROTOCOL, seeds=1, left_out=2)
    assert truth.raw.isfinite().all()


def pruned() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    prune.l1_unstructured(network[0], "weight", 0.4)
    return network


def normalised() -> nn.Module:
    first = nn.Linear(4, 6).double()
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(first)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3).double())


@pytest.mark.parametrize("make", [pruned, normalised])
def test_weights_that_hooks_compute_are_followed_through_all_copies(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = make()
    network(X).sum().backward()  # leaves what it computed in the modules
    network.zero_grad()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    data = ((X[:12], LABELS[:12]), (X[21:], LABELS[21:]))
    scores = fimo.attribute(model, *data, ["graddot", "ekfac"])
    torch.testing.assert_close(scores["graddot"].values, by_hand(network, 12, 3), rtol=1e-9, atol=1e-12)
    first = fimo.further_train(model, *data, PROTOCOL, seeds=1, left_out=2)
    again = fimo.further_train(model, *data, PROTOCOL, seeds=1, left_out=2)  # its copies were used
    assert torch.equal(first.raw, again.raw)
    assert first.raw.abs().max() > 0


class Locked(nn.Linear):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot pickle '_io.TextIOWrapper' object")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: torch.jit.script(nn.Linear(4, 3)),
            "expected no ScriptModule but it is one; pass",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 3), torch.ones(1, 4))),
            "expected no ScriptModule but it holds one, 1; pass",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight, 0.bias have no values yet: call it on a batch"),
        (lambda: nn.Sequential(Locked(4, 3)), "can't be copied: cannot pickle"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_networks_that_can_t_be_copied_or_vectorised_are_refused(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=rf"^model\.network: {said}"):
        FinalModel(make(), "cross_entropy")


class Narrow(nn.Module):
    """Casts to one type inside, whatever its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


def test_a_network_that_does_not_run_in_a_type_of_the_protocol_is_refused_with_its_key() -> None:
    model = FinalModel(Narrow(), "cross_entropy", accept_poor=True)
    data = ((X[:12].float(), LABELS[:12]), (X[21:].float(), LABELS[21:]))
    narrow = fimo.Protocol(lr=0.05, batch_size=4, epochs=1, evaluation_dtype="float32")
    assert fimo.further_train(model, *data, narrow, seeds=1, left_out=2).raw.isfinite().all()
    for protocol, key in (
        (fimo.Protocol(lr=0.05, batch_size=4, epochs=1), "evaluation_dtype"),
        (fimo.Protocol(lr=0.05, batch_size=4, epochs=1, dtype="float64"), "dtype"),
    ):
        with pytest.raises(InputError, match=rf"^further_training\.{key}: the network does not run"):
            fimo.further_train(model, *data, protocol, seeds=1, left_out=2)


def test_replicas_run_one_by_one_where_torch_func_gives_other_gradients(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = FinalModel(Sloped(1).double(), "cross_entropy", accept_poor=True)
    train = fimo.Instances(X, LABELS)
    mode = TrainMode.of(model, train)
    assert choose_engine(model, train, mode) == "functional"
    together = FunctionalNetwork._together

    def wrong(self, *given):  # type: ignore[no-untyped-def]
        return {n: g * (1.1 if n == "slope" else 1.0) for n, g in together(self, *given).items()}

    monkeypatch.setattr(FunctionalNetwork, "_together", wrong)
    with caplog.at_level(logging.WARNING):
        assert choose_engine(model, train, mode) == "loop"
    assert "torch.func gives other gradients" in caplog.text


class Encoder(nn.Module):
    def __init__(self, dropout: float, layer: bool = True) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 24)
        self.layer: nn.Module = nn.MultiheadAttention(4, 2, batch_first=True, dropout=dropout)
        if layer:
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=dropout)
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x).unflatten(1, (6, 4))
        x = self.layer(x) if isinstance(self.layer, nn.TransformerEncoderLayer) else self.layer(x, x, x)[0]
        return self.last(x.flatten(1))


class Transposed(nn.Module):
    """Dropout of values that are not in memory in the order of their axes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x.unflatten(1, (3, 4)).transpose(1, 2)).square()


class Bag(nn.Module):
    def __init__(self, **settings) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(9, 4, **settings), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.bag((3 * x.abs()).long().clamp(max=8))))


class Far(nn.Module):
    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.centres, self.last, self.squared = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3), squared

    def forward(self, x: Tensor) -> Tensor:
        if self.squared:
            return self.last((x[:, None] - self.centres).square().sum(2))
        return self.last(torch.cdist(x, self.centres))


def sampled(x: Tensor) -> Tensor:
    """Return values of an image between pixels."""
    return F.grid_sample(
        x.view(-1, 1, 2, 2), torch.tanh(x[:, None, :, None] * x[:, None, None, :2]), align_corners=False
    ).flatten(1)


class Squared(torch.autograd.Function):
    """A function in the old form, without ``setup_context``."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return 2 * ctx.saved_tensors[0] * gradient


class OfSquares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Squared.apply(self.first(x)))


class Sampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(sampled(self.first(x)))


UNDERIVABLE = {
    "encoder": lambda: Encoder(0.0),
    "encoder with dropout": lambda: Encoder(0.1),
    "attention": lambda: Encoder(0.0, layer=False),
    "attention with dropout": lambda: Encoder(0.1, layer=False),
    "hard sigmoid": lambda: nn.Sequential(nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 3)),
    "bag": Bag,
    "sum of a bag": lambda: Bag(mode="sum"),
    "largest of a bag": lambda: Bag(mode="max"),
    "bag with padding": lambda: Bag(padding_idx=0),
    "largest of a bag with padding": lambda: Bag(padding_idx=0, mode="max"),
    "transposed": lambda: nn.Sequential(nn.Linear(4, 12), Transposed(), nn.Flatten(), nn.Linear(12, 3)),
    "grid": Sampled,
}
"""Networks of operations that torch has no forward, or no second, derivative of in eval mode."""


def _twice_derivable(function) -> bool:  # type: ignore[no-untyped-def]
    x = X[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), x)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", UNDERIVABLE)
def test_what_torch_has_no_second_derivative_of_is_followed(name: str) -> None:
    if name == "grid" and not _twice_derivable(sampled):
        pytest.skip("this version of torch has no second derivative of grid_sample")
    torch.manual_seed(0)
    network = UNDERIVABLE[name]().double().eval()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    torch.testing.assert_close(model.outputs(fimo.Instances(X, LABELS)), network(X).detach())
    train, test = fimo.Instances(X[:10], LABELS[:10]), fimo.Instances(X[21:], LABELS[21:])
    protocol = fimo.Protocol(lr=0.05, momentum=0.5, batch_size=4, epochs=1, leave_out="mask", dtype="float64")
    found = tangent_outputs(model, train, test, protocol, 1, [0, 3], chunk=2)
    ends = [
        [plain_run(model, train, test, protocol, 1, [i], weight=1 + h)[0] for h in (1e-4, -1e-4)]
        for i in (0, 3)
    ]
    expected = torch.stack([(up - down) / 2e-4 for up, down in ends], -1)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.loss_derivative, expected, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(
        adjoint(model, train, test, protocol, 1)[..., [0, 3]], expected, rtol=0, atol=1e-6 * scale
    )
    run = fimo.further_train(model, train, test, protocol, seeds=[1], left_out=2)
    own = model.loss(found.outputs[-1], LABELS[21:])  # along the same run, with the same masks
    torch.testing.assert_close(run.full_losses[0, -1], own)
    assert fimo.attribute(model, train, test, "unlearning", further_training=protocol).values.isfinite().all()


def test_bags_of_given_lengths_and_weights_are_left_to_torch() -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(9, 4, mode="sum").double()
    index, weights = torch.arange(8).view(4, 2), torch.rand(4, 2, dtype=torch.float64)
    plain = copied(bag)
    torch.testing.assert_close(plain(index), bag(index))
    torch.testing.assert_close(plain(index, None, weights), bag(index, None, weights))
    offsets = torch.tensor([0, 3])
    torch.testing.assert_close(plain(index.flatten(), offsets), bag(index.flatten(), offsets))


@pytest.mark.parametrize(
    ("make", "said"), [(lambda: Far(squared=False), "cdist"), (OfSquares, "setup_context")]
)
def test_operations_without_second_derivatives_are_named(make, said: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    data = (fimo.Instances(X[:20], LABELS[:20]), fimo.Instances(X[20:], LABELS[20:]))
    model = FinalModel(make().double(), "cross_entropy", accept_poor=True)
    for run in (
        lambda: fimo.audit(model, *data, PROTOCOL, top=2),
        lambda: fimo.attribute(model, *data, "bif"),
    ):
        with pytest.raises(
            InputError, match=rf"^model\.network: directional derivatives are needed here: .*{said}"
        ):
            run()
    with pytest.raises(InputError, match=rf"unrolled does not apply here: .*{said}"):
        fimo.attribute(model, *data, "unrolled", further_training=PROTOCOL)
    assert fimo.attribute(model, *data, "response", further_training=PROTOCOL).values.isfinite().all()
    other = FinalModel(Far(squared=True).double(), "cross_entropy", accept_poor=True)
    assert fimo.attribute(other, *data, "bif").values.isfinite().all()


def test_fused_attention_is_as_it_was_afterwards() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with plain_attention(), plain_attention():
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert before == (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())
    assert before == (True, True)


def test_replicas_with_dropout_of_transposed_values_advance_together() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), Transposed(), nn.Flatten(), nn.Linear(12, 3)).double()
    model = FinalModel(network, "cross_entropy", accept_poor=True)
    train = fimo.Instances(X, LABELS)
    assert choose_engine(model, train, TrainMode.of(model, train)) == "functional"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    data = (
        (100 * X[:20], 300 * X[:20, 0]),
        (100 * X[20:], 300 * X[20:, 0]),
    )  # products beyond float16's range
    model, same = (FinalModel(n, "mse", accept_poor=True) for n in (network, copied(network).float()))
    assert next(network.parameters()).dtype == dtype  # the user's own
    protocol = fimo.Protocol(lr=1e-7, batch_size=4, epochs=1)
    for name in ("graddot", "datainf", "bif", "unlearning"):
        found, expected = (
            fimo.attribute(m, *data, name, further_training=protocol).values for m in (model, same)
        )
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert found.isfinite().all()
    table = fimo.audit(model, *data, protocol, top=2).rows
    pd.testing.assert_frame_equal(table, fimo.audit(same, *data, protocol, top=2).rows)


class Elsewhere(nn.Module):
    """Layers that are left out now and then, by numbers that are not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 5), nn.Linear(5, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(0.5 * h if self.training and self.draw() < 0.1 else h)


@pytest.mark.parametrize(
    ("draw", "whose"), [(random.random, "Python's random"), (lambda: np.random.rand(), "NumPy's random")]
)
def test_random_numbers_that_no_seed_sets_are_refused(draw: Callable[[], float], whose: str) -> None:
    data = Instances(torch.randn(12, 4), torch.randn(12, 1))
    model = FinalModel(Elsewhere(draw), "mse", accept_poor=True)
    random.seed(0)
    np.random.seed(0)
    with pytest.raises(InputError, match=f"draws random numbers from {whose}"):
        TrainMode.of(model, data)
    expected = random.Random(0).random(), np.random.RandomState(0).rand()
    assert (random.random(), np.random.rand()) == expected  # generators are put back
