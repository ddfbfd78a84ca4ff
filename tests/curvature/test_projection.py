"""Random projections: norms kept, one projection whatever the blocks, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows
from fimo.curvature.projection import COLUMNS, Projection, project
from tests.cases import CASES

KINDS: tuple[Projection, ...] = ("normal", "sign", "sparse")


def rows_of(n: int, p: int, dtype: torch.dtype = torch.float64) -> DenseRows:
    values = torch.randn(n, 2, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return DenseRows(values.to(dtype), {"weight": torch.Size([p])})


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_kept_to_a_relative_error_of_the_root_of_two_over_k(kind: Projection) -> None:
    rows, k = rows_of(6, 400), 500
    found = project(rows, k, kind)
    assert found.shape == (6, 2, k)
    products = torch.einsum("nrk,msk->nrms", found, found)
    lengths = rows.dense().norm(dim=-1)
    error = (products - rows.gram(rows)) / (lengths[:, :, None, None] * lengths)
    # each entry's standard deviation is at most this; there are 144
    assert error.abs().max() < 4.5 * (2 / k) ** 0.5
    assert error.abs().mean() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_entries_have_the_law_of_their_kind(kind: Projection) -> None:
    """The identity's projection is the matrix itself, [P, k]."""
    p, k = 200, 130
    matrix = project(DenseRows(torch.eye(p)[:, None], {"weight": torch.Size([p])}), k, kind)[:, 0]
    if kind == "sparse":
        assert ((matrix != 0).sum(1) == 1).all()
        assert matrix.abs().sum().item() == p
        assert (matrix.sum(0) != 0).sum() > k / 3
        assert abs(matrix.sum().item()) < 4 * p**0.5
    else:
        scaled = matrix * k**0.5
        assert abs(scaled.mean().item()) < 0.03
        assert scaled.square().mean().item() == pytest.approx(1, abs=0.03)
        assert (len(scaled.unique()) == 2) == (kind == "sign")
        columns = scaled.T @ scaled / p
        assert (columns - columns.diagonal().diag()).abs().max() < 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_is_one_projection_whatever_the_memory_and_another_seed_another(kind: Projection) -> None:
    rows, k = rows_of(3, 40), COLUMNS + 9
    found = project(rows, k, kind, seed=3)
    assert found.dtype == torch.float64
    for memory_mb in (40 * 8 / 2**20, 5 * 40 * 8 / 2**20, 1000.0):  # one column, five, all
        torch.testing.assert_close(project(rows, k, kind, 3, memory_mb), found, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(project(rows, k, kind, seed=4), found)
    halves = [project(DenseRows(part, rows.shapes), k, kind, 3) for part in rows.dense().split(2)]
    torch.testing.assert_close(torch.cat(halves), found)


def test_a_projection_is_held_in_bands_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, widths = rows_of(3, 40), []
    times = DenseRows.times
    monkeypatch.setattr(DenseRows, "times", lambda self, v: widths.append(v.shape[1]) or times(self, v))
    project(rows, 12, "normal", memory_mb=5 * 40 * 8 / 2**20)
    assert widths == [5, 5, 2]
    widths.clear()
    project(rows, COLUMNS + 1, "normal", memory_mb=1000)
    assert widths == [COLUMNS, 1]


def test_rows_that_are_made_anew_are_projected_in_one_pass() -> None:
    case = CASES["conv_net"]()
    gradients = InstanceGradients(case.final_model, 1e-3)
    rows = gradients.losses(case.train)
    before = gradients.evaluations
    found = project(rows, 3 * COLUMNS, "normal")
    assert gradients.evaluations - before == len(case.train)
    held = project(DenseRows(rows.dense(), rows.shapes), 3 * COLUMNS, "normal")
    torch.testing.assert_close(found, held)


def test_large_projections_are_sparse_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(3, 40)
    for entries, kind in ((40 * 7, "normal"), (40 * 7 - 1, "sparse")):
        monkeypatch.setattr("fimo.curvature.projection.MAX_ENTRIES", entries)
        assert torch.equal(project(rows, 7), project(rows, 7, kind))  # type: ignore[arg-type]
