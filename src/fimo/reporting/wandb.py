"""A run's findings in Weights & Biases: offline unless asked otherwise, one W&B run per job."""

from __future__ import annotations

import base64
import functools
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimo.errors import InputError
from fimo.reporting.curves import agreement_table, distance_table
from fimo.reporting.findings import at_last_point, influences
from fimo.reporting.flat import flat
from fimo.reporting.instance_table import InstanceDisplay
from fimo.reporting.results import Results, plain

if TYPE_CHECKING:
    import wandb

STEP = "further_training/step"
"""The x-axis of everything that depends on the amount of further training."""

MODES = ("offline", "online", "disabled")
CONNECT_SECONDS = 20
"""How long an online run waits for a server before it is written offline."""

log = logging.getLogger(__name__)


def log_run(results: Results, settings: Any, run_dir: str | Path) -> None:
    """Log a run's findings, and print the command that syncs them where they were written offline.

    Config: the whole configuration by dotted keys. History: ``agreement/METHOD/METRIC``, ``sem/…``,
    ``ceiling/METRIC``, ``ceiling_lower/METRIC`` and ``distance`` at each amount of further training.
    Summary: agreement at the last point, ceilings, whose seeds were followed, cost, final model. Media: an
    interactive figure of each kind, a table of instances.

    Args:
        settings: mapping or object with ``enabled, mode, project, entity, group, name, tags``, all optional.
            ``group`` is the sweep's folder when null; ``name`` the results'.
        run_dir: the run's folder; W&B's files go to ``wandb`` in it.

    Raises:
        InputError: an unknown mode. Nothing else: a run is not lost because its logging failed.
    """
    mode = _setting(settings, "mode", "offline")
    if mode not in MODES:
        raise InputError("logger.mode", f"expected one of {', '.join(MODES)} but got {mode!r}")
    if not _setting(settings, "enabled", True) or mode == "disabled":
        return
    try:
        run = _start(results, settings, Path(run_dir), mode)
    except Exception as error:
        log.warning("W&B could not start, so nothing was logged to it: %s", error)
        return
    exit_code = 1
    try:
        _log_history(run, results)
        _log_media(run, results)
        run.summary.update(summary(results))
        exit_code = 0
    except Exception as error:
        log.warning("logging to W&B stopped early: %s", error)
    finally:
        run.finish(exit_code=exit_code)  # or the next job of a sweep would be written into this run
    if run.settings.mode == "offline" or run.offline:
        log.info("W&B was written offline; to sync it: wandb sync %s", _to_sync(Path(run_dir)))


def summary(results: Results) -> dict[str, Any]:
    """Return what a table of runs is sorted and filtered by."""
    found: dict[str, Any] = {f"final_model/{k}": v for k, v in results.final_model.items()}
    for metric in results.metrics:
        rows = at_last_point(results, metric)
        found |= {
            f"last/{method}/{metric}": mean for method, mean in zip(rows["method"], rows["mean"], strict=True)
        }
        found[f"last_ceiling/{metric}"] = rows["ceiling"].iloc[0]
        found[f"last_ceiling_lower/{metric}"] = rows["ceiling_lower"].iloc[0]
        followed = zip(rows["method"], rows["followed_seeds"], strict=True)
        found |= {f"followed_seeds/{method}": how for method, how in followed if how != "none"}
        found[f"best/{metric}"] = rows["mean"].iloc[0]
        found[f"best_method/{metric}"] = rows["method"].iloc[0]
    for row in results.cost.to_dict("records"):
        for column in ("seconds", "peak_memory_mb", "gradient_evaluations", "reused"):
            found[f"cost/{row['stage']}/{column}"] = row[column]
    for task, table in results.tasks.items():
        curve = results.curve(task)
        last = table[table["step"] == table["step"].max()] if "step" in table else table
        for row in last.to_dict("records"):
            name = f"{task}/{row['method']}" + (f"/{row[curve.x]}" if curve and curve.x != "epoch" else "")
            found[name] = row["mean"]
    helpful, harmful = influences(results, k=1)
    found |= {"most_helpful": helpful[0].index} if helpful else {}
    found |= {"most_harmful": harmful[0].index} if harmful else {}
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
            record[f"ceiling/{metric}"] = row["ceiling"]
            record[f"ceiling_lower/{metric}"] = row["ceiling_lower"]
    distance = distance_table(results)
    for row in [] if distance is None else distance.to_dict("records"):
        records[int(row["step"])]["distance"] = row["mean"]
    return [{k: v for k, v in record.items() if math.isfinite(v)} for record in records.values()]


