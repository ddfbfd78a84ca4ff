"""Projected layers: with nothing left out the dense influence, and plain matrices where something is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.layer_projection import LayerProjection, projected_size
from fimo.errors import InputError
from fimo.methods.logra import Logra
from fimo.models.final_model import FinalModel
from tests.cases import CASES, Case
from tests.reference import attribution as dense

DAMPING = 0.3


def modules(model: FinalModel) -> list[str]:
    """[P], what each parameter belongs to: the module, and of one with unlike parameters each of them."""
    found = []
    for name, p in model.parameters().items():
        found += [f"{name.rpartition('.')[0]} {p.shape[0]}"] * p.numel()
    return found


def block_diagonal(matrix: Tensor, owners: list[str]) -> Tensor:
    same = torch.tensor([[a == b for b in owners] for a in owners])
    return matrix * same


@pytest.mark.parametrize("curvature", ["empirical", "gauss_newton"])
@pytest.mark.parametrize("blocks", ["layers", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_a_projection_as_large_as_the_layers_gives_the_dense_influence(
    name: str, blocks: Any, curvature: Any
) -> None:
    case = CASES[name]()
    matrix = dense.empirical_fisher if curvature == "empirical" else dense.gauss_newton
    expected = matrix(case.final_model, case.train)
    if blocks == "layers":
        expected = block_diagonal(expected, modules(case.final_model))
    run = (case.final_model, case.train, case.test)
    method = Logra(DAMPING, dimension=1000, blocks=blocks, curvature=curvature)
    torch.testing.assert_close(method.attribute(*run).values, dense.influence(case, expected, DAMPING))


def matrix_of(projection: LayerProjection, model: FinalModel) -> Tensor:
    """[K, P], from the projections of unit gradients, one at a time."""
    columns = []
    shapes = {name: p.shape for name, p in model.parameters().items()}
    for k in range(model.size):
        unit = torch.zeros(model.size, dtype=torch.float64)
        unit[k] = 1
        parts = dict(zip(shapes, unit.split([s.numel() for s in shapes.values()]), strict=True))
        column = []
        for side in projection.sides:
            matrix = torch.cat([parts[n].view(shapes[n][0], -1) for n in side.names], 1)
            column.append((side.leaving @ matrix @ side.entering.T).flatten())
        columns.append(torch.cat(column))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_projected_as_matrices_from_both_sides(name: str) -> None:
    """Of linear layers from what enters and leaves them, of others from their gradients."""
    case = CASES[name]()
    gradients = InstanceGradients(case.final_model)
    projection = LayerProjection.random(gradients.shapes, 2, 0, torch.zeros((), dtype=torch.float64))
    whole = matrix_of(projection, case.final_model)
    assert projection.sizes == projected_size(gradients.shapes, 2)
    torch.testing.assert_close(whole @ whole.T, torch.eye(len(whole), dtype=torch.float64))  # orthonormal
    rows = dense.jacobians(case.final_model, case.train) @ whole.T
    torch.testing.assert_close(projection.project(gradients.outputs(case.train)), rows)
    three = case.final_model.size * 8 * 3 / 2**20
    blocks = InstanceGradients(case.final_model, three).outputs(case.train)
    torch.testing.assert_close(projection.project(blocks), rows)


@pytest.mark.parametrize("name", ["mlp_regression", "transformer"])
def test_a_smaller_projection_is_influence_in_the_subspace(name: str) -> None:
    case = CASES[name]()
    gradients = InstanceGradients(case.final_model)
    whole = matrix_of(
        LayerProjection.random(gradients.shapes, 2, 5, torch.zeros((), dtype=torch.float64)), case.final_model
    )
    test, train = (
        dense.instance_gradients(case.final_model, part) @ whole.T for part in (case.test, case.train)
    )
    damped = train.T @ train / len(train) + DAMPING * torch.eye(len(whole), dtype=torch.float64)
    expected = test @ torch.linalg.solve(damped, train.T) / len(train)
    found = Logra(DAMPING, dimension=2, blocks="whole", seed=5)
    torch.testing.assert_close(found.attribute(case.final_model, case.train, case.test).values, expected)


def factored_second_moment(case: Case) -> Tensor:
    """[P]: of each module's mean squared gradients, rows' means times columns' means over the mean."""
    squares = dense.instance_gradients(case.final_model, case.train).square().mean(0)
    shapes = {name: p.shape for name, p in case.final_model.parameters().items()}
    parts = dict(zip(shapes, squares.split([s.numel() for s in shapes.values()]), strict=True))
    groups: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(f"{name.rpartition('.')[0]} {shape[0]}", []).append(name)
    found: dict[str, Tensor] = {}
    for names in groups.values():
        matrix = torch.cat([parts[n].view(shapes[n][0], -1) for n in names], 1)
        outer = matrix.mean(1, keepdim=True) * matrix.mean(0) / matrix.mean()
        widths = [parts[n].numel() // len(matrix) for n in names]
        found |= {n: m.flatten() for n, m in zip(names, outer.split(widths, 1), strict=True)}
    return torch.cat([found[name] for name in shapes])


@pytest.mark.parametrize("name", ["mlp_regression", "conv_net"])
def test_trackstar_is_the_cosine_of_whitened_gradients_divided_by_their_second_moment(name: str) -> None:
    case = CASES[name]()
    scale = factored_second_moment(case).clamp(min=1e-30).rsqrt()
    test = dense.instance_gradients(case.final_model, case.test) * scale
    train = dense.instance_gradients(case.final_model, case.train) * scale
    fisher = block_diagonal(train.T @ train / len(train), modules(case.final_model))
    values, vectors = torch.linalg.eigh(fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64))
    whiten = vectors * values.rsqrt()
    expected = F.normalize(test @ whiten) @ F.normalize(train @ whiten).T
    method = Logra(DAMPING, dimension=1000, second_moment=True, normalise=True)
    found = method.attribute(case.final_model, case.train, case.test).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # of a share of 1e-8 for dead units


