"""The leader board: methods over all settings, and in each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fimo.bench.gold_standard import GoldStandard, load, made
from fimo.bench.scoring import BY_FINAL_MODEL, COLUMNS, FINAL_MODELS, RESULTS, percent, with_error
from fimo.errors import InputError
from fimo.evaluation.over_models import probability_better
from fimo.reporting.plain_text import table as plain_table

WIDE = 10_000
"""Columns: nothing is cut."""


@dataclass(frozen=True)
class Board:
    """What is known of methods, of one metric.

    Args:
        metric: of agreement.
        results: rows of ``results.csv`` that are of the gold standards that are there.
        by_final_model: the same of ``final_models.csv``.
        golds: the gold standards, by setting.
        outdated: ``setting, method`` of other rows, which were judged by earlier gold standards.
    """

    metric: str
    results: pd.DataFrame
    by_final_model: pd.DataFrame
    golds: Mapping[str, GoldStandard]
    outdated: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, metric: str = "cosine", settings: Sequence[str] = ()) -> Board:
        """Read the results that are in a folder of gold standards.

        Args:
            settings: of these only; all when empty.

        Raises:
            InputError: there are none, or none of such a metric.
        """
        if not (folder / RESULTS).exists():
            raise InputError("--folder", f"{folder} holds no {RESULTS}; fimo bench score makes it")
        names = settings or made(folder)
        golds = {name: load(name, folder) for name in names}
        files = ((RESULTS, COLUMNS), (FINAL_MODELS, BY_FINAL_MODEL))
        tables = [pd.read_csv(folder / name).reindex(columns=columns) for name, columns in files]
        if metric not in set(tables[0]["metric"]):
            there = ", ".join(sorted(set(tables[0]["metric"])))
            raise InputError("--metric", f"there are no results of {metric!r}; there are {there}")
        identity = {name: gold.identity for name, gold in golds.items()}
        known = [t[t["setting"].isin(golds) & (t["metric"] == metric)] for t in tables]
        fresh = [t[t["setting"].map(identity) == t["gold_standard"]] for t in known]
        old = known[0].drop(fresh[0].index)
        pairs = dict.fromkeys(f"{s}, {m}" for s, m in zip(old["setting"], old["method"], strict=True))
        if fresh[0].empty:
            raise InputError("--folder", f"{folder} holds no results of the gold standards that are there")
        return cls(metric, fresh[0], fresh[1], golds, tuple(pairs))

    @property
    def settings(self) -> list[str]:
        """Those with results, by name."""
        return [name for name in sorted(self.golds) if name in set(self.results["setting"])]

    @property
    def ranking(self) -> pd.DataFrame:
        """Methods over settings, best first.

        Returns:
            ``settings`` (how many), ``share`` of the upper ceiling, a mean over evaluation points and then
            over settings, the same at the ``first`` and the ``last`` point, the median ``share_of_cost``
            and the largest ``memory_mb``, by ``method``. Methods that were judged in fewer settings come
            last.
        """
        rows = self.results.assign(share=self.results["mean"] / self.results["ceiling_upper"])
        keys = ["method", "setting"]
        by_setting = rows.groupby(keys).agg(
            share=("share", "mean"), first=("share", "first"), last=("share", "last"),
            share_of_cost=("share_of_cost", "first"), memory_mb=("memory_mb", "first"),
        ).reset_index()  # fmt: skip
        found = by_setting.groupby("method").agg(
            settings=("setting", "nunique"), share=("share", "mean"), first=("first", "mean"),
            last=("last", "mean"), share_of_cost=("share_of_cost", "median"), memory_mb=("memory_mb", "max"),
        )  # fmt: skip
        return found.sort_values(["settings", "share"], ascending=False)

    def of_setting(self, name: str) -> pd.DataFrame:
        """Return how methods did in a setting, best first.

        Returns:
            ``mean``, over evaluation points and final models; ``better``, the probability that the method
            beats the next one, paired over final models; ``seconds`` of one final model;
            ``share_of_cost``; ``memory_mb``; by ``method``.
        """
        rows = self.results[self.results["setting"] == name]
        found = rows.groupby("method").agg(
            mean=("mean", "mean"), seconds=("seconds", "first"), share_of_cost=("share_of_cost", "first"),
            memory_mb=("memory_mb", "first"),
        ).sort_values("mean", ascending=False)  # fmt: skip
        single = self.by_final_model[self.by_final_model["setting"] == name]
        values = single.groupby(["method", "final_model"])["mean"].mean().unstack().loc[found.index]
        better = probability_better(torch.tensor(values.to_numpy())).numpy()
        after = np.append(np.diagonal(better, 1), np.nan)
        return found.assign(better=after)

    def points(self, name: str) -> list[int]:
        """Return the steps of a setting that tables show: the first, the middle and the last."""
        steps = sorted(self.results.loc[self.results["setting"] == name, "step"].unique().tolist())
        return [steps[e] for e in sorted({0, (len(steps) - 1) // 2, len(steps) - 1})]


def text(board: Board) -> str:
    """Return the leader board for a terminal."""
    header = ["method", "settings", "of the ceiling", "first", "last", "cost", "MB"]
    lines = [header, *ranking_rows(board)]
    notes = [f"judged by an earlier gold standard, left out: {pair}" for pair in board.outdated]
    said = f"{board.metric} as a share of the upper noise ceiling, over {len(board.settings)} settings"
    return "\n".join(
        [f"{said}; cost as a share of the gold standard's", "", *plain_table(lines, WIDE), *notes]
    )


def ranking_rows(board: Board) -> list[list[str]]:
    """Return the cells of the ranking."""
    count = len(board.settings)
    return [
        [
            row["method"], f"{row['settings']} of {count}",
            *(with_error(row[share], math.nan) for share in ("share", "first", "last")),
            percent(row["share_of_cost"]), megabytes(row["memory_mb"]),
        ]
        for row in board.ranking.reset_index().to_dict("records")
    ]  # fmt: skip


def megabytes(memory: float) -> str:
    """Return megabytes without a fraction; nothing where they were not measured."""
    return "" if math.isnan(memory) else f"{memory:,.0f}"


def setting_rows(board: Board, name: str) -> Iterator[list[str]]:
    """Yield the cells of a setting's table: the ceilings, then methods, best first."""
    rows = board.results[board.results["setting"] == name].set_index(["method", "step"])
    points, methods = board.points(name), board.of_setting(name)
    best = [rows.loc[(methods.index[0], step)] for step in points]
    yield [
        "*noise ceilings*",
        *(f"{row['ceiling_lower']:.3f} to {row['ceiling_upper']:.3f}" for row in best),
        *([""] * 4),
    ]
    for found in methods.reset_index().to_dict("records"):
        cells = [rows.loc[(found["method"], step)] for step in points]
        shown = [with_error(cell["mean"], cell["sem_models"]) for cell in cells]
        better = "" if math.isnan(found["better"]) else f"{found['better']:.2f}"
        cost = [f"{found['seconds']:.2f}", percent(found["share_of_cost"]), megabytes(found["memory_mb"])]
        yield [f"`{found['method']}`", *shown, better, *cost]