def _start(results: Results, settings: Any, run_dir: Path, mode: str) -> wandb.Run:
    import wandb

    sweep, overrides = _job(run_dir)
    if mode == "online" and not wandb.api.api_key:
        log.warning("W&B: mode is online but nobody is logged in (wandb login); writing offline")
        mode = "offline"
    run_dir.mkdir(parents=True, exist_ok=True)

    def init(mode: str) -> wandb.Run:
        return wandb.init(
            project=_setting(settings, "project", None) or "fimo",
            entity=_setting(settings, "entity", None),
            group=_setting(settings, "group", None) or sweep,
            name=_setting(settings, "name", None) or results.name,
            tags=_tags(results, settings),
            notes=" ".join(overrides) or None,
            job_type="job of a sweep" if sweep else "run",
            config=plain(flat(results.config)),
            dir=run_dir,
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True, console="off", save_code=False, disable_git=True, x_disable_stats=True,
                init_timeout=CONNECT_SECONDS,
            ),
        )  # fmt: skip

    try:
        return init(mode)
    except wandb.Error as error:
        if mode != "online":
            raise
        log.warning("W&B: no connection (%s); writing offline", error)
        wandb.teardown()
        return init("offline")


def _log_history(run: wandb.Run, results: Results) -> None:
    run.define_metric(STEP, hidden=True)
    for pattern in (
        "agreement/*",
        "sem/*",
        "ceiling/*",
        "ceiling_lower/*",
        "distance",
        "further_training/epoch",
    ):
        run.define_metric(pattern, step_metric=STEP)
    for record in history(results):
        run.log(record)


def _log_media(run: wandb.Run, results: Results) -> None:
    import wandb

    from fimo.reporting.interactive import all_figures

    media: dict[str, Any] = {}
    for name, by_metric in all_figures([results]).items():
        for metric, figure in by_metric.items():
            # W&B's page is white or dark; a template with its own background reads well on both
            figure.update_layout(template="plotly_white", paper_bgcolor="white", plot_bgcolor="white")
            media["/".join(["figures", name, metric]).rstrip("/")] = wandb.Plotly(figure)
    columns, rows = instance_rows(results)
    if rows:
        media["instances"] = wandb.Table(columns=[*columns], data=[*rows], allow_mixed_types=True)
    run.log(media)


def instance_rows(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Return a table of the instances that the report shows, a column for each feature.

    ``effect`` is a training instance's on the mean test loss at the last evaluation point.
    """
    helpful, harmful = influences(results, k=len(results.sensitivity.left_out))
    effects = {row.index: row for row in [*helpful, *harmful]}
    shown = [
        (split, index, d) for split in ("train", "test") for index, d in results.shown.get(split, {}).items()
    ]
    features = list(dict.fromkeys(name for _, _, d in shown for name in d.row or {}))
    content = [kind for kind in ("text", "image") if any(getattr(d, kind) for _, _, d in shown)]
    columns = ["split", "row", "id", "effect", "standard_error", "target", "prediction", "loss"]
    rows = []
    for split, index, d in shown:
        effect = effects.get(index) if split == "train" else None
        numbers = [effect.effect, effect.error] if effect else [None, None]
        cells = [
            split,
            index if d.data_row is None else d.data_row,
            d.id,
            *numbers,
            d.target,
            d.prediction,
            d.loss,
        ]
        cells += [_content(d, kind) for kind in content]
        rows.append([*map(_finite, cells), *((d.row or {}).get(name) for name in features)])
    return [*columns, *content, *features], rows


def _content(display: InstanceDisplay, kind: str) -> Any:
    if kind == "text" or display.image is None:
        return display.text if kind == "text" else None
    import wandb
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(display.image.partition(",")[2])))
    return wandb.Image(picture.convert("RGB"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tags(results: Results, settings: Any) -> list[str]:
    """Return the user's tags, the data set and each method, which W&B limits to 64 characters."""
    own = list(_setting(settings, "tags", None) or [])
    found = [*own, str(results.dataset.get("name") or ""), *results.scores]
    return [tag[:64] for tag in dict.fromkeys(found) if tag]


def _job(run_dir: Path) -> tuple[str | None, list[str]]:
    """Return the sweep a job belongs to (None for a single run) and its overrides, as Hydra wrote them."""
    path = run_dir / ".hydra" / "hydra.yaml"
    if not path.exists():
        return None, []
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(path).hydra
    sweep = None
    if str(hydra.mode).endswith("MULTIRUN"):
        sweep = Path(str(OmegaConf.to_container(hydra.sweep, resolve=False)["dir"])).name  # type: ignore[index,call-overload]
        if "$" in sweep:  # the folder's name holds the time, which only the job's own folder tells
            sweep = run_dir.resolve().parent.name
    return sweep, [str(o) for o in hydra.overrides.task]


def _to_sync(run_dir: Path) -> str:
    """Return what ``wandb sync`` is given: a run's files, or all jobs of a sweep at once."""
    sweep, _ = _job(run_dir)
    return f"{run_dir.parent}/*/wandb/offline-run-*" if sweep else f"{run_dir}/wandb/offline-run-*"


def _setting(settings: Any, key: str, default: Any) -> Any:
    if settings is None:
        return default
    by_name = settings.get if isinstance(settings, Mapping) else functools.partial(getattr, settings)
    value = by_name(key, default)
    return default if value is None else value
