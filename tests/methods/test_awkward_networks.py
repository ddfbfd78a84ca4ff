"""Networks and losses that derivatives stumble on, and methods against dense references on them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fimo
from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.operators import GaussNewton, Hessian
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.further_training import Protocol, further_train
from fimo.methods.cg import ConjugateGradients, gauss_newton_trace
from fimo.methods.datainf import DataInf
from fimo.methods.exact import ExactInfluence
from fimo.methods.lissa import Lissa, LissaHessian
from fimo.models.final_model import FinalModel
from fimo.models.losses import Loss, cross_entropy, mean_squared_error
from tests.cases import CASES, Case
from tests.methods.test_methods import METHODS, build
from tests.reference import attribution as dense
from tests.reference.further_training import plain_sensitivity


class Scaled(nn.Module):
    """A learned scale without dimensions, as CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.scale


class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x).sum(1)))


def normalised(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), norm(nn.Linear(4, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "scalar parameter": Scaled,
    "sparse embedding": SparseEmbedding,
    "weight norm": lambda: normalised(torch.nn.utils.parametrizations.weight_norm),
    "weight norm by hooks": lambda: normalised(torch.nn.utils.weight_norm),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")


def case_of(name: str) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name]().double()
        x = torch.randn(18, 5).double()
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        inputs = torch.randint(7, (18, 4)) if name == "sparse embedding" else x
    whole = Instances(inputs, y)
    return Case(name, FinalModel(network, cross_entropy), whole[:13], whole[13:])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_awkward_networks(method: str, name: str) -> None:
    case = case_of(name)
    if (method, name) == ("representer", "scalar parameter"):  # its outputs are tanh of a linear layer's
        assert "last linear layer" in str(build(method).inapplicable(case.final_model, case.train))
        return
    changes = {"damping": "auto"} if method == "lissa_h" else {}
    scores = build(method, **changes).attribute(case.final_model, case.train, case.test).values
    assert scores.isfinite().all()
    assert scores.abs().max() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_awkward_networks_are_those_of_finite_differences(name: str) -> None:
    case = case_of(name)
    rows = InstanceGradients(case.final_model).losses(case.train).dense()[:, 0]
    at, step = dense.flat_parameters(case.final_model), 1e-5

    def losses(flat: Tensor) -> Tensor:
        outputs = dense.outputs_of(case.final_model, flat, case.train)
        return cross_entropy(outputs, case.train.targets)

    units = step * torch.eye(len(at), dtype=at.dtype)
    found = torch.stack([(losses(at + u) - losses(at - u)) / (2 * step) for u in units], 1)
    torch.testing.assert_close(rows, found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["scalar parameter", "weight norm", "weight norm by hooks"])
def test_products_with_curvature_are_those_of_finite_differences_and_of_the_dense_matrix(name: str) -> None:
    case = case_of(name)
    data, at, step = (case.final_model, case.train), dense.flat_parameters(case.final_model), 1e-5

    def gradient(flat: Tensor) -> Tensor:
        free = flat.requires_grad_()
        outputs = dense.outputs_of(case.final_model, free, case.train)
        return torch.autograd.grad(cross_entropy(outputs, case.train.targets).mean(), free)[0]

    units = step * torch.eye(len(at), dtype=at.dtype)
    found = torch.stack([(gradient(at + u) - gradient(at - u)) / (2 * step) for u in units], 1)
    torch.testing.assert_close(Hessian(*data).dense(), found, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(GaussNewton(*data).dense(), dense.gauss_newton(*data), rtol=1e-8, atol=1e-10)


def test_the_hessians_influence_with_weight_normalisation_is_the_dense_solve() -> None:
    case = case_of("weight norm")
    found = (
        LissaHessian(damping=5.0, tolerance=1e-10).attribute(case.final_model, case.train, case.test).values
    )
    expected = dense.influence(case, dense.hessian(case.final_model, case.train), 5.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_further_training_of_a_sparse_embedding_equals_the_plain_loop() -> None:
    case = case_of("sparse embedding")
    protocol = Protocol(lr=0.1, batch_size=4, epochs=2, momentum=0.9, dtype="float64")
    data = (case.final_model, case.train, case.test, protocol, [0])
    found = further_train(*data, [[1], [4]])
    expected = plain_sensitivity(*data, [[1], [4]])
    torch.testing.assert_close(found.full_losses, expected["full_losses"])
    torch.testing.assert_close(found.raw.double(), expected["raw"], rtol=0, atol=1e-7)
    network = SparseEmbedding()
    FinalModel(network, cross_entropy)
    assert network.embedding.sparse, "the user's own stays as it is"


def test_a_network_that_was_just_trained_with_weight_normalisation_can_be_a_final_model() -> None:
    network = normalised(torch.nn.utils.weight_norm)
    x = torch.randn(3, 5)
    expected = network(x)
    expected.sum().backward()
    model = FinalModel(network, cross_entropy)
    torch.testing.assert_close(model.network(x), expected)
    assert network[0].weight.grad_fn is not None


WITHOUT_GRADIENTS = ("random", "embedding", "knn_shapley")


def without_curvature(kind: str) -> tuple[FinalModel, Instances]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(24, 5)
        if kind == "perfect fit":
            network = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
            return FinalModel(network, mean_squared_error), Instances(x, network(x).detach())
        one: nn.Module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
        if kind == "one class, any network":
            one = nn.Sequential(one, nn.Softplus())
        return FinalModel(one, cross_entropy), Instances(x, torch.zeros(24, dtype=torch.int64))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WITHOUT_GRADIENTS])
@pytest.mark.parametrize("kind", ["perfect fit", "one class", "one class, any network"])
def test_without_gradients_scores_are_zero_whatever_the_curvature(kind: str, method: str) -> None:
    model, data = without_curvature(kind)
    if (method, kind) == ("representer", "one class, any network"):  # an activation follows its last layer
        assert "last linear layer" in str(build(method).inapplicable(model, data))
        return
    for changes in ({}, {"damping": "auto"}) if "lissa" in method else ({},):
        scores = build(method, **changes).attribute(model, data[:18], data[18:]).values
        assert torch.equal(scores, torch.zeros(6, 18))


def linear_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1).sum(1) * targets


