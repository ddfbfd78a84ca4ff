"""The benchmark's results for loggers: a run for each setting, under the names that a study's have."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fimo.app.loggers import logged
from fimo.bench.gold_standard import GoldStandard
from fimo.bench.leader_board import Board
from fimo.bench.settings import Setting
from fimo.evaluation.metrics import DEFAULT
from fimo.live.agreement import STEP
from fimo.live.log import About, Log
from fimo.reporting.flat import flat

FOLDER = "logged"
"""In the folder of gold standards."""


def tell(gold: GoldStandard, results: pd.DataFrame, folder: Path, setting: Setting, logger: str) -> Path:
    """Log how methods did in a setting: what a study logs of them, so that one dashboard has both.

    History against :data:`STEP`: ``agreement/METHOD/METRIC``, ``sem_models/…``, ``ceiling/METRIC``,
    ``ceiling_lower/METRIC``. Summary: ``last/METHOD/METRIC``, ``best/METRIC``, ``best_method/METRIC``,
    ``last_ceiling/METRIC``, of the first metric. A table ``methods``. The same results are logged once:
    others of the same setting are another run.

    Args:
        results: rows of ``results.csv`` of the setting, of the metrics of agreement.
        folder: of gold standards.
        logger: a choice of ``logger``, such as wandb.

    Returns:
        The folder of the run.
    """
    content = results.to_csv(index=False)
    place = folder / FOLDER / gold.name / hashlib.sha256(content.encode()).hexdigest()[:12]
    config = setting.config(0, folder / "store", logger=logger)
    place.mkdir(parents=True, exist_ok=True)
    known = flat({"setting": gold.name, "about": gold.card["about"], **gold.card["config"]})
    with logged(config, place) as log:
        log.begin(About(place, f"benchmark: {gold.name}", known, ["benchmark", gold.name.partition("/")[0]]))
        log.stage("evaluation")
        _points(results, log)
        log.summarise(_summary(results))
        log.show(partial(_media, results))
    return place


def rows_of(folder: Path, settings: list[str]) -> dict[str, pd.DataFrame]:
    """Return the rows of all metrics of agreement by setting, of the gold standards that are there."""
    boards = [Board.of(folder, metric, settings) for metric in DEFAULT]
    together = pd.concat([board.results for board in boards], ignore_index=True)
    return {str(name): rows for name, rows in together.groupby("setting")}


def _points(results: pd.DataFrame, log: Log) -> None:
    for step, rows in results.groupby("step"):
        values: dict[str, float] = {}
        for row in rows.to_dict("records"):
            metric = row["metric"]
            values[f"agreement/{row['method']}/{metric}"] = row["mean"]
            values[f"sem_models/{row['method']}/{metric}"] = row["sem_models"]
            values[f"ceiling/{metric}"] = row["ceiling_upper"]
            values[f"ceiling_lower/{metric}"] = row["ceiling_lower"]
        log.log({name: v for name, v in values.items() if math.isfinite(v)}, STEP, float(str(step)))


def _at_end(results: pd.DataFrame) -> pd.DataFrame:
    """Return rows after all further training, the best method first."""
    last: pd.DataFrame = results[results["step"] == results["step"].max()]
    return last.sort_values("mean", ascending=False)


def _summary(results: pd.DataFrame) -> dict[str, Any]:
    metric = DEFAULT[0]
    rows = _at_end(results[results["metric"] == metric])
    found = {f"last/{row['method']}/{metric}": row["mean"] for row in rows.to_dict("records")}
    best = rows.iloc[0]
    return found | {
        f"best/{metric}": best["mean"],
        f"best_method/{metric}": best["method"],
        f"last_ceiling/{metric}": best["ceiling_upper"],
        "final_models": int(best["final_models"]),
    }


def _media(results: pd.DataFrame) -> dict[str, Any]:
    import wandb

    wide = _at_end(results).pivot(index="method", columns="metric", values="mean").reset_index()
    seconds = results.groupby("method")[["seconds", "share_of_cost"]].first().reset_index()
    table = wide.merge(seconds, on="method").sort_values(DEFAULT[0], ascending=False)
    return {"methods": wandb.Table(dataframe=table)}