def test_automatic_damping_is_each_layer_s_own() -> None:
    case = CASES["mlp_classification"]()
    method = Logra(dimension=1000)
    curvature = method.fit(case.final_model, case.train)
    (damping,) = method.dampings(curvature, None).tolist()
    fisher = dense.empirical_fisher(case.final_model, case.train)
    owners = modules(case.final_model)
    each = torch.tensor(
        [fisher.diagonal()[torch.tensor([o == owner for o in owners])].mean() for owner in owners]
    )
    damped = block_diagonal(fisher, owners) + 0.1 * torch.diag(each)
    g = [dense.instance_gradients(case.final_model, part) for part in (case.test, case.train)]
    expected = g[0] @ torch.linalg.solve(damped, g[1].T) / len(g[1])
    torch.testing.assert_close(method.attribute(case.final_model, case.train, case.test).values, expected)
    assert damping == pytest.approx(0.1 * fisher.diagonal().mean().item())


def test_no_gradient_is_formed_where_layers_are_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(*_: object) -> Tensor:
        raise AssertionError("a gradient was formed")

    case = CASES["mlp_regression"]()
    expected = Logra(dimension=3).attribute(case.final_model, case.train, case.test).values
    monkeypatch.setattr("fimo.curvature.jacobian.FactoredRows.dense", formed)
    found = Logra(dimension=3).attribute(case.final_model, case.train, case.test).values
    assert torch.equal(found, expected)


def test_what_is_too_large_or_makes_no_sense_is_refused() -> None:
    case = CASES["mlp_regression"]()
    model = FinalModel(
        torch.nn.Sequential(torch.nn.Linear(4, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100)).double(),
        lambda f, y: f.square().sum(1),
        accept_poor=True,
    )
    assert Logra().inapplicable(model, case.train) is None
    assert "blocks=layers" in (Logra(dimension=90, blocks="whole").inapplicable(model, case.train) or "")
    assert "8100 x 8100" in (Logra(dimension=90).inapplicable(model, case.train) or "")
    with pytest.raises(InputError, match="dimension: its eigenproblem"):
        Logra(dimension=90).attribute(model, case.train, case.test)
    for key, value in (("dimension", 0), ("blocks", "all"), ("curvature", "hessian")):
        with pytest.raises(InputError, match=f"^{key}: expected"):
            Logra(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="normalise: a cosine"):
        Logra(normalise=True, propagate="outputs")


def run_of(case: Case) -> tuple[FinalModel, Any, Any]:
    return case.final_model, case.train, case.test


@pytest.mark.parametrize(
    "setting", [{}, {"normalise": True}, {"second_moment": True}, {"curvature": "gauss_newton"}]
)
@pytest.mark.parametrize("name", CASES)
def test_kept_gradients_give_the_same_scores_and_are_not_made_again(
    name: str, setting: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]()
    fresh = Logra(dimension=3, **setting).attribute(*run_of(case))
    method = Logra(dimension=3, cache=str(tmp_path), **setting)
    made = method.attribute(*run_of(case))
    again = method.attribute(*run_of(case))
    torch.testing.assert_close(made.values, fresh.values)
    assert torch.equal(made.values, again.values)
    curvature = len(case.train) * 10 if setting.get("curvature") else 0  # rows that are not kept
    assert again.gradient_evaluations <= len(case.test) + curvature < made.gradient_evaluations + curvature


