"""Methods that solve with a curvature: at convergence they are the dense influence, whatever the route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.projection import project
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.methods.arnoldi import Arnoldi
from fimo.methods.attribution_problem import AttributionProblem
from fimo.methods.cg import ConjugateGradients
from fimo.methods.ekfac import Ekfac
from fimo.methods.exact import ExactInfluence
from fimo.methods.gradient import CurvatureMethod
from fimo.methods.lissa import Lissa, LissaHessian
from fimo.methods.representer import Representer
from fimo.methods.trak import Trak
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy
from tests.cases import CASES, Case
from tests.reference import attribution as dense


def residual(method: CurvatureMethod, case: Case) -> float:
    """Return the largest relative residual of the solutions."""
    curvature = method.fit(case.final_model, case.train)
    left, right = curvature.gradients.measurements(case.test), curvature.gradients.losses(case.train)
    return max(curvature.solve(left, right, method.dampings(curvature, None)).residuals)


@pytest.mark.parametrize(("spectral", "kernel"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("name", CASES)
def test_cg_and_lissa_converge_to_the_dense_influence(
    name: str, spectral: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    if not spectral:
        monkeypatch.setattr("fimo.methods.cg.MAX_SPECTRAL", 0)
    expected = dense.influence(case, dense.gauss_newton(case.final_model, case.train), 0.5)
    methods: list[CurvatureMethod] = [ConjugateGradients(0.5, tolerance=1e-9), Lissa(0.5, tolerance=1e-9)]
    if not spectral:
        monkeypatch.setattr("fimo.methods.cg.kernel_pays", lambda *_: kernel)
        methods.append(ConjugateGradients(0.5, tolerance=1e-9, precondition="ekfac"))
        methods.append(Lissa(0.5, tolerance=1e-9, precondition="ekfac"))
    for method in methods:
        scores = method.attribute(case.final_model, case.train, case.test)
        torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-8)
        assert residual(method, case) <= 1e-9
        assert any("relative residual" in note for note in scores.notes)


@pytest.mark.parametrize("name", CASES)
def test_cg_and_lissa_through_the_network_converge_to_the_dense_influence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where outputs are too many for rows, products go forward and backward through the network."""
    monkeypatch.setattr("fimo.methods.cg.MAX_ROWS", 0)
    case = CASES[name]()
    expected = dense.influence(case, dense.gauss_newton(case.final_model, case.train), 5.0)
    methods: list[ConjugateGradients | Lissa] = [
        ConjugateGradients(5.0, tolerance=1e-9),
        ConjugateGradients(5.0, tolerance=1e-9, memory_mb=0.004),  # too little for a Krylov space
        Lissa(5.0, tolerance=1e-9),
        Lissa(5.0, tolerance=1e-9, memory_mb=0.02),  # too little for a Krylov space: it takes its steps
    ]
    for method in methods:
        scores = method.attribute(case.final_model, case.train, case.test).values
        assert not method.fit(case.final_model, case.train).by_rows
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_preconditioned_steps_of_lissa_leave_less_than_as_many_without(name: str) -> None:
    case = CASES[name]()
    for depth in (20, 100):
        left = {
            p: residual(Lissa("auto", depth=depth, precondition=p), case)  # type: ignore[arg-type]
            for p in ("none", "ekfac")
        }
        assert left["ekfac"] < 0.95 * left["none"]


