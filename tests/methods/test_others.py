"""Other libraries' implementations: left out where they are missing, else the formulas that they claim."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fimo
from fimo.app.config import all_methods, own_methods
from fimo.bench.scoring import applicable_names
from fimo.data.instances import IGNORED, Instances
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.catalogue import OTHERS, method_of
from fimo.methods.damping import Damping
from fimo.methods.others.bergson import BergsonGradients, linear_layers, require_seen
from fimo.methods.others.foreign import ForeignMethod, number
from fimo.models.final_model import FinalModel
from fimo.models.huggingface import causal_lm
from fimo.testing import check_method
from tests.cases import CASES

FILES = sorted((Path(__file__).parents[2] / "conf" / "method").glob("*.yaml"))
NAMES = [f.stem for f in FILES if OTHERS in f.read_text()]


def foreign(name: str, **settings: object) -> ForeignMethod:
    """Return another library's method; the test is skipped where the library is missing."""
    method = method_of(name, settings)[1]
    assert isinstance(method, ForeignMethod)
    for modules in method.packages.values():
        for module in modules:
            pytest.importorskip(module, reason=f"{module} is not installed")
    return method


def alike(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def scores(method: object, case_name: str, trainable: tuple[str, ...] = (), **settings: object) -> Tensor:
    case = CASES[case_name]()
    model = fimo.FinalModel(case.final_model.network, case.final_model.loss, trainable=trainable)
    return fimo.attribute(model, case.train, case.test, method, **settings).values  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_where_its_library_is_missing_the_extra_is_named(name: str, monkeypatch) -> None:
    method = method_of(name, {})[1]
    assert isinstance(method, ForeignMethod)
    ((extra, modules),) = method.packages.items()
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    case = CASES["mlp_regression"]()
    said = f"needs {modules[0]}, not installed here: pip install 'fimo\\[{extra}\\]'"
    with pytest.raises(InputError, match=said):
        fimo.attribute(case.final_model, case.train, case.test, name)
    method.load()  # of what is not there nothing is imported


def test_they_run_where_they_are_named_only() -> None:
    every = all_methods(FILES)
    assert set(every) - set(own_methods(every)) == set(NAMES)
    assert set(NAMES) <= set(applicable_names(["all"]))


@pytest.mark.parametrize("name", NAMES)
def test_what_holds_for_every_method_holds(name: str) -> None:
    settings = {
        "bergson_gradients": {"dimension": 0},
        "captum_arnoldi": {"iterations": 12},
        "dattri_cg": {"damping": 20.0},
        "dattri_trak": {"dimension": 8},
        "kronfluence_ekfac": {"fisher": "empirical"},
        "traker_trak": {"dimension": 8},
    }
    skipped = {"captum_arnoldi": ["dtype"], "dattri_trak": ["dtype"]}  # they draw in the model's dtype
    method, skip = foreign(name, **settings.get(name, {})), skipped.get(name, [])
    found = check_method(method, ["mlp_regression", "mlp_classification"], skip, strict=False)
    assert found.failures == []


def test_captums_tracin_is_tracin() -> None:
    method = foreign("captum_tracin")
    for case in CASES:
        torch.testing.assert_close(scores(method, case), scores("tracin", case))
    last = ("4.*",)
    torch.testing.assert_close(
        scores(method, "mlp_regression", last), scores("tracin", "mlp_regression", last)
    )


def test_captums_fast_tracin_is_that_of_the_last_weight() -> None:
    found = scores(foreign("captum_tracin_fast"), "mlp_classification")
    torch.testing.assert_close(found, scores("graddot", "mlp_classification", ("4.weight",)))


def test_captums_similarity_is_that_of_embeddings() -> None:
    for similarity in ("cosine", "euclidean"):
        found = scores(foreign("captum_similarity", similarity=similarity), "mlp_regression")
        torch.testing.assert_close(found, scores("embedding", "mlp_regression", similarity=similarity))


def test_kronfluences_factors_are_ours_on_the_same_layers() -> None:
    settings = {"fisher": "empirical", "damping": "10x"}
    convolutions = ("conv_net", ("conv.*", "conv2.*", "head.*"))
    for strategy, case in (
        ("ekfac", ["mlp_regression"]),
        ("kfac", ["mlp_regression"]),
        ("ekfac", convolutions),
    ):
        method = foreign("kronfluence_ekfac", strategy=strategy, **settings)
        torch.testing.assert_close(scores(method, *case), scores(strategy, *case, **settings))


def test_dattris_conjugate_gradients_solve_with_the_hessian() -> None:
    method = foreign("dattri_cg", damping=20.0, iterations=25)
    for case in CASES:
        exact = scores("lissa_h", case, damping=20.0, tolerance=1e-8, batch_size=None)
        torch.testing.assert_close(
            scores(method, case), exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max())
        )