def test_other_questions_of_the_same_gradients_read_them(tmp_path: Path) -> None:
    case = CASES["mlp_classification"]()
    kept = {"dimension": 3, "cache": str(tmp_path)}
    Logra(**kept).attribute(*run_of(case))
    measured = FinalModel(case.final_model.network, case.final_model.loss, measurement="logit_margin")
    for model, other in (
        (case.final_model, {"damping": 0.7}),
        (case.final_model, {"blocks": "whole"}),
        (case.final_model, {"normalise": True}),
        (case.final_model, {"memory_mb": 0.001}),
        (measured, {}),
    ):
        found = Logra(**kept, **other).attribute(model, case.train, case.test[:2])  # type: ignore[arg-type]
        assert found.gradient_evaluations == 2
    for other in ({"seed": 1}, {"dimension": 2}, {"storage": "float32"}, {"second_moment": True}):
        found = Logra(**{**kept, **other}).attribute(*run_of(case))  # type: ignore[arg-type]
        assert found.gradient_evaluations > len(case.train)
    found = Logra(**kept).attribute(case.final_model, case.train[1:], case.test)
    assert found.gradient_evaluations > len(case.test)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_extremes_are_those_of_all_scores(name: str, normalise: bool, kept: bool, tmp_path: Path) -> None:
    case = CASES[name]()
    method = Logra(dimension=3, normalise=normalise, cache=str(tmp_path) if kept else None)
    for left_out in (None, [1, 0, 7, 11, 4, 5, 12]):
        whole = method.attribute(*run_of(case), left_out)
        some = method.attribute(*run_of(case), left_out, extremes=2)
        expected = whole.extremes(2)
        assert some.ranks == expected.ranks == 2
        assert some.left_out.tolist() == expected.left_out.tolist()
        torch.testing.assert_close(some.values, expected.values)
        for test in (None, 0, len(case.test) - 1):
            for harmful in (False, True):
                top = some.top(test, 2, harmful)
                assert top["train"].tolist() == whole.top(test, 2, harmful)["train"].tolist()
        with pytest.raises(InputError, match="extremes=2"):
            some.top(0, 3)


def test_half_precision_changes_scores_by_its_rounding() -> None:
    case = CASES["mlp_classification"]()
    exact = Logra(dimension=3).attribute(*run_of(case)).values
    half = Logra(dimension=3, storage="bfloat16").attribute(*run_of(case)).values
    assert 1e-6 < (half - exact).norm() / exact.norm() < 0.02


def test_a_dimension_chosen_by_memory_fits_into_half_of_it() -> None:
    case = CASES["mlp_classification"]()
    shapes = {name: p.shape for name, p in case.final_model.parameters().items()}
    found = []
    for megabytes in (1e-6, 0.002, 0.01, 1000):
        k = Logra(dimension="auto", memory_mb=megabytes).dimension_of(case.final_model, len(case.train))
        found.append(k)
        size = sum(projected_size(shapes, k)) * len(case.train) * 8
        assert k == 1 or size <= megabytes * 2**20 / 2
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == 64
    automatic = Logra(dimension="auto").attribute(*run_of(case)).values
    torch.testing.assert_close(automatic, Logra(dimension=64).attribute(*run_of(case)).values)


def test_parts_made_apart_are_together_what_one_process_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimo.store.row_files.EACH", 4)
    case = CASES["mlp_classification"]()
    train = case.train
    whole = Logra(dimension=3, cache=str(tmp_path / "whole"))
    assert whole.keep(case.final_model, train) == len(train)
    assert whole.keep(case.final_model, train) == 0
    counts = []
    for k in range(3):
        counts.append(Logra(dimension=3, cache=str(tmp_path / str(k))).keep(case.final_model, train, (k, 3)))
        for path in (tmp_path / str(k)).rglob("*.safetensors"):
            joined = tmp_path / "joined" / path.relative_to(tmp_path / str(k))
            joined.parent.mkdir(parents=True, exist_ok=True)
            path.rename(joined)
    assert sum(counts) == len(train)
    assert min(counts) > 0

    def contents(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}

    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    found = Logra(dimension=3, cache=str(tmp_path / "joined")).attribute(*run_of(case))
    assert found.gradient_evaluations == len(case.test)
    with pytest.raises(InputError, match="part: expected"):
        whole.keep(case.final_model, train, (3, 3))
    with pytest.raises(InputError, match="cache: expected a folder"):
        Logra().keep(case.final_model, train)
