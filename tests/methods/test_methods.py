"""Claims that hold for every method, and each simple method against its closed form."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fimo.api import followed
from fimo.curvature.gradients import InstanceGradients
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.base import AttributionMethod
from fimo.methods.damping import Damping, training_time
from fimo.methods.datainf import DataInf
from fimo.methods.embedding import EmbeddingSimilarity
from fimo.methods.exact import ExactInfluence
from fimo.methods.gradcos import GradCos
from fimo.methods.graddot import GradDot
from fimo.methods.random import RandomScores
from fimo.methods.tracin import TracIn
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, language_modelling, mean_squared_error
from tests.cases import CASES, LINEAR_CASES
from tests.reference import attribution as dense

CONF = Path(__file__).parents[2] / "conf" / "method"
METHODS = [
    *[
        "graddot",
        "gradcos",
        "tracin",
        "datainf",
        "exact",
        "cg",
        "lissa",
        "lissa_h",
        "ekfac",
        "kfac",
        "arnoldi",
    ],
    *["trak", "representer", "random", "embedding", "knn_shapley", "less", "logra"],
]

# iterations stop at a tolerance, which order and blocks of instances reach at different steps; there is no
# further training here that a damping could be matched to
TIGHT: dict[str, dict[str, Any]] = {
    "exact": {"damping": "auto"},
    "cg": {"tolerance": 1e-11, "damping": "auto"},
    "lissa": {"tolerance": 1e-11, "damping": 1.0},
    "lissa_h": {"tolerance": 1e-8, "damping": 20.0, "batch_size": None},
}
SOLVERS = ["exact", "cg", "lissa", "lissa_h", "ekfac", "kfac"]


def build(name: str, **changes: Any) -> AttributionMethod:
    config = OmegaConf.load(CONF / f"{name}.yaml")[name]
    return instantiate({**config, **TIGHT.get(name, {}), **changes})  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_from_a_file_that_puts_it_under_methods(name: str) -> None:
    assert (CONF / f"{name}.yaml").read_text().startswith("# @package methods\n")
    assert isinstance(build(name), AttributionMethod)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_class_and_its_file_have_the_same_defaults(path: Path) -> None:
    ((name, config),) = OmegaConf.to_container(OmegaConf.load(path)).items()  # type: ignore[union-attr]
    signature = inspect.signature(get_class(config.pop("_target_")).__init__)
    defaults = {k: p.default for k, p in signature.parameters.items() if k != "self"}
    assert config == defaults, name


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_finite_and_in_the_order_of_the_instances(name: str, case_name: str) -> None:
    case = CASES[case_name]()
    method = build(name)
    scores = method.attribute(case.final_model, case.train, case.test).values
    assert scores.shape == (len(case.test), len(case.train))
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    if name == "random":
        return
    chosen = torch.tensor([7, 2, 11])
    some = build(name).attribute(case.final_model, case.train, case.test, chosen).values
    torch.testing.assert_close(some, scores[:, chosen])
    order = torch.randperm(len(case.train), generator=torch.Generator().manual_seed(0))
    shuffled = build(name).attribute(case.final_model, case.train[order], case.test).values
    torch.testing.assert_close(shuffled, scores[:, order])
    # the same object again gives the same: no damping is added in place
    torch.testing.assert_close(
        method.attribute(case.final_model, case.train, case.test).values, scores, rtol=0, atol=0
    )


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize(
    "name", ["graddot", "gradcos", "datainf", "exact", "cg", "lissa", "ekfac", "kfac", "arnoldi", "trak"]
)
def test_blocks_change_no_score(name: str, case_name: str, tmp_path: Path) -> None:
    case = CASES[case_name]()
    scores = build(name).attribute(case.final_model, case.train, case.test).values
    small = case.final_model.size * 8 * 3 / 2**20  # three gradients at once
    in_blocks = build(name, memory_mb=small).attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(in_blocks, scores)
    evaluations = []
    for _ in range(2):  # written, then read back
        method = build(name, memory_mb=small, cache=str(tmp_path))
        found = method.attribute(case.final_model, case.train, case.test)
        torch.testing.assert_close(found.values, scores)
        evaluations.append(found.gradient_evaluations)
    if case_name not in LINEAR_CASES:  # whose gradients are factored, and fit
        assert any(tmp_path.iterdir())
        assert evaluations[1] < evaluations[0]


@pytest.mark.parametrize("case_name", CASES)
def test_the_user_s_network_is_untouched(case_name: str) -> None:
    case = CASES[case_name]()
    network = copy.deepcopy(case.final_model.network).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    model = FinalModel(network, case.final_model.loss)
    for name in METHODS:
        build(name).attribute(model, case.train, case.test)
    assert network.training
    assert flags == [p.requires_grad for p in network.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("case_name", CASES)
def test_graddot_and_gradcos_are_the_inner_products_of_plain_gradients(case_name: str) -> None:
    case = CASES[case_name]()
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train)
    dot = GradDot().attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(dot, test @ train.T)
    cos = GradCos().attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(cos, nn.functional.normalize(test) @ nn.functional.normalize(train).T)


@pytest.mark.parametrize("case_name", CASES)
def test_datainf_is_the_mean_of_per_layer_inverses(case_name: str) -> None:
    case = CASES[case_name]()
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train)
    expected, start = torch.zeros(len(test), len(train)), 0
    for p in case.final_model.parameters().values():
        t, g = test[:, start : start + p.numel()], train[:, start : start + p.numel()]
        damping = 0.1 * g.square().mean()
        eye = torch.eye(p.numel(), dtype=g.dtype)
        inverse = torch.stack([torch.linalg.inv(x[:, None] * x + damping * eye) for x in g]).mean(0)
        expected = expected + t @ inverse @ g.T / len(g)
        start += p.numel()
    torch.testing.assert_close(DataInf().attribute(case.final_model, case.train, case.test).values, expected)


@pytest.mark.parametrize("case_name", ["mlp_regression", "transformer"])
def test_datainf_can_take_a_module_s_parameters_together(case_name: str) -> None:
    case = CASES[case_name]()
    test = dense.instance_gradients(case.final_model, case.test)
    train = dense.instance_gradients(case.final_model, case.train)
    names = [n for n, p in case.final_model.parameters().items() for _ in range(p.numel())]
    modules = [n.rpartition(".")[0] for n in names]
    expected = torch.zeros(len(test), len(train))
    for module in dict.fromkeys(modules):
        index = torch.tensor([k for k, m in enumerate(modules) if m == module])
        t, g = test[:, index], train[:, index]
        eye = torch.eye(len(index), dtype=g.dtype)
        inverse = torch.stack([torch.linalg.inv(x[:, None] * x + 0.3 * eye) for x in g]).mean(0)
        expected = expected + t @ inverse @ g.T / len(g)
    method = DataInf(0.3, layers="module")
    torch.testing.assert_close(method.attribute(case.final_model, case.train, case.test).values, expected)
    assert len(method.fit(case.final_model, case.train).groups) < len(case.final_model.parameters())


def test_an_instance_without_a_gradient_has_no_cosine_with_any() -> None:
    """A target equal to its own prediction: zero, where 0 / 0 would be NaN."""
    case = CASES["mlp_regression"]()
    targets = case.train.targets.clone()
    targets[2] = case.final_model.outputs(case.train)[2]
    scores = GradCos().attribute(case.final_model, Instances(case.train.inputs, targets), case.test).values
    assert (scores[:, 2] == 0).all()
    assert (scores[:, 3:].abs() > 1e-6).all()


@pytest.mark.parametrize(("held", "memory_mb"), [(0, 1024.0), (2**23, 1024.0), (2**23, 0.05)])
@pytest.mark.parametrize("case_name", CASES)
def test_datainf_matched_to_further_training_has_the_damping_of_each_evaluation_point(
    case_name: str, held: int, memory_mb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.curvature.module_rows.HELD", held)
    case = CASES[case_name]()
    training = followed(case.final_model, case.train, Protocol(lr=0.1, batch_size=5, epochs=2), 1)
    found = DataInf("time_matched", memory_mb=memory_mb).attribute(
        case.final_model, case.train, case.test, None, training
    )
    assert len(found.values) == len(training.steps) == 2
    for values, damping in zip(found.values, (1 / training_time(training, 0.0)).tolist(), strict=True):
        expected = DataInf(damping).attribute(case.final_model, case.train, case.test)
        torch.testing.assert_close(values, expected.values)


def test_datainf_damps_each_layer_by_itself() -> None:
    case = CASES["mlp_regression"]()
    method = DataInf()
    layers = method.fit(case.final_model, case.train)
    norms, _ = layers.norms_and_products(layers.gradients.measurements(case.test))
    dampings = [damping for (damping,) in layers.dampings(norms, [method.damping], None).values()]
    assert len(set(dampings)) == len(dampings) == 6
    problem = AttributionProblem(case.final_model, case.train, case.test)
    sweep = method.sweep(layers, [Damping.parse(d) for d in ("0.1x", "1x", 0.3)], problem)
    torch.testing.assert_close(sweep[0], method.scores(problem).values)
    single = DataInf("1x").attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(sweep[1], single)


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("damping", [0.5, 1e-3])
def test_exact_influence_is_the_dense_damped_solve(case_name: str, damping: float) -> None:
    case = CASES[case_name]()
    expected = dense.influence(case, dense.gauss_newton(case.final_model, case.train), damping)
    scores = ExactInfluence(damping).attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-10)
    fisher = dense.influence(case, dense.empirical_fisher(case.final_model, case.train), damping)
    scores = (
        ExactInfluence(damping, curvature="empirical")
        .attribute(case.final_model, case.train, case.test)
        .values
    )
    torch.testing.assert_close(scores, fisher, rtol=1e-7, atol=1e-10)


def test_exact_influence_on_a_linear_model_is_leave_one_out() -> None:
    """Least squares with an L2 penalty: the retrained minimum without i is known in closed form."""
    torch.manual_seed(0)
    n, d, damping = 200, 3, 0.05  # large enough for one instance's change to be small
    x, noise = torch.randn(n, d, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    y = x @ torch.randn(d, 1, dtype=torch.float64) + 0.2 * noise

    def minimum(keep: Tensor) -> Tensor:
        # (1/n) sum over kept of (x.w - y)^2 + (damping/2) |w|^2: the divisor stays n
        a, b = x[keep], y[keep]
        return torch.linalg.solve(2 * a.T @ a / n + damping * torch.eye(d, dtype=a.dtype), 2 * a.T @ b / n)

    network = nn.Linear(d, 1, bias=False).double()
    everything = torch.ones(n, dtype=torch.bool)
    network.weight.data = minimum(everything).T
    model, train = FinalModel(nn.Sequential(network), mean_squared_error), Instances(x, y)
    test = Instances(torch.randn(6, d, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64))
    before = model.losses(test)
    change = []
    for i in range(n):
        keep = everything.clone()
        keep[i] = False
        change.append((test.inputs @ minimum(keep) - test.targets).square()[:, 0] - before)
    truth = torch.stack(change, 1)
    linear = ExactInfluence(damping).attribute(model, train, test).values
    slope = (linear * truth).sum() / truth.square().sum()
    assert abs(slope - 1) < 0.1
    assert torch.nn.functional.cosine_similarity(linear, truth).min() > 0.99
    # and in sign every method that estimates a change agrees
    helpful = truth > truth.abs().max() * 0.2
    for name in [
        "graddot",
        "gradcos",
        "tracin",
        "datainf",
        "exact",
        "cg",
        "lissa",
        "lissa_h",
        "ekfac",
        "kfac",
    ]:
        scores = (
            build(name, **({"damping": damping} if name in SOLVERS else {}))
            .attribute(model, train, test)
            .values
        )
        assert (scores[helpful] > 0).all(), name


@pytest.mark.parametrize("case_name", CASES)
def test_propagated_outputs_give_the_loss_at_linearly_changed_outputs(case_name: str) -> None:
    case, damping = CASES[case_name](), 0.01
    model, n = case.final_model, len(case.train)
    curved = dense.gauss_newton(model, case.train)
    curved += damping * torch.eye(model.size, dtype=torch.float64)
    moved = torch.linalg.solve(curved, dense.instance_gradients(model, case.train).T) / n
    change = torch.einsum("jdp,pn->njd", dense.jacobians(model, case.test), moved)
    outputs = model.outputs(case.test)
    before = model.loss(outputs, case.test.targets)
    expected = torch.stack([model.loss(outputs + c, case.test.targets) - before for c in change], 1)
    scores = ExactInfluence(damping, "outputs").attribute(model, case.train, case.test).values
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("case_name", CASES)
def test_self_influence_is_not_negative(case_name: str) -> None:
    case = CASES[case_name]()
    for method in (GradDot(), DataInf(), ExactInfluence("auto")):
        scores = method.attribute(case.final_model, case.train, case.train).values
        assert (scores.diagonal() >= 0).all()


@pytest.mark.parametrize("case_name", CASES)
def test_exact_influence_with_relative_damping_is_invariant_to_the_scale_of_the_loss(case_name: str) -> None:
    """The loss times c: g_j and g_i times c, G times c, the mean squared gradient times c^2."""
    case = CASES[case_name]()
    loss, c = case.final_model.loss, 3.0

    def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
        return c * loss(outputs, targets)

    model = FinalModel(case.final_model.network, scaled)
    scores = ExactInfluence("auto").attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(
        ExactInfluence("auto").attribute(model, case.train, case.test).values, c * scores
    )
    one = ExactInfluence("10x").attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(
        ExactInfluence(f"{10 / c}x").attribute(model, case.train, case.test).values,
        c * one,
        rtol=1e-6,
        atol=1e-9,
    )


def further_training(steps: tuple[int, ...] = (5, 10, 400), lr: float = 0.1) -> FurtherTraining:
    return FurtherTraining(Protocol(lr=lr, steps=steps[-1]), steps, (0,), lambda: iter(()))


def test_time_matched_damping_gives_scores_for_each_evaluation_point() -> None:
    case = CASES["mlp_classification"]()
    method = ExactInfluence("time_matched")
    assert method.follows_further_training
    assert not ExactInfluence("1x").follows_further_training
    scores = method.attribute(
        case.final_model, case.train, case.test, further_training=further_training()
    ).values
    assert scores.shape == (3, len(case.test), len(case.train))
    for e, steps in enumerate((5, 10, 400)):
        one = ExactInfluence(1 / (0.1 * steps)).attribute(case.final_model, case.train, case.test).values
        torch.testing.assert_close(scores[e], one)
    with pytest.raises(InputError, match=r"further_training: .* none was given; damping='auto' does without"):
        ExactInfluence().attribute(case.final_model, case.train, case.test)


def test_a_measurement_replaces_the_test_loss_alone() -> None:
    case = CASES["mlp_classification"]()

    def logit(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.gather(1, targets[:, None])[:, 0]

    model = FinalModel(case.final_model.network, cross_entropy, logit)
    test = dense.instance_gradients(case.final_model, case.test, logit)
    train = dense.instance_gradients(case.final_model, case.train)
    torch.testing.assert_close(GradDot().attribute(model, case.train, case.test).values, test @ train.T)


def test_only_trainable_parameters_count() -> None:
    case = CASES["mlp_regression"]()
    model = FinalModel(case.final_model.network, mean_squared_error, trainable=("2.*", "4.bias"))
    assert model.size == 36
    expected = dense.instance_gradients(model, case.test) @ dense.instance_gradients(model, case.train).T
    torch.testing.assert_close(GradDot().attribute(model, case.train, case.test).values, expected)
    curved = dense.gauss_newton(model, case.train) + 0.1 * torch.eye(36, dtype=torch.float64)
    influence = (
        dense.instance_gradients(model, case.test)
        @ torch.linalg.solve(curved, dense.instance_gradients(model, case.train).T)
        / len(case.train)
    )
    torch.testing.assert_close(ExactInfluence(0.1).attribute(model, case.train, case.test).values, influence)


def test_tracin_sums_over_checkpoints(tmp_path: Path) -> None:
    case = CASES["mlp_regression"]()
    model = case.final_model
    other = {k: v + 0.1 for k, v in model.state().items()}
    torch.save({"state_dict": {f"network.{k}": v for k, v in other.items()}}, tmp_path / "a.ckpt")
    torch.save(model.state(), tmp_path / "b.pt")
    scores = (
        TracIn([tmp_path / "a.ckpt", str(tmp_path / "b.pt")], [0.5, 2.0])
        .attribute(model, case.train, case.test)
        .values
    )
    moved = FinalModel(torch.nn.Sequential(*CASES["mlp_regression"]().final_model.to().network), model.loss)
    moved.network.load_state_dict(other)
    expected = 0.5 * GradDot().attribute(moved, case.train, case.test).values
    expected += 2.0 * GradDot().attribute(model, case.train, case.test).values
    torch.testing.assert_close(scores, expected)
    with pytest.raises(InputError, match="checkpoints"):
        TracIn([tmp_path / "none.pt"]).attribute(model, case.train, case.test)
    with pytest.raises(InputError, match="lr"):
        TracIn([tmp_path / "b.pt"], [0.1, 0.2])
    narrow = {**model.state(), "4.weight": torch.zeros(2, 5)}
    with pytest.raises(InputError, match=r"4\.weight"):
        TracIn([narrow]).attribute(model, case.train, case.test)


def test_embeddings_are_what_the_last_linear_layer_sees() -> None:
    case = CASES["mlp_classification"]()
    hidden = case.final_model.network[:-1]
    ours, theirs = hidden(case.test.inputs), hidden(case.train.inputs)
    scores = EmbeddingSimilarity("dot").attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(scores, (ours @ theirs.T).detach())
    signed = EmbeddingSimilarity("dot", signed=True).attribute(case.final_model, case.train, case.test).values
    same = case.test.targets[:, None] == case.train.targets
    assert (signed[~same] == -scores[~same]).all()
    linear = FinalModel(nn.Linear(4, 3).double(), cross_entropy)
    assert "hidden" in (EmbeddingSimilarity().inapplicable(linear, case.train) or "")


def test_exact_says_when_it_is_too_large() -> None:
    case = CASES["mlp_regression"]()
    assert ExactInfluence().inapplicable(case.final_model, case.train) is None
    assert "23 x 23" in (ExactInfluence(max_dimension=22).inapplicable(case.final_model, case.train) or "")


def test_random_scores_depend_on_the_seed_alone() -> None:
    case = CASES["mlp_regression"]()
    one, same, other = (
        RandomScores(s).attribute(case.final_model, case.train, case.test).values for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("bad", ["fast", -1.0, 0, "0x", "nan", {"absolute": 3}])
def test_a_bad_damping_is_refused_by_its_key(bad: Any) -> None:
    with pytest.raises(InputError, match="damping"):
        ExactInfluence(bad)


@pytest.mark.parametrize("case_name", CASES)
def test_low_precision_storage_changes_scores_little(case_name: str) -> None:
    case = CASES[case_name]().to(torch.float32)
    small = case.final_model.size * 4 * 3 / 2**20
    scores = GradDot().attribute(case.final_model, case.train, case.test).values
    stored = (
        GradDot(memory_mb=small, storage="bfloat16").attribute(case.final_model, case.train, case.test).values
    )
    assert (stored - scores).norm() < 0.02 * scores.norm()


def test_unused_parameters_have_zero_gradients() -> None:
    case = CASES["conv_net"]()

    class WithPooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(case.final_model.network).requires_grad_()
            self.pooler = nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = FinalModel(WithPooler(), cross_entropy)
    scores = GradDot().attribute(model, case.train, case.test).values
    torch.testing.assert_close(scores, GradDot().attribute(case.final_model, case.train, case.test).values)


def test_a_network_that_cannot_be_vectorised_is_differentiated_one_by_one() -> None:
    case = CASES["mlp_classification"]()

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.final_model.network

        def forward(self, x: Tensor) -> Tensor:
            scale = 1.0 if x.sum().item() > 0 else 2.0  # a value read out of a tensor
            return scale * self.inner(x)

    model = FinalModel(Branching(), cross_entropy)
    gradients = InstanceGradients(model)
    rows = gradients.losses(case.train)
    assert not gradients.automatic.vectorise
    scale = torch.where(case.train.inputs.sum(1) > 0, 1.0, 2.0).double()
    torch.testing.assert_close(
        rows.dense()[0, 0],
        dense.instance_gradients(
            FinalModel(case.final_model.network, lambda f, y: cross_entropy(scale[0] * f, y)), case.train[:1]
        )[0],
    )


def test_embeddings_of_sequences_are_means_over_positions_that_count() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids))

    torch.manual_seed(0)
    network = Tagger()
    ids, lengths = torch.randint(1, 9, (6, 7)), [7, 3, 5, 2, 6, 4]
    kept = torch.arange(7) < torch.tensor(lengths)[:, None]
    train = Instances({"input_ids": ids * kept}, torch.where(kept, ids, -100))
    test = Instances({"input_ids": (ids * kept)[1:4, :5]}, torch.where(kept, ids, -100)[1:4, :5])  # shorter
    means = torch.stack(
        [network.embedding(row[:k]).mean(0) for row, k in zip(ids, lengths, strict=True)]
    ).detach()
    found = EmbeddingSimilarity("dot").attribute(FinalModel(network, language_modelling), train, test).values
    torch.testing.assert_close(found, means[1:4] @ means.T)
