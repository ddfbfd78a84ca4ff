"""Exact search: of many kept rows, those with the largest and the smallest products with each query.

Products are taken block by block in the arithmetic that is fast, with a bound on their error; those that the
bound leaves in question are taken again in float64. So what is found is what a dense float64 computation
finds, in the memory of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimo.errors import InputError

PRODUCT = 512
"""Rows of one matrix product: as many as a CPU's cache holds while queries pass over them."""

PRODUCTS = 2**22
"""Most products that are held at once, in number."""

REFINED = 2**24
"""Entries of rows that are taken again in float64 together."""


@dataclass(frozen=True)
class Extremes:
    """The rows at both ends of each query's order; equal products in the order of the rows.

    Args:
        highest: ``[Q, k]`` float64, the largest products, falling.
        highest_at: ``[Q, k]`` int64, their rows.
        lowest, lowest_at: the same of the smallest, rising.
    """

    highest: Tensor
    highest_at: Tensor
    lowest: Tensor
    lowest_at: Tensor


def extremes(
    queries: Tensor,
    blocks: Iterable[tuple[Tensor, Tensor]],
    k: int,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Extremes:
    """Return the k rows with the largest products with each query, and the k with the smallest.

    Args:
        queries: ``[Q, K]``; products are those of their float32 values.
        blocks: consecutive rows ``[n, K]`` of any floating-point type, with their lengths ``[n]``.
        k: how many at each end; all where there are fewer rows.
        scale: rows ``[n, K]`` -> a positive factor ``[n]`` of each one's products; ones when None.

    Raises:
        InputError: k below 1, queries that are not finite, or rows of another width.
    """
    if k < 1:
        raise InputError("k", f"expected at least 1 but got {k}")
    queries = queries.float()
    if not torch.isfinite(queries).all():
        raise InputError("queries", "are not finite")
    ends = (_End(1, queries, k), _End(-1, queries, k))
    approximate = _Products(queries)
    size = max(PRODUCT, PRODUCTS // len(queries) // PRODUCT * PRODUCT)
    first = 0
    for block, lengths in blocks:
        if block.shape[1] != queries.shape[1]:
            raise InputError("queries", f"have {queries.shape[1]} entries, but rows have {block.shape[1]}")
        for start in range(0, len(block), size):
            rows = block[start : start + size]
            factor = None if scale is None else scale(rows).to(queries)
            sizes = lengths[start : start + size].to(queries)
            _offer(ends, approximate, rows, sizes, factor, first + start)
        first += len(block)
    n = min(k, first)
    high, low = ends
    return Extremes(high.values[:, :n], high.index[:, :n], -low.values[:, :n], low.index[:, :n])


def _offer(
    ends: tuple[_End, _End],
    approximate: _Products,
    rows: Tensor,
    sizes: Tensor,
    factor: Tensor | None,
    first: int,
) -> None:
    """Offer a block's rows to both ends, those in question by their float64 products.

    Args:
        sizes: ``[n]``, the rows' lengths.
        factor: ``[n]``, of their products.
        first: the first row's number among all.
    """
    products, error = approximate(rows)
    if factor is not None:
        products, sizes = products * factor, sizes * factor
    largest = error * sizes.max()
    least = [end.least(products, largest) for end in ends]
    asked = (products >= (least[0] - largest)[:, None]) | (-products >= (least[1] - largest)[:, None])
    query, row = asked.nonzero(as_tuple=True)

    def inside(some: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pairs in question, now that the rows' own sizes and closer products are known."""
        bound = error[query] * sizes[row]
        kept = (some >= least[0][query] - bound) | (-some >= least[1][query] - bound)
        return query[kept], row[kept]

    query, row = inside(products[query, row], error)
    if approximate.rounds(rows) and len(query):
        which, place = row.unique(return_inverse=True)
        closer = (approximate.queries @ rows[which].float().T)[query, place]
        query, row = inside(closer if factor is None else closer * factor[row], approximate.error)
    if not len(query):
        return
    values = _refined(approximate.queries, rows, query, row)
    if factor is not None:
        values = values * factor[row].double()
    for end in ends:
        end.take(query, values, row + first)


class _Products:
    """Products of queries with rows, and a bound of their errors.

    bfloat16 is multiplied as it is where a CPU has instructions for that (adding up in float32), at twice the
    speed of float32 or more; the queries' own rounding is then the larger part of the error.

    Args:
        queries: ``[Q, K]`` float32.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries, self.rounded = queries, queries.bfloat16()
        self.native = _multiplies_bfloat16(queries.device)
        lengths = queries.norm(dim=1)
        # a sum of K products in float32, or of factors of 8 bits where the process allows that
        sums = queries.shape[1] * 2.0**-23
        exact = torch.get_float32_matmul_precision() == "highest"
        self.error = lengths * (sums if exact else sums + 2.0**-6)
        self.rounded_error = lengths * sums + (queries - self.rounded.float()).norm(dim=1)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[Q, n]`` float32, and each query's bound ``[Q]`` of their errors per length of a row.

        bfloat16 products are besides rounded to 8 bits at the end, for which :meth:`_End.least` allows.
        """
        found = torch.empty(len(self.queries), len(rows), dtype=torch.float32, device=self.queries.device)
        native = self.rounds(rows)
        for start in range(0, len(rows), PRODUCT):
            some, into = rows[start : start + PRODUCT], found[:, start : start + PRODUCT]
            into.copy_(self.rounded @ some.T if native else self.queries @ some.to(self.queries).T)
        return found, self.rounded_error if native else self.error

    def rounds(self, rows: Tensor) -> bool:
        """Whether products with these rows are those of rounded queries."""
        return self.native and rows.dtype == torch.bfloat16


class _End:
    """The best rows so far at one end of each query's order.

    Args:
        sign: 1 for the largest products, -1 for the smallest.
    """

    def __init__(self, sign: int, queries: Tensor, k: int) -> None:
        shape, device = (len(queries), k), queries.device
        self.sign = sign
        self.values = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.index = torch.full(shape, -1, dtype=torch.int64, device=device)

    def least(self, products: Tensor, error: Tensor) -> Tensor:
        """Return the least product ``[Q]`` that may be among the k best, but for its error.

        Args:
            products: ``[Q, n]``, approximate ones.
            error: ``[Q]``, their largest.
        """
        k, least = self.values.shape[1], self.values[:, -1].float()
        if self.index[0, -1] < 0 and products.shape[1] >= k:  # not k rows yet
            here = (products * self.sign).topk(k).values[:, -1]
            least = torch.maximum(least, here - here.abs() * 2.0**-7 - error)
        # rounding to 8 bits is monotone, so that a product as large as this one is not rounded below that
        return least - least.abs() * 2.0**-7

    def take(self, query: Tensor, values: Tensor, index: Tensor) -> None:
        """Take rows' products in; of equal ones, those that came first stay."""
        count, k = self.values.shape
        better = self.sign * values > self.values[query, -1]
        if not better.any():
            return
        own = torch.arange(count, device=query.device).repeat_interleave(k)
        query = torch.cat([own, query[better]])
        values = torch.cat([self.values.flatten(), self.sign * values[better]])
        index = torch.cat([self.index.flatten(), index[better]])
        order = values.argsort(descending=True, stable=True)
        order = order[query[order].argsort(stable=True)]
        query = query[order]
        counts = query.bincount(minlength=count)
        rank = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        kept = rank < k
        at = (query[kept], rank[kept])
        self.values[at], self.index[at] = values[order][kept], index[order][kept]


def _refined(queries: Tensor, rows: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Return the products of pairs of a query and a row, in float64."""
    if len(query) * 8 > len(queries) * len(rows):  # most of a block
        parts = [queries.double() @ part.to(queries.device).double().T for part in rows.split(PRODUCT)]
        return torch.cat(parts, 1)[query, row]
    each = max(1, REFINED // queries.shape[1])
    found = []
    for q, r in zip(query.split(each), row.split(each), strict=True):
        some = rows[r.to(rows.device)].to(queries.device).double()
        found.append((some * queries[q].double()).sum(1))
    return torch.cat(found)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied by instructions of its own, with sums in float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16"))
