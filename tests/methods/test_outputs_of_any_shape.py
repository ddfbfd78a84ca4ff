"""Every method against dense references where outputs have more axes than one, under losses of a user's own.

Nothing of the references is shared with the package but the random numbers of TRAK's projection: Jacobians of
the flattened outputs by ``torch.func``, the loss's Hessian in them by autograd, dense solves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimo.curvature.jacobian import DenseRows
from fimo.curvature.projection import project
from fimo.data.instances import IGNORED, Instances
from fimo.further_training import Protocol, further_train
from fimo.methods.arnoldi import Arnoldi
from fimo.methods.cg import ConjugateGradients
from fimo.methods.datainf import DataInf
from fimo.methods.ekfac import Ekfac
from fimo.methods.embedding import EmbeddingSimilarity
from fimo.methods.exact import ExactInfluence
from fimo.methods.gradcos import GradCos
from fimo.methods.graddot import GradDot
from fimo.methods.kfac import Kfac
from fimo.methods.lissa import Lissa, LissaHessian
from fimo.methods.representer import Representer
from fimo.methods.response import Response
from fimo.methods.source import Source
from fimo.methods.tracin import TracIn
from fimo.methods.trak import Trak
from fimo.methods.unrolled import Unrolled
from fimo.models.final_model import FinalModel, functional_apply
from fimo.models.losses import language_modelling
from tests.cases import Case
from tests.methods.test_response import following
from tests.reference.further_training import plain_sensitivity

TRAIN, TEST = 9, 4


class AtEachPosition(nn.Module):
    """The same layers at each position, so that parameters are shared: ``[n, T, d] -> [n, T, D]``."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tokens(nn.Module):
    """Classes of each token that depend on the one before: ``[n, T] -> [n, T, V]``."""

    def __init__(self, vocabulary: int, width: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix, self.head = nn.Linear(2 * width, 4), nn.Linear(4, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.head(torch.tanh(self.mix(torch.cat([h, h.roll(1, 1)], -1))))


def weighted_log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions with weights that grow, of outputs ``[n, T, D]`` and nothing else."""
    t = outputs.shape[1]
    weight = torch.arange(1, t + 1, dtype=outputs.dtype)[:, None]
    return ((outputs - targets).cosh().log() * weight).sum((1, 2)) / t


def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    """A Hessian that isn't one of single positions: of running sums, and of their largest."""
    sums = (outputs - targets).cumsum(1)
    return sums.square().mean((1, 2)) + outputs.flatten(1).logsumexp(1)


def not_convex(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cauchy's loss, curved downwards where errors are beyond one."""
    return (outputs - targets).square().log1p().flatten(1).sum(1)


def over_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the tokens that are chosen by a mask, whose number differs between instances."""
    kept = targets != IGNORED
    losses = F.cross_entropy(outputs[kept], targets[kept], reduction="none")
    return outputs.new_zeros(len(outputs)).index_add(0, kept.nonzero()[:, 0], losses) / 3


def regression(loss: Any, positions: int = 3, sequential: bool = False) -> Case:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TRAIN + TEST, positions, 3, generator=generator, dtype=torch.float64)
    y = 1.5 * torch.randn(TRAIN + TEST, positions, 2, generator=generator, dtype=torch.float64)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    network = layers if sequential else AtEachPosition(layers)
    data = Instances(x, y)
    return Case("", FinalModel(network, loss, accept_poor=True), data[:TRAIN], data[TRAIN:])


def tokens(loss: Any, vocabulary: int = 5, length: int = 4) -> Case:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(vocabulary, (TRAIN + TEST, length), generator=generator)
    y = torch.randint(vocabulary, (TRAIN + TEST, length), generator=generator)
    y[1, 2:] = y[4, 0] = IGNORED
    network = Tokens(vocabulary).double()
    data = Instances(x, y)
    return Case("", FinalModel(network, loss, accept_poor=True), data[:TRAIN], data[TRAIN:])


MAKERS: dict[str, Callable[[], Case]] = {
    "log cosh": lambda: regression(weighted_log_cosh),
    "coupled": lambda: regression(coupled),
    "not convex": lambda: regression(not_convex),
    "one position": lambda: regression(weighted_log_cosh, 1, sequential=True),
    "language": lambda: tokens(language_modelling),
    "own tokens": lambda: tokens(over_tokens),
    "many outputs": lambda: tokens(over_tokens, 11, 6),  # products go through the network
    "language, many": lambda: tokens(language_modelling, 11, 6),
    "not convex, many": lambda: regression(not_convex, 35),
}


def case_of(name: str) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[name]()


# dense references


class Dense:
    """Jacobians, gradients and Hessians of one case, in full."""

    def __init__(self, case: Case, model: FinalModel | None = None) -> None:
        self.model, self.case = model or case.final_model, case
        self.shapes = {name: p.shape for name, p in self.model.parameters().items()}
        self.at = torch.cat([p.flatten() for p in self.model.parameters().values()])
        self.test, self.train = self.gradients(case.test), self.gradients(case.train)

    def outputs(self, flat: Tensor, instances: Instances) -> Tensor:
        parts = flat.split([s.numel() for s in self.shapes.values()])
        named = {name: part.view(s) for (name, s), part in zip(self.shapes.items(), parts, strict=True)}
        return functional_apply(self.model.network, named, instances.inputs)

    def jacobians(self, instances: Instances) -> Tensor:
        """``[n, D, P]`` of the flattened outputs."""
        return torch.func.jacrev(lambda flat: self.outputs(flat, instances).flatten(1))(self.at)

    def gradients(self, instances: Instances) -> Tensor:
        flat = self.at.clone().requires_grad_()
        losses = self.model.loss(self.outputs(flat, instances), instances.targets)
        return torch.stack([torch.autograd.grad(v, flat, retain_graph=True)[0] for v in losses])

    def output_hessians(self, instances: Instances) -> Tensor:
        """``[n, D, D]``; of a loss that is not convex, the part of positive curvature."""
        outputs, found = self.outputs(self.at, instances).detach(), []
        for i in range(len(instances)):
            target = instances.targets[i : i + 1]

            def one(o: Tensor, shape: Any = outputs[i : i + 1].shape, target: Tensor = target) -> Tensor:
                return self.model.loss(o.view(shape), target)[0]

            values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(one, outputs[i].flatten()))
            found.append((vectors * values.clamp(min=0)) @ vectors.T)
        return torch.stack(found)

    def gauss_newton(self) -> Tensor:
        j, h = self.jacobians(self.case.train), self.output_hessians(self.case.train)
        return torch.einsum("ndp,nde,neq->pq", j, h, j) / TRAIN

    def hessian(self) -> Tensor:
        def mean_loss(flat: Tensor) -> Tensor:
            return self.model.loss(self.outputs(flat, self.case.train), self.case.train.targets).mean()

        return torch.autograd.functional.hessian(mean_loss, self.at)

    def influence(self, curvature: Tensor, damping: float) -> Tensor:
        damped = curvature + damping * torch.eye(len(self.at), dtype=torch.float64)
        return self.test @ torch.linalg.solve(damped, self.train.T) / TRAIN


def mean_eigenvalue(matrix: Tensor) -> float:
    return matrix.trace().item() / len(matrix)


def scored(method: Any, case: Case) -> Tensor:
    assert method.inapplicable(case.final_model, case.train) is None
    found: Tensor = method.attribute(case.final_model, case.train, case.test).values
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_products_are_the_dense_ones(name: str) -> None:
    case, d = case_of(name), Dense(case_of(name))
    torch.testing.assert_close(scored(GradDot(), case), d.test @ d.train.T)
    cosines = F.normalize(d.test) @ F.normalize(d.train).T
    torch.testing.assert_close(scored(GradCos(), case), cosines)
    earlier = {k: 0.9 * v for k, v in case.final_model.state().items()}
    model = FinalModel(case.final_model.network, case.final_model.loss)
    model.network.load_state_dict(earlier)
    e = Dense(case, model)
    states = [earlier, case.final_model.state()]
    found = scored(TracIn(checkpoints=states, lr=[0.5, 0.1]), case)
    torch.testing.assert_close(found, 0.5 * e.test @ e.train.T + 0.1 * d.test @ d.train.T)


@pytest.mark.parametrize("name", MAKERS)
def test_gauss_newton_influence_is_the_dense_solve(name: str) -> None:
    case, d = case_of(name), Dense(case_of(name))
    matrix = d.gauss_newton()
    auto = 0.1 * mean_eigenvalue(matrix)
    relative = 3 * d.train.square().mean().item()
    for damping, value in (("auto", auto), ("3x", relative), (0.5, 0.5)):
        expected = d.influence(matrix, value)
        methods = [
            ExactInfluence(damping),
            ConjugateGradients(damping, tolerance=1e-11),
            Lissa(damping, tolerance=1e-10),
        ]
        for method in methods:
            torch.testing.assert_close(scored(method, case), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", MAKERS)
def test_of_outputs_taken_as_linear_the_loss_is_evaluated(name: str) -> None:
    case, d = case_of(name), Dense(case_of(name))
    damped = d.gauss_newton() + 0.5 * torch.eye(len(d.at), dtype=torch.float64)
    moved = torch.einsum("jdp,pi->jdi", d.jacobians(case.test), torch.linalg.solve(damped, d.train.T)) / TRAIN
    at, loss, targets = d.outputs(d.at, case.test), case.final_model.loss, case.test.targets
    expected = [loss(at + moved[:, :, i].view_as(at), targets) - loss(at, targets) for i in range(TRAIN)]
    found = scored(ExactInfluence(0.5, propagate="outputs"), case)
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_the_hessians_influence_is_the_dense_solve(name: str) -> None:
    case, d = case_of(name), Dense(case_of(name))
    matrix = d.hessian()
    damping = 1.0 + max(0.0, -2 * torch.linalg.eigvalsh(matrix)[0].item())
    found = scored(LissaHessian(damping, batch_size=None, tolerance=1e-10), case)
    torch.testing.assert_close(found, d.influence(matrix, damping), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", MAKERS)
def test_arnoldi_is_the_pseudo_inverse_on_the_leading_eigenvectors(name: str) -> None:
    case, d = case_of(name), Dense(case_of(name))
    values, vectors = torch.linalg.eigh(d.gauss_newton())
    values, vectors = values[-6:], vectors[:, -6:]
    expected = (d.test @ vectors / values) @ (d.train @ vectors).T / TRAIN
    found = scored(Arnoldi(rank=6, iterations=200), case)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("grouping", ["parameter", "module"])
@pytest.mark.parametrize("name", MAKERS)
def test_datainf_is_the_mean_of_each_layers_rank_one_inverses(name: str, grouping: Any) -> None:
    case, d = case_of(name), Dense(case_of(name))
    groups: dict[str, list[int]] = {}
    start = 0
    for parameter, shape in d.shapes.items():
        key = parameter if grouping == "parameter" else parameter.rpartition(".")[0]
        groups.setdefault(key, []).extend(range(start, start + shape.numel()))
        start += shape.numel()
    expected = torch.zeros(TEST, TRAIN, dtype=torch.float64)
    for columns in groups.values():
        test, train = d.test[:, columns], d.train[:, columns]
        damping = 0.1 * train.square().mean()
        eye = torch.eye(len(columns), dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(g, g) + damping * eye) for g in train]).mean(0)
        expected += test @ inverse @ train.T / TRAIN
    torch.testing.assert_close(scored(DataInf(layers=grouping), case), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_trak_is_a_regression_on_projected_gradients_of_the_loss(name: str) -> None:
    case, d = case_of(name), Dense(case_of(name))
    for k in (6, 40):  # fewer and more than instances
        unit = DenseRows(torch.eye(len(d.at), dtype=torch.float64)[:, None], d.shapes)
        projection = project(unit, k, "normal", seed=3)[:, 0]
        features, ours = d.train @ projection, d.test @ projection
        matrix = features.T @ features / TRAIN
        for damping, value in (("auto", 0.1 * mean_eigenvalue(matrix)), (0.5, 0.5)):
            damped = matrix + value * torch.eye(k, dtype=torch.float64)
            expected = ours @ torch.linalg.solve(damped, features.T) / TRAIN
            torch.testing.assert_close(scored(Trak(k, damping, "normal", seed=3), case), expected)


class Layers:
    """Explicit Kronecker factors of the linear layers and embeddings, from a rerun of each layer's rest."""

    def __init__(self, d: Dense) -> None:
        self.d, case = d, d.case
        network, hessians = d.model.network, d.output_hessians(case.train)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        counts = torch.ones(case.train.targets.shape[:2], dtype=torch.bool)
        if case.final_model.loss is language_modelling:  # nothing is predicted after a text's last token
            counts = (case.train.targets != IGNORED).flip(1).cummax(1).values.flip(1)
        for name, module in network.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            inputs: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, i, o, inputs=inputs: inputs.append(i[0]))
            functional_apply(network, dict(network.named_parameters()), case.train.inputs)
            handle.remove()
            if isinstance(module, nn.Embedding):
                entering = F.one_hot(inputs[0][counts], module.num_embeddings).double()
            else:
                flat = inputs[0][counts]
                entering = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
            a = entering.T @ entering / len(entering)
            width = module.weight.shape[0] if isinstance(module, nn.Linear) else module.embedding_dim
            b = torch.zeros(width, width, dtype=torch.float64)
            for i in range(TRAIN):
                j = self._after(module, case.train[i : i + 1])  # [D, T, out]
                b += torch.einsum("dto,de,etp->op", j, hessians[i], j) / TRAIN
            self.factors[name] = (a, b)

    def _after(self, module: nn.Module, one: Instances) -> Tensor:
        """``[D, T, out]``: derivatives of the outputs in what the module gives."""

        def moved(shift: Tensor) -> Tensor:
            handle = module.register_forward_hook(lambda m, i, o: o + shift)
            try:
                return functional_apply(self.d.model.network, {}, one.inputs)[0].flatten()
            finally:
                handle.remove()

        sizes: list[Any] = []
        handle = module.register_forward_hook(lambda m, i, o: sizes.append(o.shape))
        functional_apply(self.d.model.network, {}, one.inputs)
        handle.remove()
        return torch.autograd.functional.jacobian(moved, torch.zeros(sizes[0], dtype=torch.float64))[:, 0]

    def blocks(self) -> dict[str, tuple[list[int], Tensor, Tensor]]:
        """By module: positions in the flat parameters of its matrix [W, b], row by row, and its factors."""
        found, start, places = {}, 0, {}
        for name, shape in self.d.shapes.items():
            places[name] = torch.arange(start, start + shape.numel()).view(shape)
            start += shape.numel()
        for name, (a, b) in self.factors.items():
            matrix = places[f"{name}.weight"]
            if f"{name}.bias" in places:
                matrix = torch.cat([matrix, places[f"{name}.bias"][:, None]], 1)
            else:  # an embedding's is [tokens, width]
                matrix = matrix.T
            found[name] = (matrix.flatten().tolist(), a, b)
        return found


@pytest.mark.parametrize("damping", ["auto", 0.5])
@pytest.mark.parametrize("kind", [Kfac, Ekfac])
@pytest.mark.parametrize("name", MAKERS)
def test_kfac_and_ekfac_are_their_explicit_kronecker_products(name: str, kind: Any, damping: Any) -> None:
    case, d = case_of(name), Dense(case_of(name))
    matrix, expected = d.gauss_newton(), torch.zeros(TEST, TRAIN, dtype=torch.float64)
    blocks = Layers(d).blocks()
    assert sum(len(where) for where, _, _ in blocks.values()) == len(d.at)
    for where, a, b in blocks.values():
        curvature = torch.kron(b, a)
        if kind is Ekfac:
            vectors = torch.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
            own = matrix[where][:, where]
            curvature = vectors @ torch.diag(torch.diag(vectors.T @ own @ vectors)) @ vectors.T
        value = 0.1 * mean_eigenvalue(curvature) if damping == "auto" else damping
        damped = curvature + value * torch.eye(len(where), dtype=torch.float64)
        expected += d.test[:, where] @ torch.linalg.solve(damped, d.train[:, where].T) / TRAIN
    torch.testing.assert_close(scored(kind(damping, fisher="exact"), case), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", MAKERS)
def test_source_is_the_product_of_exponentials(name: str) -> None:
    case = case_of(name)
    protocol = Protocol(lr=0.02, batch_size=3, epochs=2, dtype="float64")
    ft = following(case, protocol)
    found = Source(segments=2).attribute(case.final_model, case.train, case.test, None, ft).values
    runs = list(ft.full_runs())

    def at(points: list[int]) -> Dense:
        state = case.final_model.state()
        for parameter in case.final_model.parameters():
            state[parameter] = torch.stack([r.parameters[k][parameter] for r in runs for k in points]).mean(0)
        model = FinalModel(case.final_model.network, case.final_model.loss)
        model.network.load_state_dict(state)
        return Dense(case, model)

    vector, expected = at([2]).test, torch.zeros(TEST, TRAIN, dtype=torch.float64)
    for points in ([1, 2], [0, 1]):
        d, tau = at(points), 3 * 0.02
        values, vectors = torch.linalg.eigh(d.gauss_newton())
        phi = torch.where(values > 1e-9, -torch.expm1(-tau * values) / values.clamp(min=1e-9), tau)
        expected += vector @ (vectors * phi) @ vectors.T @ d.train.T / TRAIN
        vector = vector @ (vectors * (-tau * values).exp()) @ vectors.T
    torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_embeddings_are_means_over_positions_that_count(name: str) -> None:
    case = case_of(name)
    network = case.final_model.network
    sides = []
    for part in (case.test, case.train):
        if isinstance(network, Tokens):
            h = network.embedding(part.inputs)
            h = torch.tanh(network.mix(torch.cat([h, h.roll(1, 1)], -1)))
            kept = (part.targets != IGNORED).double()[..., None]
            sides.append((h * kept).sum(1) / kept.sum(1).clamp(min=1))
        else:
            layers = network.layers if isinstance(network, AtEachPosition) else network
            sides.append(layers[:2](part.inputs).mean(1))  # type: ignore[index,operator]
    found = scored(EmbeddingSimilarity("dot"), case)
    torch.testing.assert_close(found, (sides[0] @ sides[1].T).detach())


@pytest.mark.parametrize("name", MAKERS)
def test_representers_of_positions_are_not_offered(name: str) -> None:
    case = case_of(name)
    assert "last linear layer" in str(Representer().inapplicable(case.final_model, case.train))


@pytest.mark.parametrize("name", MAKERS)
def test_further_training_is_the_plain_loop(name: str) -> None:
    case = case_of(name)
    protocol = Protocol(lr=0.05, batch_size=4, epochs=2, momentum=0.5, dtype="float64")
    data = (case.final_model, case.train, case.test, protocol, [0])
    found = further_train(*data, [[1], [4]])
    expected = plain_sensitivity(*data, [[1], [4]])
    torch.testing.assert_close(found.full_losses, expected["full_losses"])
    torch.testing.assert_close(found.raw.double(), expected["raw"], rtol=1e-7, atol=1e-7)  # kept in float32


@pytest.mark.parametrize("kind", [Response, Unrolled])
@pytest.mark.parametrize("name", MAKERS)
def test_after_a_small_step_methods_that_follow_it_are_gradient_products(name: str, kind: Any) -> None:
    case, d = case_of(name), Dense(case_of(name))
    protocol = Protocol(lr=1e-8, steps=1, batch_size=TRAIN, dtype="float64", leave_out="mask")
    ft = following(case, protocol, [0])
    found = kind(propagate="loss").attribute(case.final_model, case.train, case.test, None, ft).values
    torch.testing.assert_close(found[0] * TRAIN / 1e-8, d.test @ d.train.T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [Kfac, Ekfac])
def test_by_default_a_loss_whose_targets_cannot_be_drawn_has_its_exact_factors(kind: Any) -> None:
    case = case_of("own tokens")  # 20 outputs
    torch.testing.assert_close(scored(kind(), case), scored(kind(fisher="exact"), case))
    assert "targets" in str(kind(fisher="sampled").inapplicable(case.final_model, case.train))
    wide = case_of("many outputs")  # 66
    assert "fisher=empirical" in str(kind().inapplicable(wide.final_model, wide.train))
    assert scored(kind(fisher="empirical"), wide).isfinite().all()
    language = case_of("language, many")
    assert scored(kind(), language).isfinite().all()


def test_a_network_that_does_more_after_its_last_linear_layer_has_no_representers() -> None:
    x = torch.randn(TRAIN, 3, dtype=torch.float64)
    last, after = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.Softplus())
    for end, offered in ((last, True), (after, False)):
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), end).double()
        model, data = FinalModel(network, not_convex), Instances(x, x[:, :2])
        assert (Representer().inapplicable(model, data) is None) == offered
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), last).double()
    model, data = FinalModel(network, not_convex, accept_poor=True), Instances(x, x[:, :2])
    slope = 2 * (model.outputs(data) - data.targets)
    slope = slope / (1 + (model.outputs(data) - data.targets).square())
    hidden = network[:2](x).detach()
    expected = (slope @ slope.T) * (hidden @ hidden.T + 1) / (2 * 0.1 * TRAIN)
    torch.testing.assert_close(Representer(0.1).attribute(model, data, data).values, expected)


def test_a_value_to_predict_is_no_mark_of_what_to_ignore() -> None:
    case = regression(weighted_log_cosh)
    targets = case.train.targets[..., 0].clone()
    targets[0, 1] = float(IGNORED)

    def first(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[..., 0] - targets).square().sum(1)

    model, data = FinalModel(case.final_model.network, first), Instances(case.train.inputs, targets)
    hidden = case.final_model.network.layers[:2](data.inputs).mean(1).detach()  # type: ignore[index,operator]
    found = EmbeddingSimilarity("dot").attribute(model, data, data).values
    torch.testing.assert_close(found, hidden @ hidden.T)
