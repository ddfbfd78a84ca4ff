"""Other libraries' implementations: left out where they are missing, else the formulas that they claim."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fimo
from fimo.app.config import all_methods, own_methods
from fimo.bench.scoring import applicable_names
from fimo.errors import InputError
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.catalogue import OTHERS, method_of
from fimo.methods.damping import Damping
from fimo.methods.others.foreign import ForeignMethod, number
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
