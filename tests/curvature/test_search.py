"""Exact search finds what all products in float64 do, whatever arithmetic the blocks are multiplied in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fimo.curvature.search import Extremes, extremes
from fimo.errors import InputError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rows_of(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows whose lengths differ by orders of magnitude, some of them the same."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, width, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    rows[n // 2 : n // 2 + 40] = rows[3]
    return rows.to(dtype)


def blocks(rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for block in rows.split(size):
        yield block, block.float().norm(dim=1)


def products(queries: Tensor, rows: Tensor) -> Tensor:
    """[Q, n] float64, each by itself, so that equal rows have equal products."""
    return torch.stack([(rows.double() * q.double()).sum(1) for q in queries])


def assert_extremes(found: Extremes, dense: Tensor, k: int) -> None:
    for values, at, sign in (
        (found.highest, found.highest_at, -1),
        (found.lowest, found.lowest_at, 1),
    ):
        order = (sign * dense).argsort(dim=1, stable=True)[:, :k]
        assert torch.equal(at, order)
        torch.testing.assert_close(values, dense.gather(1, order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ends_are_those_of_a_dense_computation(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bfloat16 products as they are (emulated where there are no instructions), and by float32 ones."""
    monkeypatch.setattr("fimo.curvature.search._multiplies_bfloat16", lambda device: native)
    rows, queries = rows_of(5000, 96, dtype), torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    dense = products(queries, rows)
    for k, size in ((1, 700), (13, 5000), (60, 31)):
        assert_extremes(extremes(queries, blocks(rows, size), k), dense, k)

    def scale(some: Tensor) -> Tensor:
        return 1 / some.float().norm(dim=1)

    scaled = extremes(queries, blocks(rows, 700), 13, scale)
    assert_extremes(scaled, dense * scale(rows).double(), 13)


def test_products_that_bfloat16_cannot_tell_apart_are_told_apart() -> None:
    rows = 1 + torch.arange(3000)[:, None] * torch.tensor([2.0**-20, 0.0]) + torch.tensor([0.0, 1.0])
    found = extremes(torch.tensor([[1.0, 1.0]]), blocks(rows.float(), 1024), 5)
    assert found.highest_at.tolist() == [[2999, 2998, 2997, 2996, 2995]]
    assert found.lowest_at.tolist() == [[0, 1, 2, 3, 4]]
    rounded = rows.bfloat16()
    rounded[1234, 0] = 1.0078125  # the next number after 1
    query = torch.tensor([[2.0**-10, 1.0]])
    assert extremes(query, blocks(rounded, 1024), 1).highest_at.item() == int(
        products(query, rounded).argmax()
    )


def test_rows_that_are_all_the_same_come_in_their_order() -> None:
    found = extremes(torch.ones(3, 8), blocks(torch.ones(4000, 8).bfloat16(), 1000), 4)
    assert (found.highest_at == torch.arange(4)).all()
    assert (found.lowest_at == torch.arange(4)).all()


def test_fewer_rows_than_asked_for_are_all_returned() -> None:
    rows, queries = rows_of(90, 8, torch.float32), torch.randn(2, 8)
    assert_extremes(extremes(queries, blocks(rows, 25), 200), products(queries, rows), 90)


def test_a_process_that_multiplies_float32_with_fewer_bits_is_still_exact() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rows, queries = rows_of(5000, 96, torch.float32), torch.randn(9, 96)
        assert_extremes(extremes(queries, blocks(rows, 700), 13), products(queries, rows), 13)
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_cannot_be_searched_is_refused() -> None:
    rows = torch.ones(5, 8)
    with pytest.raises(InputError, match=r"^k: expected at least 1 but got 0"):
        extremes(torch.ones(1, 8), blocks(rows, 5), 0)
    with pytest.raises(InputError, match="queries: are not finite"):
        extremes(torch.full((1, 8), torch.nan), blocks(rows, 5), 1)
    with pytest.raises(InputError, match="queries: have 7 entries, but rows have 8"):
        extremes(torch.ones(1, 7), blocks(rows, 5), 1)