@pytest.mark.parametrize("method", ["exact", "cg", "lissa"])
def test_a_loss_without_curvature_is_damped_by_a_number_or_refused(method: str) -> None:
    network = nn.Linear(5, 1).double()
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)).double()
    model, data = FinalModel(network, linear_loss), Instances(x, x[:, 0].sign())
    with pytest.raises(InputError, match=r"damping: auto is 0.1 times the curvature's mean eigenvalue"):
        build(method, damping="auto").attribute(model, data[:18], data[18:])
    found = build(method, damping=0.5).attribute(model, data[:18], data[18:]).values
    expected = dense.influence(Case("", model, data[:18], data[18:]), torch.zeros(6, 6).double(), 0.5)
    torch.testing.assert_close(found, expected)


def many_outputs(loss: Loss = cross_entropy) -> Case:
    """70 classes: more than rows are kept for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 70)).double(), torch.randn(9, 3)
        whole = Instances(x.double(), torch.randint(70, (9,)))
    return Case("many", FinalModel(network, loss), whole[:6], whole[6:])


@pytest.mark.parametrize("method", [ConjugateGradients, Lissa])
def test_automatic_damping_is_exact_above_64_outputs(method: type) -> None:
    case = many_outputs()
    found = method(damping="auto", tolerance=1e-10).attribute(case.final_model, case.train, case.test).values
    exact = ExactInfluence(damping="auto").attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)


def test_a_trace_that_is_estimated_is_logged_with_its_error(caplog: pytest.LogCaptureFixture) -> None:
    case = many_outputs()
    gradients = InstanceGradients(case.final_model, memory_mb=1e-3)  # not even one instance's rows
    with caplog.at_level(logging.INFO):
        found = gauss_newton_trace(gradients, case.train, GaussNewton(case.final_model, case.train))
    true = dense.gauss_newton(case.final_model, case.train).trace().item()
    assert "with a standard error of" in caplog.text
    error = float(caplog.text.split("standard error of ")[1].split()[0])
    assert 0 < abs(found - true) < 4 * error


def test_an_object_keeps_its_batches_from_one_fit_to_the_next() -> None:
    case = CASES["mlp_regression"]()
    once = Lissa(damping=1.0, batch_size=8, depth=20)
    again = copy.copy(once)
    again.attribute(case.final_model, case.train[:8], case.test)  # all instances: one batch
    data = (case.final_model, case.train, case.test)
    assert torch.equal(once.attribute(*data).values, again.attribute(*data).values)


class Attention(nn.Module):
    """One head, with keys of their own, whose bias softmax cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.query, self.key = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.value, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 6**0.5, -1)
        return self.head(torch.tanh(weights @ self.value(x)).mean(1))


