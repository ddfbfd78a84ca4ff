"""What a run found, for its loggers: points, a summary, and tables, pages and figures for W&B."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fimo.evaluation.ceiling import TOO_LOW
from fimo.live.agreement import STEP
from fimo.live.log import Log
from fimo.reporting.curves import agreement_table, distance_table
from fimo.reporting.findings import at_last_point, influences
from fimo.reporting.instance_table import InstanceDisplay
from fimo.reporting.results import Results, plain

FIGURES = ("agreement", "seeds", "cost")
"""Those of the report that a dashboard has, of the first metric."""


def tell(log: Log, results: Results, report: Path | None = None) -> None:
    """Log a run's findings.

    History, against :data:`STEP`: ``agreement/METHOD/METRIC``, ``sem/…``, ``ceiling/METRIC``,
    ``ceiling_lower/METRIC``, ``distance``, and of several final models ``sem_models/…``.
    Summary: :func:`summary`. Media: :func:`media`.

    Args:
        report: its page.
    """
    for record in history(results):
        log.log({k: v for k, v in record.items() if k != STEP}, STEP, record[STEP])
    found = summary(results)
    log.summarise(found)
    ceiling = found.get(f"last_ceiling/{results.metrics[0]}")
    if ceiling is not None and ceiling < TOO_LOW:
        log.alert("too few seeds", f"the noise ceiling is {ceiling:.2f}: methods can't be told apart")
    log.show(partial(media, results, report))


def summary(results: Results) -> dict[str, Any]:
    """Return what a sweep's runs are sorted by: agreement at the last point, by the first metric alone."""
    found: dict[str, Any] = {f"final_model/{k}": v for k, v in results.final_model.items()}
    metric = results.metrics[0]
    rows = at_last_point(results, metric)
    found |= {f"last/{row['method']}/{metric}": row["mean"] for row in rows.to_dict("records")}
    found |= {
        f"last_ceiling/{metric}": rows["ceiling"].iloc[0],
        f"last_ceiling_lower/{metric}": rows["ceiling_lower"].iloc[0],
        f"best/{metric}": rows["mean"].iloc[0],
        f"best_method/{metric}": rows["method"].iloc[0],
    }
    if (models := int(rows["final_models"].max())) > 1:
        found["final_models"] = models
    seconds = {row["stage"]: row["seconds"] for row in results.cost.to_dict("records")}
    methods = sum(value for stage, value in seconds.items() if stage in results.scores)
    stages = {stage: value for stage, value in seconds.items() if stage not in results.scores}
    found |= {f"cost/{stage}/seconds": value for stage, value in [*stages.items(), ("methods", methods)]}
    for task, table in results.tasks.items():
        curve = results.curve(task)
        last = table[table["step"] == table["step"].max()] if "step" in table else table
        for row in last.to_dict("records"):
            name = f"{task}/{row['method']}" + (f"/{row[curve.x]}" if curve and curve.x != "epoch" else "")
            found[name] = row["mean"]
    found["warnings"] = list(results.warnings)
    return {name: plain(value) for name, value in found.items()}


def history(results: Results) -> list[dict[str, float]]:
    """Return one record per evaluation point, each with its amount of further training."""
    points = zip(results.sensitivity.step.tolist(), results.sensitivity.epoch.tolist(), strict=True)
    records: dict[int, dict[str, float]] = {
        step: {STEP: step, "further_training/epoch": epoch} for step, epoch in points
    }
    for metric in results.metrics:
        for row in agreement_table(results, metric).to_dict("records"):
            record = records[int(row["step"])]
            record[f"agreement/{row['method']}/{metric}"] = row["mean"]
            record[f"sem/{row['method']}/{metric}"] = row["sem"]
            if row["final_models"] > 1:
                record[f"sem_models/{row['method']}/{metric}"] = row["sem_models"]
            record[f"ceiling/{metric}"] = row["ceiling"]
            record[f"ceiling_lower/{metric}"] = row["ceiling_lower"]
    distance = distance_table(results)
    for row in [] if distance is None else distance.to_dict("records"):
        records[int(row["step"])]["distance"] = row["mean"]
    return [{k: v for k, v in record.items() if math.isfinite(v)} for record in records.values()]


