"""Exact search of kept rows: seconds for the k rows at both ends of each query's order.

    python benchmarks/search.py [--rows 1000000] [--width 4096] [--queries 100] [--k 10]
        [--dtype bfloat16] [--folder FOLDER] [--threads 1] [--times 3] [--sample 3]

makes files of random rows in FOLDER (a temporary one by default; those that are there are used), searches
them, and prints the seconds of each search: the first reads from the disk what memory doesn't hold. Answers
of ``--sample`` queries are compared with a dense float64 computation. Peak memory is what the process
allocates; files that are mapped are the system's cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from fimo.curvature.search import Extremes, extremes
from fimo.store.row_files import RowFiles


def rows_of(start: int, stop: int, width: int) -> Tensor:
    """Return rows of unlike lengths, some of them copies of others: ties."""
    generator = torch.Generator().manual_seed(start)
    rows = torch.randn(stop - start, width, generator=generator)
    rows *= torch.randn(stop - start, 1, generator=generator).exp()
    rows[1::100] = rows[0]
    return rows


def dense(queries: Tensor, files: RowFiles, k: int) -> tuple[Tensor, Tensor]:
    """Return the rows ``[Q, k]`` at both ends, by all products in float64."""
    products = torch.cat([(rows.double() @ queries.double().T) for rows, _ in files.blocks()]).T
    order = products.argsort(dim=1, descending=True, stable=True)
    return products.gather(1, order[:, :k]), products.gather(1, order.flip(1)[:, :k])


def verified(found: Extremes, queries: Tensor, files: RowFiles, k: int) -> float:
    """Return the largest relative difference of both ends' values, and of the named rows' products."""
    highest, lowest = dense(queries, files, k)
    worst = 0.0
    for values, at, expected in (
        (found.highest, found.highest_at, highest),
        (found.lowest, found.lowest_at, lowest),
    ):
        own = torch.stack([files.some(i).double() @ q.double() for i, q in zip(at, queries, strict=True)])
        assert all(len(set(row.tolist())) == k for row in at), "a row is named twice"
        for mine in (values, own):
            worst = max(worst, ((mine - expected).abs() / expected.abs()).max().item())
    return worst


def allocated_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000)
    add("--width", type=int, default=4096)
    add("--queries", type=int, default=100)
    add("--k", type=int, default=10)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--folder", type=Path)
    add("--threads", type=int, default=1)
    add("--times", type=int, default=3)
    add("--sample", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="fimo-search-") as name:
        folder = options.folder or Path(name)
        files = RowFiles(folder, options.rows, options.width, getattr(torch, options.dtype))
        began = time.perf_counter()
        made = files.make(lambda start, stop: rows_of(start, stop, options.width))
        size = options.rows * options.width * files.dtype.itemsize / 2**30
        print(f"{options.rows:,} x {options.width:,} {options.dtype}, {size:.1f} GiB; "
              f"{made:,} rows made in {time.perf_counter() - began:.0f} s")  # fmt: skip
        queries = torch.randn(
            options.queries, options.width, generator=torch.Generator().manual_seed(10**6 + 1)
        )
        before = allocated_mb()
        for k in range(options.times):
            began, worked = time.perf_counter(), time.process_time()
            found = extremes(queries, files.blocks(), options.k)
            print(f"search {k}: {time.perf_counter() - began:.2f} s, of a processor "
                  f"{time.process_time() - worked:.2f} s; {options.threads} threads", flush=True)  # fmt: skip
        print(f"allocated: {allocated_mb() - before:.0f} MB more than before")
        chosen = torch.arange(0, options.queries, max(1, options.queries // options.sample))[: options.sample]
        some = Extremes(
            *(t[chosen] for t in (found.highest, found.highest_at, found.lowest, found.lowest_at))
        )
        worst = verified(some, queries[chosen], files, options.k)
        print(f"{len(chosen)} queries against a dense float64 computation: {worst:.1e} relative difference")
        assert worst < 1e-9


if __name__ == "__main__":
    main()