@pytest.mark.parametrize("damping", ["auto", "1x"])
def test_a_parameter_without_gradient_but_for_rounding_adds_nothing_to_datainf(damping: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, tokens, labels = Attention(), torch.randint(9, (30, 7)), torch.randint(3, (30,))
    whole = Instances(tokens, labels)
    others = tuple(n for n, _ in network.named_parameters() if n != "key.bias")

    def scores(trainable: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        model = FinalModel(copy.deepcopy(network).to(dtype), cross_entropy, trainable=trainable)
        return DataInf(damping=damping).attribute(model, whole[:22], whole[22:]).values.double()

    expected = scores(others, torch.float64)
    for dtype in (torch.float32, torch.float64):
        tolerance = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(scores((), dtype), expected, rtol=0, atol=tolerance)


def test_layers_with_gradients_of_any_usual_size_are_damped_by_their_own() -> None:
    """The floor is for rounding errors: a layer with a thousandth of the others' gradient is above it."""
    case = CASES["mlp_regression"]()
    first, *_ = case.final_model.parameters()

    class Shrunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(case.final_model.network)

        def forward(self, x: Tensor) -> Tensor:
            own = dict(self.inner.named_parameters())
            return torch.func.functional_call(self.inner, {first: own[first] * 1e-3}, (x,))

    network = Shrunk()
    network.inner.get_parameter(first).data *= 1e3
    model = FinalModel(network, mean_squared_error)
    found = DataInf().attribute(model, case.train, case.test).values
    # relative damping does not see the unit in which a parameter is measured
    torch.testing.assert_close(found, DataInf().attribute(case.final_model, case.train, case.test).values)


def margin_case(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[FinalModel, Instances, Instances]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    data = Instances(torch.randn(14, 4), torch.arange(14) % 3)
    return FinalModel(network, loss, accept_poor=True), data[:10], data[10:]


@pytest.mark.parametrize(
    "method", ["exact", "ekfac", "cg", "lissa", "lissa_h", "arnoldi", "response", "best", "source"]
)
@pytest.mark.parametrize("name", ["multi_margin_loss", "multilabel_margin_loss"])
def test_a_loss_without_a_second_derivative_is_refused_in_one_line(method: str, name: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if name == "multilabel_margin_loss":
            targets = nn.functional.pad(targets[:, None], (0, 2), value=-1)
        function: Callable[..., Tensor] = getattr(nn.functional, name)
        return function(outputs, targets, reduction="none")

    case = margin_case(loss)
    protocol = Protocol(lr=0.1, batch_size=5, epochs=1)
    with pytest.raises(InputError, match=rf"^model\.loss: the loss has no second .*{name}") as found:
        fimo.attribute(*case, method, further_training=protocol, seeds=1)
    assert "\n" not in str(found.value)
    for other in ("mirrored", "sketched", "datainf", "trak", "logra", "tracin", "less", "graddot", "gradcos"):
        assert other in str(found.value)
        assert fimo.attribute(*case, other, further_training=protocol, seeds=1).values.isfinite().all()


class TwoTypes(nn.Module):
    """A layer in float32 and one in float64."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5).to(first), nn.Linear(5, 3).to(second)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.second(inside.to(self.second.weight.dtype))


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_layers_of_two_types_have_the_scores_of_one_in_float64(
    method: str, rescaled: bool, types: tuple[torch.dtype, torch.dtype]
) -> None:
    _, train, test = margin_case(nn.functional.multi_margin_loss)
    found, expected = (
        fimo.attribute(
            FinalModel(network, cross_entropy, accept_poor=True),
            train,
            test,
            method,
            damping=1.0,
            rescaled=rescaled,
        ).values.double()
        for network in (TwoTypes(*types), TwoTypes(*types).double())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