def media(results: Results, report: Path | None = None) -> dict[str, Any]:
    """Return W&B's media: tables of methods and of instances, the report, interactive figures."""
    import wandb

    from fimo.reporting.interactive import all_figures

    found: dict[str, Any] = {}
    for name, (columns, rows) in {
        "methods": method_rows(results),
        "instances": instance_rows(results),
    }.items():
        if rows:
            found[name] = wandb.Table(columns=[*columns], data=[*cells(rows)], allow_mixed_types=True)
    if report is not None and report.exists():
        found["report"] = wandb.Html(report.read_text(), inject=False)
    metric, figures = results.metrics[0], all_figures([results])
    for name in FIGURES:
        if (figure := figures.get(name, {}).get(metric)) is not None:
            # W&B's page is white or dark; a template with its own background reads well on both
            figure.update_layout(template="plotly_white", paper_bgcolor="white", plot_bgcolor="white")
            found[f"figures/{name}/{metric}"] = wandb.Plotly(figure)
    return found


def method_rows(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return a table with a row for each method: agreement by every metric at the last point, and cost."""
    rows: dict[str, dict[str, Any]] = {}
    for metric in results.metrics:
        for row in at_last_point(results, metric).to_dict("records"):
            about = rows.setdefault(
                row["method"],
                {"method": row["method"], "access": row["access"], "followed_seeds": row["followed_seeds"]},
            )
            about |= {metric: row["mean"], f"{metric} sem": row["sem"], f"{metric} ceiling": row["ceiling"]}
    for cost in results.cost.to_dict("records"):
        if cost["stage"] in rows:
            rows[cost["stage"]] |= {str(k): v for k, v in cost.items() if k != "stage"}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return columns, [[_finite(row.get(name)) for name in columns] for row in rows.values()]


def instance_rows(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return a table of the instances that the report shows, a column for each feature.

    ``effect`` is a training instance's on the mean of what was measured at the last evaluation point.
    """
    helpful, harmful = influences(results, k=len(results.sensitivity.left_out))
    effects = {row.index: row for row in [*helpful, *harmful]}
    shown = [
        (split, index, d) for split in ("train", "test") for index, d in results.shown.get(split, {}).items()
    ]
    names, beside = content([d for _, _, d in shown])
    columns = ["split", "row", "id", "effect", "standard_error", "target", "prediction", "loss"]
    rows = []
    for split, index, d in shown:
        effect = effects.get(index) if split == "train" else None
        numbers = [effect.effect, effect.error] if effect else [None, None]
        values = [
            split,
            index if d.data_row is None else d.data_row,
            d.id,
            *numbers,
            d.target,
            d.prediction,
            d.loss,
        ]
        rows.append([*map(_finite, values), *beside(d)])
    return [*columns, *names], rows


def content(
    displays: Iterable[InstanceDisplay],
) -> tuple[list[str], Callable[[InstanceDisplay], list[Any]]]:
    """Return the columns of what instances hold (text, image, features), and what makes a row of them."""
    displays = list(displays)
    features = list(dict.fromkeys(name for d in displays for name in d.row or {}))
    kinds = [kind for kind in ("text", "image") if any(getattr(d, kind) for d in displays)]

    def row(d: InstanceDisplay) -> list[Any]:
        held = [d.text if kind == "text" else partial(_picture, d) for kind in kinds]
        return [*held, *((d.row or {}).get(name) for name in features)]

    return [*kinds, *features], row


def cells(rows: Iterable[Iterable[Any]]) -> list[list[Any]]:
    """Return rows with their pictures made."""
    return [[cell() if callable(cell) else cell for cell in row] for row in rows]


def _picture(display: InstanceDisplay) -> Any:
    """Return an instance's image as W&B's."""
    if display.image is None:
        return None
    import wandb
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(display.image.partition(",")[2])))
    return wandb.Image(picture.convert("RGB"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
