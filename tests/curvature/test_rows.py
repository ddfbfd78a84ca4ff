"""Every form of rows against plain per-instance gradients and Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fimo.curvature.gradients import InstanceGradients
from fimo.curvature.jacobian import DenseRows, FactoredRows, Rows, StreamedRows
from fimo.models.final_model import FinalModel
from tests.cases import CASES, LINEAR_CASES, Case
from tests.reference import attribution as dense


def in_forms(case: Case) -> dict[str, InstanceGradients]:
    three = case.final_model.size * 8 * 3 / 2**20
    return {
        "memory": InstanceGradients(case.final_model),
        "blocks": InstanceGradients(case.final_model, three),
    }


@pytest.mark.parametrize("form", ["memory", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_jacobians_are_autograd_s(name: str, form: str) -> None:
    case = CASES[name]()
    gradients = in_forms(case)[form]
    rows = gradients.losses(case.train)
    torch.testing.assert_close(rows.dense()[:, 0], dense.instance_gradients(case.final_model, case.train))
    torch.testing.assert_close(
        gradients.outputs(case.test).dense(), dense.jacobians(case.final_model, case.test)
    )
    expected = (FactoredRows if name in LINEAR_CASES else DenseRows) if form == "memory" else StreamedRows
    assert isinstance(rows, expected)


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_rows_have_the_gauss_newton_matrix_as_second_moment(name: str) -> None:
    case = CASES[name]()
    for gradients in in_forms(case).values():
        rows = gradients.gauss_newton(case.train)
        a = rows.dense().flatten(0, 1)
        torch.testing.assert_close(
            a.T @ a / len(case.train), dense.gauss_newton(case.final_model, case.train)
        )
        if name != "mlp_regression":  # the logits' common shift changes nothing
            assert rows.r == case.final_model.outputs(case.train).shape[1] - 1


@pytest.mark.parametrize("name", CASES)
def test_an_instance_s_own_inner_products_are_those_of_its_rows(name: str) -> None:
    case = CASES[name]()
    model = case.final_model
    some = FinalModel(model.network, model.loss, trainable=(next(iter(model.parameters())), "*bias"))
    for chosen in (model, some):
        a = dense.jacobians(chosen, case.train)
        for gradients in in_forms(Case(name, chosen, case.train, case.test)).values():
            torch.testing.assert_close(gradients.outputs(case.train).own_gram(), a @ a.mT)


@pytest.mark.parametrize("name", CASES)
def test_squared_rows_are_the_rows_entry_by_entry(name: str) -> None:
    case = CASES[name]()
    for gradients in in_forms(case).values():
        rows = gradients.losses(case.train)
        torch.testing.assert_close(rows.squares().dense(), rows.dense().square())
        assert type(rows.squares()) is type(rows)


@pytest.mark.parametrize("name", CASES)
def test_sampled_rows_have_the_gauss_newton_matrix_as_expected_second_moment(name: str) -> None:
    case = CASES[name]()
    truth = dense.gauss_newton(case.final_model, case.train)
    errors = []
    for samples in (10, 1000):
        a = InstanceGradients(case.final_model).sampled(case.train, samples).dense().flatten(0, 1)
        errors.append((a.T @ a / len(case.train) - truth).norm() / truth.norm())
    assert errors[1] < 0.06
    assert errors[1] < errors[0] / 4  # as the square root of the number of samples


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    case = CASES[name]()
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(case.final_model.size, generator=generator, dtype=torch.float64)
    for gradients in in_forms(case).values():
        left, right = gradients.outputs(case.test), gradients.gauss_newton(case.train)
        a, b = left.dense(), right.dense()
        torch.testing.assert_close(left.gram(right), torch.einsum("nrp,msp->nrms", a, b))
        torch.testing.assert_close(left.gram(right, weight), torch.einsum("nrp,p,msp->nrms", a, weight, b))
        by_name = left.grams(right)
        assert list(by_name) == list(case.final_model.parameters())
        torch.testing.assert_close(torch.stack(list(by_name.values())).sum(0), left.gram(right))
        torch.testing.assert_close(right.squared_norms(), b.square().sum(-1))
        vectors = torch.randn(left.p, 3, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(right.times(vectors), b @ vectors)
        weights = torch.randn(right.n, right.r, 3, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(right.transposed_times(weights), torch.einsum("nrp,nrk->pk", b, weights))
        pieces = list(right.pieces(megabytes=right.r * right.p * 8 * 2 / 2**20))
        assert max(piece.n for piece in pieces) <= 2
        torch.testing.assert_close(torch.cat([piece.dense() for piece in pieces]), b)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_pieces_of_factored_products_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    rows = InstanceGradients(case.final_model).outputs(case.train)
    assert isinstance(rows, FactoredRows)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(rows.p, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(rows.n, rows.r, 3, generator=generator, dtype=torch.float64)
    dense_rows = rows.dense()
    for piece in (1, 100, 10_000):
        monkeypatch.setattr("fimo.curvature.jacobian.PIECE", piece)
        torch.testing.assert_close(rows.times(vectors), dense_rows @ vectors)
        expected = torch.einsum("nrp,nrk->pk", dense_rows, weights)
        torch.testing.assert_close(rows.transposed_times(weights), expected)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_frozen_layers_have_no_entries(name: str) -> None:
    case = CASES[name]()
    model = FinalModel(case.final_model.network, case.final_model.loss, trainable=("0.bias", "2.weight"))
    rows: Rows = InstanceGradients(model).losses(case.train)
    assert isinstance(rows, FactoredRows)
    expected = dense.instance_gradients(model, case.train)
    torch.testing.assert_close(rows.dense()[:, 0], expected)
    torch.testing.assert_close(rows.gram(rows)[:, 0, :, 0], expected @ expected.T)
    vector = torch.randn(model.size, 1, dtype=torch.float64)
    torch.testing.assert_close(rows.times(vector)[:, 0], expected @ vector)


def test_an_instance_alone_and_in_a_batch_have_the_same_gradient() -> None:
    for name, tolerance in ((n, t) for n in CASES for t in [(torch.float64, 1e-10), (torch.float32, 1e-4)]):
        dtype, bound = tolerance
        case = CASES[name]().to(dtype)
        gradients = InstanceGradients(case.final_model)
        together: Tensor = gradients.losses(case.train).dense()
        alone = torch.cat([gradients.losses(case.train[i : i + 1]).dense() for i in range(len(case.train))])
        assert (alone - together).norm() < bound * together.norm(), name


def test_gradients_are_counted() -> None:
    case = CASES["mlp_classification"]()
    gradients = InstanceGradients(case.final_model)
    gradients.losses(case.train)
    gradients.outputs(case.test)
    assert gradients.evaluations == len(case.train) + 3 * len(case.test)


def test_gradients_that_are_computed_again_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["conv_net"]()
    with caplog.at_level("INFO"):
        InstanceGradients(case.final_model).losses(case.train)
        assert not caplog.messages
        gradients = in_forms(case)["blocks"]
        gradients.losses(case.train)
        gradients.losses(case.train)
    assert len(caplog.messages) == 1
    assert "methods.NAME.memory_mb=1 " in caplog.messages[0]
    assert "cache=FOLDER" not in caplog.messages[0]  # what layers leave is not written


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_rows_kept_in_a_narrower_type_are_the_rows_to_its_precision_and_computed_once(
    storage: torch.dtype,
) -> None:
    """Memory for seven of the thirteen instances in float64, so for all of them in half of it."""
    case = CASES["conv_net"]()
    memory = case.final_model.size * 8 * 7 / 2**20
    gradients = InstanceGradients(case.final_model, memory, storage)
    rows, exact = gradients.losses(case.train), InstanceGradients(case.final_model).losses(case.train).dense()
    evaluations = gradients.evaluations
    assert isinstance(rows, StreamedRows)
    assert [len(b.dense()) for b in rows.blocks()] == [7, 6]
    bound = torch.finfo(storage).eps * exact.abs()
    for _ in range(2):
        assert (rows.dense() != exact).any()
        assert ((rows.dense() - exact).abs() <= bound).all()
        vector = torch.randn(rows.p, 1, dtype=torch.float64)
        torch.testing.assert_close(rows.times(vector), rows.dense() @ vector)
    assert gradients.evaluations == evaluations


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_a_kernel_by_its_lower_half_is_the_rows_gram(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimo.curvature.jacobian.STRIP", 4)
    case = CASES[name]()
    rows = InstanceGradients(case.final_model).gauss_newton(case.train)
    dense = rows.dense().flatten(0, 1)
    torch.testing.assert_close(rows.kernel(), dense @ dense.T)
    torch.testing.assert_close(DenseRows(rows.dense(), rows.shapes).kernel(), dense @ dense.T)