def test_dattris_ekfac_is_ours_but_for_transposed_eigenvectors_and_misplaced_biases(monkeypatch) -> None:
    method = foreign("dattri_ekfac", damping=0.1)
    from dattri.func import fisher

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(28, 4, dtype=torch.float64, generator=generator)
    y = torch.randn(28, 1, dtype=torch.float64, generator=generator)

    def pair(bias: bool) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(4, 6, bias), nn.Tanh(), nn.Linear(6, 1, bias)]
            network = nn.Sequential(*layers).double()
        model = fimo.FinalModel(network, "mse", accept_poor=True)
        data = (model, (x[:20], y[:20]), (x[20:], y[20:]))
        own = fimo.attribute(*data, "ekfac", fisher="empirical", damping=0.1)
        return fimo.attribute(*data, method).values, own.values

    assert alike(*pair(bias=False)) < 0.99
    right = fisher.estimate_eigenvector
    monkeypatch.setattr(
        fisher, "estimate_eigenvector", lambda c: {n: (a.T, s.T) for n, (a, s) in right(c).items()}
    )
    torch.testing.assert_close(*pair(bias=False), rtol=1e-5, atol=1e-6)
    assert alike(*pair(bias=True)) < 0.99  # bias flattened behind the weight, and not as its last column


@pytest.mark.parametrize("name", ["dattri_trak", "traker_trak"])
def test_a_projection_to_all_dimensions_changes_nothing(name: str) -> None:
    method = foreign(name, dimension=5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(28, 4, dtype=torch.float64, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(28, 1, dtype=torch.float64, generator=generator)
    model = fimo.FinalModel(nn.Linear(4, 1).double(), "mse", accept_poor=True)
    train, test = (x[:20], y[:20]), (x[20:], y[20:])
    rows = torch.cat([x, torch.ones(28, 1)], 1)
    with torch.no_grad():
        slope = 2 * (model.network(x) - y)[:, 0]
    inverse = torch.linalg.inv(rows[:20].T @ rows[:20])
    expected = slope[20:, None] * (rows[20:] @ inverse @ rows[:20].T) * slope[:20]
    found = fimo.attribute(model, train, test, method).values
    assert alike(found, expected) > 1 - 1e-4  # in float32


def test_a_damping_is_a_number_in_the_unit_of_the_mean_loss() -> None:
    case = CASES["mlp_regression"]()
    problem = AttributionProblem(case.final_model, case.train, case.test)
    products = fimo.attribute(case.final_model, case.train, case.train, "graddot").values
    expected = 3 * products.diagonal().mean() / case.final_model.size
    assert number(Damping.parse("3x"), problem) == pytest.approx(float(expected))
    with pytest.raises(InputError, match="expected a number, a multiple such as 10x but got 'auto'"):
        method_of("dattri_cg", {"damping": "auto"})


LAYERS = ("model.transformer.h.*.attn.*", "model.transformer.h.*.mlp.*")


def language_model(
    trainable: tuple[str, ...] = LAYERS, loss: str = "language_modelling"
) -> tuple[FinalModel, Instances, Instances]:
    """A small GPT-2 in float64 with 9 training and 5 test sequences, some of them shorter than others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = causal_lm(40, width=16, layers=2, heads=2, positions=12).double()
        tokens = torch.randint(40, (14, 9))
    targets = tokens[:, 1:].clone()
    targets[0, :3], targets[3, 5:], targets[12, 4:] = IGNORED, IGNORED, IGNORED
    data = Instances({"input_ids": tokens[:, :-1].contiguous()}, targets)
    model = FinalModel(network, loss, trainable=trainable, accept_poor=True)
    return model, data[:9], data[9:]


@pytest.mark.parametrize(("unit_norm", "own"), [(False, "graddot"), (True, "gradcos")])
def test_bergsons_products_without_a_projection_are_those_of_whole_gradients(
    unit_norm: bool, own: str
) -> None:
    method = foreign("bergson_gradients", dimension=0, unit_norm=unit_norm, batch_size=4)
    without_biases = tuple(f"{layers}weight" for layers in LAYERS)
    problems = [
        language_model(),
        language_model(without_biases),
        language_model(loss="language_modelling_sum"),
    ]
    for name in ("mlp_regression", "mlp_classification"):
        case = CASES[name]()
        problems.append((case.final_model, case.train, case.test))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(30, 1)]
        data = Instances(torch.randn(14, 2, 3, 4).double(), torch.randn(14, 1).double())
    several_axes = FinalModel(nn.Sequential(*layers).double(), "mse", accept_poor=True)
    problems.append((several_axes, data[:9], data[9:]))
    for problem in problems:
        found = fimo.attribute(*problem, method)
        expected = fimo.attribute(*problem, own).values
        assert found.notes == ()
        torch.testing.assert_close(
            found.values, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
        )  # bergson adds them up in float32


def test_layers_that_bergson_has_no_gradients_of_are_left_out_and_named() -> None:
    method = foreign("bergson_gradients", dimension=0)
    for name, seen in (("conv_net", "head"), ("transformer", "qkv, up, down")):
        case = CASES[name]()
        trainable = tuple(f"{layer}.*" for layer in seen.split(", "))
        expected = scores("graddot", name, trainable)
        found = method.attribute(case.final_model, case.train, case.test)
        torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert found.notes[0].endswith(f"of the parameters covered, those of {seen}")


def test_bergsons_own_store_and_search_have_the_same_scores(tmp_path: Path) -> None:
    foreign("bergson_gradients")
    from bergson import Attributor, GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    model, train, test = language_model()

    def stored(instances: Instances, reduction: str) -> Attributor:
        """Return bergson's store, of its own loss of tokens and labels."""
        network = copy.deepcopy(model.network.model).requires_grad_(True)
        tokens, last = instances.inputs["input_ids"], instances.targets[:, -1:]
        data = {
            "input_ids": torch.cat([tokens, last.clamp(min=0)], 1).tolist(),
            "labels": torch.cat([torch.full_like(last, IGNORED), instances.targets], 1).tolist(),
        }
        cfg = IndexConfig(run_path=str(tmp_path / f"{len(instances)}_{reduction}"), loss_reduction=reduction)
        cfg.partial_run_path.mkdir()
        batches = [list(range(4)), list(range(4, len(instances)))]
        collect_gradients(
            network, Dataset.from_dict(data), GradientProcessor(include_bias=True), cfg, batches=batches
        )
        return Attributor(cfg.partial_run_path, dtype=torch.float64)

    for reduction, loss in (("mean", "language_modelling"), ("sum", "language_modelling_sum")):
        values, order = stored(train, reduction).search(stored(test, reduction).grads, None)
        theirs = torch.empty_like(values).scatter_(1, order, values)
        found = fimo.attribute(*language_model(loss=loss), "bergson_gradients", dimension=0).values
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_bergson_projects_each_layers_weight_and_bias_from_both_sides() -> None:
    method = foreign("bergson_gradients", dimension=3, seed=5)
    from bergson.collector.collector import create_module_projection_matrix

    case = CASES["mlp_classification"]()
    network = copy.deepcopy(case.final_model.network).requires_grad_(True)

    def projected(instances: Instances) -> Tensor:
        rows = []
        for one in instances.batches(1):
            network.zero_grad()
            case.final_model.loss(network(one.inputs), one.targets).sum().backward()
            parts = []
            for name, layer in network.named_modules():
                if isinstance(layer, nn.Linear):
                    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
                    left, right = (
                        create_module_projection_matrix(
                            f"network.{name}.layer", side, 3, size, torch.float64, torch.device("cpu"),
                            "rademacher", "jl", 5,
                        )
                        for side, size in zip(("left", "right"), gradient.shape, strict=True)
                    )  # fmt: skip
                    torch.testing.assert_close(left.abs(), torch.full_like(left, 3**-0.5))
                    parts.append((left @ gradient @ right.T).flatten())
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    expected = projected(case.test) @ projected(case.train).T
    found = fimo.attribute(case.final_model, case.train, case.test, method).values
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


class Shapes(nn.Module):
    """Layers that are called twice, with tied weights, in one piece for all instances, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.flat, self.tied, self.head = nn.Linear(2, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.once(x)).tanh())
        x = self.flat(x.view(-1, 2)).view(-1, 4)
        outputs: Tensor = self.out(self.head(self.tied(x).relu_()))
        return outputs


def test_the_layers_that_bergson_sees_are_called_once_with_weights_of_their_own() -> None:
    network = Shapes()
    train = Instances(torch.randn(6, 3), torch.randn(6, 1))
    model = FinalModel(network, "mse", accept_poor=True)
    assert list(linear_layers(model, train)) == ["once", "out"]
    assert list(linear_layers(FinalModel(network, "mse", trainable=("out.weight",)), train)) == ["out"]
    method = BergsonGradients()
    refused = {
        (
            "twice.*",
            "tied.*",
        ): "takes linear layers that are called once, and no such layer's weight is trained",
        ("once.*", "out.weight"): "takes the biases of all layers or of none",
    }
    for trainable, reason in refused.items():
        why = method.unsupported(FinalModel(network, "mse", trainable=trainable), train)
        assert why is not None
        assert reason in why


class Rescaled(nn.Module):
    """A linear layer whose weight is used as numbers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.layer(x) / self.layer.weight.norm())
        return outputs


def test_weights_that_are_used_beside_their_layer_are_refused() -> None:
    train = Instances(torch.randn(6, 3), torch.randn(6, 1))
    model = FinalModel(Rescaled(), "mse", accept_poor=True)
    layers = linear_layers(model, train)
    with pytest.raises(InputError, match=r"does not give the gradients of layer\.weight"):
        require_seen(model, train, layers)
    require_seen(model, train, ["head"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dimension": -1}, "dimension: expected at least 0"), ({"batch_size": 0}, "at least 1")],
)
def test_bergsons_settings_are_checked(settings: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        BergsonGradients(**settings)