def test_of_a_linear_model_preconditioned_iterations_need_a_fraction_of_the_steps() -> None:
    """Inputs of unlike size, which K-FAC's factors of the one layer know."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 8, dtype=torch.float64, generator=generator) * torch.logspace(-1.5, 1, 8)
    targets = (inputs[:, -3:] + torch.randn(300, 3, generator=generator)).argmax(1)
    train, test = Instances(inputs[:290], targets[:290]), Instances(inputs[290:], targets[290:])
    network = torch.nn.Sequential(torch.nn.Linear(8, 3)).double()
    torch.nn.init.zeros_(network[0].weight)
    case = Case("softmax", FinalModel(network, cross_entropy, accept_poor=True), train, test)
    expected = dense.influence(case, dense.gauss_newton(case.final_model, case.train), 1e-4)
    for few in (
        ConjugateGradients(1e-4, max_iterations=5, precondition="ekfac"),
        Lissa(1e-4, depth=10, precondition="ekfac"),
    ):
        scores = few.attribute(case.final_model, train, test).values
        assert (scores - expected).norm() < 0.02 * expected.norm()
    for unaided in (ConjugateGradients(1e-4, max_iterations=5), Lissa(1e-4, depth=1000)):
        scores = unaided.attribute(case.final_model, train, test).values
        assert (scores - expected).norm() > 0.2 * expected.norm()


def test_a_preconditioned_series_that_diverges_is_refused() -> None:
    case = CASES["mlp_classification"]()
    for batch_size in (None, 4):
        method = Lissa(0.1, scale=0.01, depth=50, batch_size=batch_size, precondition="ekfac")
        with pytest.raises(InputError, match="LiSSA diverged"):
            method.attribute(case.final_model, case.train, case.test)


def test_a_preconditioner_needs_factors() -> None:
    case = CASES["mlp_classification"]()
    own = FinalModel(
        torch.nn.Sequential(torch.nn.Linear(4, 70)).double(), lambda f, y: f.square().sum(1), accept_poor=True
    )
    for kind in (ConjugateGradients, Lissa):
        assert "no targets can be drawn" in (kind(precondition="ekfac").inapplicable(own, case.train) or "")
        assert kind().inapplicable(own, case.train) is None
        with pytest.raises(InputError, match="precondition: expected one of none, ekfac"):
            kind(precondition="jacobi")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="depth: expected a number"):
        Lissa(batch_size=4, precondition="ekfac")


@pytest.mark.parametrize(
    ("curvature", "precondition", "scale"),
    [("gauss_newton", "none", 30.0), ("hessian", "none", 30.0), ("gauss_newton", "ekfac", 8.0)],
)
def test_steps_of_lissa_on_batches_average_to_the_whole_series(
    curvature: str, precondition: str, scale: float
) -> None:
    """The batches of different steps are independent, so that the expected iterate is the whole one's."""
    case = CASES["mlp_classification"]()
    arguments = {
        "damping": 2.0, "curvature": curvature, "depth": 6, "scale": scale, "precondition": precondition,
    }  # fmt: skip
    whole = Lissa(**arguments).attribute(case.final_model, case.train, case.test).values  # type: ignore[arg-type]
    drawn = torch.stack(
        [
            Lissa(**arguments, batch_size=4, seed=s)
            .attribute(  # type: ignore[arg-type]
                case.final_model, case.train, case.test
            )
            .values
            for s in range(60)
        ]
    )
    error = (drawn.mean(0) - whole).norm()
    assert error < 3 * (drawn.var(0).sum() / len(drawn)).sqrt()
    assert error < 0.1 * (drawn[0] - whole).norm() + 0.05 * whole.norm()


@pytest.mark.parametrize("chosen", [Lissa, LissaHessian])
def test_by_default_the_series_of_lissa_has_converged(chosen: type[Lissa]) -> None:
    case = CASES["mlp_classification"]()
    method = chosen(damping="auto")
    scores = method.attribute(case.final_model, case.train, case.test).values
    matrix = dense.gauss_newton if chosen is Lissa else dense.hessian
    damping = method.dampings(method.fit(case.final_model, case.train), None).item()
    expected = dense.influence(case, matrix(case.final_model, case.train), damping)
    assert residual(method, case) <= 2e-4
    assert (scores - expected).norm() < 1e-3 * expected.norm()


def test_a_truncated_series_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["mlp_classification"]()
    Lissa(0.01, depth=20).attribute(case.final_model, case.train, case.test)
    assert "has not converged" in caplog.text


@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification"])
def test_lissa_with_the_hessian_converges_to_the_dense_influence(name: str) -> None:
    case = CASES[name]()
    hessian = dense.hessian(case.final_model, case.train)
    damping = 3.0 - torch.linalg.eigvalsh(hessian)[0].clamp(max=0).item()
    method = LissaHessian(damping, depth=500, batch_size=None, tolerance=1e-9)
    scores = method.attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(scores, dense.influence(case, hessian, damping), rtol=1e-5, atol=1e-8)
    method = Lissa(damping, curvature="hessian", tolerance=1e-9, precondition="ekfac")
    scores = method.attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(scores, dense.influence(case, hessian, damping), rtol=1e-5, atol=1e-8)


def test_lissa_with_the_hessian_says_that_it_diverges() -> None:
    case = CASES["mlp_classification"]()
    data = case.final_model, case.train, case.test
    least = torch.linalg.eigvalsh(dense.hessian(case.final_model, case.train))[0].item()
    with pytest.raises(InputError, match="diverged"):
        LissaHessian(-least / 2, depth=20000, batch_size=None).attribute(
            case.final_model, case.train, case.test
        )
    # auto damping exceeds the most negative eigenvalue
    method = LissaHessian(batch_size=None)
    assert method.attribute(*data).values.isfinite().all()
    assert method.dampings(method.fit(case.final_model, case.train), None).item() > -least


