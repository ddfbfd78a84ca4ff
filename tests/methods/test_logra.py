"""Projected layers: with nothing left out the dense influence, and plain matrices where something is."""

from __future__ import annotations

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