def test_with_batches_lissa_bounds_the_largest_eigenvalue_of_any_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By rows: the largest instance's. Through the network: twice the whole's, as a batch's may be larger."""
    case = CASES["mlp_classification"]()
    rows = InstanceGradients(case.final_model).gauss_newton(case.train).dense()
    largest = torch.linalg.eigvalsh(dense.gauss_newton(case.final_model, case.train))[-1].item()
    found = {}
    for batch_size in (None, 4):
        method = Lissa(1.0, batch_size=batch_size)
        found[batch_size] = method.fit(case.final_model, case.train).largest()
    assert found[None] == pytest.approx(largest, rel=1e-3)
    assert found[4] == pytest.approx(rows.square().sum((1, 2)).max().item())
    assert found[4] >= max(torch.linalg.matrix_norm(r, 2).item() ** 2 for r in rows)
    monkeypatch.setattr("fimo.methods.lissa.MAX_DIMENSION", 0)
    monkeypatch.setattr("fimo.methods.cg.MAX_ROWS", 0)
    for batch_size, factor in ((None, 1), (4, 2)):
        method = Lissa(1.0, batch_size=batch_size)
        assert method.fit(case.final_model, case.train).largest() == pytest.approx(factor * largest, rel=0.05)


def test_batches_of_lissa_are_near_the_whole_in_both_spaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["mlp_regression"]()
    data = case.final_model, case.train, case.test
    expected = dense.influence(case, dense.gauss_newton(case.final_model, case.train), 1.0)
    kernel = (
        Lissa(1.0, depth=200, batch_size=8, scale=60.0)
        .attribute(case.final_model, case.train, case.test)
        .values
    )
    assert (kernel - expected).norm() < 0.3 * expected.norm()
    monkeypatch.setattr("fimo.methods.lissa.MAX_DIMENSION", 0)
    whole = Lissa(1.0, depth=200, batch_size=8, scale=60.0).attribute(*data).values
    torch.testing.assert_close(whole, kernel, rtol=1e-6, atol=1e-9)
    everything = Lissa(1.0, batch_size=23, tolerance=1e-9).attribute(*data).values
    torch.testing.assert_close(everything, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", [ConjugateGradients, Ekfac, ExactInfluence])
def test_a_sweep_over_dampings_is_the_single_values(method: type) -> None:
    case = CASES["mlp_classification"]()
    arguments = {"tolerance": 1e-11} if method is ConjugateGradients else {}
    swept = method(0.1, **arguments)
    curvature = swept.fit(case.final_model, case.train)
    problem = AttributionProblem(case.final_model, case.train, case.test)
    found, _ = swept.sweep(curvature, torch.tensor([0.1, 1.0, 10.0]).double(), problem)
    for e, damping in enumerate([0.1, 1.0, 10.0]):
        single = method(damping, **arguments).attribute(case.final_model, case.train, case.test).values
        torch.testing.assert_close(found[e], single, rtol=1e-5, atol=1e-9)


def test_ekfac_is_exact_for_one_linear_layer_with_one_output() -> None:
    case = CASES["mlp_regression"]()
    model = FinalModel(torch.nn.Sequential(torch.nn.Linear(4, 1)).double(), case.final_model.loss)
    exact = ExactInfluence(0.1).attribute(model, case.train, case.test).values
    torch.testing.assert_close(Ekfac(0.1).attribute(model, case.train, case.test).values, exact)


def test_ekfac_auto_damps_each_module_by_its_own_mean_eigenvalue() -> None:
    case = CASES["mlp_classification"]()
    method = Ekfac("auto")
    scores = method.attribute(case.final_model, case.train, case.test).values
    left = dense.instance_gradients(case.final_model, case.test)
    right = dense.instance_gradients(case.final_model, case.train)
    expected, start = torch.zeros_like(scores), 0
    for b in method.fit(case.final_model, case.train).factors.blocks:
        size = b.values.numel()
        ours, theirs = left[:, start : start + size], right[:, start : start + size]
        widths = [case.final_model.parameters()[n].numel() for n in b.names]
        a, c = (
            b.rotate(b.gather(dict(zip(b.names, x.split(widths, 1), strict=True)))).flatten(1)
            for x in (ours, theirs)
        )
        expected += (a / (b.values.flatten() + 0.1 * b.values.mean())) @ c.T / len(case.train)
        start += size
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("name", CASES)
def test_arnoldi_with_all_eigenvectors_is_the_pseudo_inverse(name: str) -> None:
    case = CASES[name]()
    matrix = dense.gauss_newton(case.final_model, case.train)
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.argsort(descending=True)[:8]
    test, train = (dense.instance_gradients(case.final_model, d) for d in (case.test, case.train))
    a, b = test @ vectors[:, kept], train @ vectors[:, kept]
    expected = (a / values[kept]) @ b.T / len(case.train)
    scores = Arnoldi(rank=8, iterations=200).attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)


def test_trak_in_many_dimensions_is_the_kernel_of_the_margin() -> None:
    case = CASES["mlp_classification"]()

    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
        return (p / (1 - p)).log()

    features = dense.instance_gradients(case.final_model, case.train, margin)
    ours = dense.instance_gradients(case.final_model, case.test, margin)
    matrix = features.T @ features / 23 + 0.5 * torch.eye(83, dtype=torch.float64)
    q = [1 - case.final_model.losses(d).neg().exp() for d in (case.test, case.train)]
    expected = q[0][:, None] * (ours @ torch.linalg.solve(matrix, features.T) / 23) * q[1]
    scores = Trak(20000, damping=0.5).attribute(case.final_model, case.train, case.test).values
    assert (scores - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dimension", [16, 23, 40])
def test_trak_is_a_regression_on_projected_gradients_with_fewer_or_more_dimensions_than_instances(
    dimension: int,
) -> None:
    """q_j phi_j^T (Phi^T Phi / N + damping)^-1 phi_i q_i / N, phi the projected gradients of the outputs."""
    case = CASES["mlp_regression"]()
    gradients = InstanceGradients(case.final_model)
    features, ours = (
        project(gradients.outputs(data), dimension, "normal", seed=5)[:, 0]
        for data in (case.train, case.test)
    )
    matrix = features.T @ features / 23 + 0.5 * torch.eye(dimension, dtype=torch.float64)
    outputs = [case.final_model.outputs(data)[:, 0] - data.targets[:, 0] for data in (case.test, case.train)]
    q = [2 * difference for difference in outputs]  # the loss's derivative in its output
    expected = q[0][:, None] * (ours @ torch.linalg.solve(matrix, features.T) / 23) * q[1]
    for projection in ("normal", "auto"):
        trak = Trak(dimension, damping=0.5, projection=projection, seed=5)
        torch.testing.assert_close(trak.attribute(case.final_model, case.train, case.test).values, expected)


def test_trak_averages_an_ensemble() -> None:
    case = CASES["mlp_regression"]()
    state = case.final_model.state()
    one = Trak(64, checkpoints=[state]).attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(one, Trak(64).attribute(case.final_model, case.train, case.test).values)
    both = Trak(64, checkpoints=[state, state]).attribute(case.final_model, case.train, case.test).values
    other = Trak(64, seed=1).attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(both, (one + other) / 2)


@pytest.mark.parametrize("kind", ["normal", "sign", "sparse"])
def test_a_projection_preserves_inner_products_and_does_not_depend_on_blocks(kind: str) -> None:
    case = CASES["conv_net"]()
    whole = InstanceGradients(case.final_model).losses(case.train)
    blocks = InstanceGradients(case.final_model, case.final_model.size * 8 * 3 / 2**20).losses(case.train)
    a = project(whole, 4000, kind, memory_mb=0.01)[:, 0]  # type: ignore[arg-type]
    torch.testing.assert_close(a, project(blocks, 4000, kind)[:, 0])  # type: ignore[arg-type]
    truth = whole.gram(whole)[:, 0, :, 0]
    assert (a @ a.T - truth).norm() < 0.1 * truth.norm()


def test_representers_are_last_layer_gradient_products() -> None:
    case = CASES["mlp_classification"]()
    model = FinalModel(case.final_model.network, cross_entropy, trainable=("4.*",))
    dot = dense.instance_gradients(model, case.test) @ dense.instance_gradients(model, case.train).T
    scores = Representer(penalty=0.5).attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(scores, dot / 23)


def test_products_with_the_hessian_are_counted() -> None:
    case = CASES["mlp_regression"]()
    method = LissaHessian(10.0, depth=10, batch_size=8, scale=60.0)
    found = method.attribute(case.final_model, case.train, case.test)
    # rows and gradients of N + N + J instances, and 10 steps of 8 instances for each of J right-hand sides
    assert found.gradient_evaluations == 2 * 23 + 5 + 10 * 8 * 5
