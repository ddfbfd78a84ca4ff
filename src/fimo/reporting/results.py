"""Everything that a report shows of one run, and a run's folder as its form on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from fimo.audit.result import AUDIT
from fimo.data.reading import EXACT
from fimo.errors import InputError
from fimo.evaluation.assessment import adjusted_scores
from fimo.further_training.sensitivity import Sensitivity, load_sensitivity
from fimo.models.measured import Measured
from fimo.reporting.instance_table import InstanceDisplay, Shown, Split, noun
from fimo.reporting.task_curves import KNOWN, REMOVAL, Curve, removal
from fimo.scores import Access, Scores
from fimo.store.files import written_aside

JSON_FIELDS = (
    "name",
    "final_model",
    "versions",
    "dataset",
    "descriptions",
    "skipped",
    "warnings",
    "ids",
    "measured",
)
OPTIONAL_TABLES = {"bootstrap": "evaluation_bootstrap.csv", "slopes": "evaluation_slopes.csv"}
FILES = ("sensitivity.safetensors", "evaluation.csv", "cost.csv", "report.json")
"""Of a finished run."""
SEVERAL = "final_models.json"
"""Of the folder of a run with several final models, see :mod:`fimo.reporting.models_run`."""
EARLIER = {
    "ceiling_lower": math.nan, "followed_seeds": "unknown", "final_models": 1, "sem_models": math.nan,
}  # fmt: skip
"""Columns that the evaluation of an earlier version's run lacks, and what stands for them."""
TASKS = ("datamodeling", "removal", "mislabelled")
"""Further evaluations whose tables are read where a folder has them; those of others where it names them."""


def task_file(folder: Path, task: str) -> Path:
    """Return the file of a task's table in a run's folder."""
    return folder / f"evaluation_{task}.csv"


@dataclass(frozen=True)
class Results:
    """What one run found, as values.

    Args:
        name: of the run, for legends.
        sensitivity: the gold standard.
        scores: by method.
        evaluation: ``evaluation.csv``.
        cost: ``cost.csv``.
        final_model: ``train_loss, test_loss``, and where known ``train_accuracy, test_accuracy``, and
            ``baseline_loss, baseline_accuracy`` of predicting the training targets' mean or class shares.
        config: the composed configuration as plain containers.
        versions: by package.
        dataset: ``name``; where known ``description, task, target, train, test`` (sizes) and ``features``.
        shown: the instances that the report shows, see :func:`fimo.reporting.instance_table.collect`.
        descriptions: by method, in one sentence, what it is.
        skipped: by method, why it did not run.
        warnings: what a reader must know.
        bootstrap, slopes: of :class:`fimo.evaluation.Evaluation`.
        distance: ``step,epoch,seed,distance,relative``: how far the full runs moved in parameter space, and
            as a share of the final model's norm.
        retraining: the sensitivity to leaving instances out of training from scratch, on the same left-out
            and test instances.
        tasks: further evaluations by name: ``datamodeling``, ``removal``, ``mislabelled``, as the
            modules of those names in :mod:`fimo.evaluation` return them, and tables with a curve.
        curves: by task, as what its table is drawn.
        ids: by split (``train``: of what was left out), the user's identifiers in the sensitivity's order;
            those of a group's members with spaces between them. Missing where there are rows only.
        folder: that it was read from.
        measured: what effects are changes of.
        has_raw: whether the sensitivity holds every seed; else its one "seed" is the mean over all.
    """

    name: str
    sensitivity: Sensitivity
    scores: Mapping[str, Scores]
    evaluation: pd.DataFrame
    cost: pd.DataFrame
    final_model: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    shown: Shown = field(default_factory=lambda: {"train": {}, "test": {}})
    descriptions: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    bootstrap: pd.DataFrame | None = None
    slopes: pd.DataFrame | None = None
    distance: pd.DataFrame | None = None
    retraining: Sensitivity | None = None
    tasks: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    has_raw: bool = True
    ids: Mapping[str, list[str]] = field(default_factory=dict)
    folder: Path | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)

    def curve(self, task: str) -> Curve | None:
        """Return as what a task's table is drawn; None where it has no table, or another figure."""
        found = (self.curves.get(task) or KNOWN.get(task)) if task in self.tasks else None
        return removal(self.measured) if found == REMOVAL else found

    def errors(self, method: str) -> Tensor | None:
        """Return the standard errors of a method's scores as they are judged, NaN where withheld."""
        return self.scores[method].bars(self.sensitivity.subtract_mean and self.predicts_raw_changes(method))

    @functools.cached_property
    def effects(self) -> pd.DataFrame:
        """``effects.csv``: the measured effect and the scores of every pair, under the user's own names.

        Raises:
            InputError: the run was not read from a folder that holds it.
        """
        path = (self.folder or Path()) / "effects.csv"
        if self.folder is None or not path.exists():
            raise InputError(
                "effects.csv", f"is not in {self.folder or 'a folder'}: an earlier version's run"
            )
        text = {"test_id": str, "train_id": str}
        as_written: dict[str, Any] = {"keep_default_na": False, "na_values": {"effect_sem": [""]}}
        table: pd.DataFrame = pd.read_csv(path, dtype=text, **as_written, **EXACT)
        return table

    def called(self, split: str, index: int) -> str:
        """Return what a left-out or test instance is called: its id, its row, or its position in its part."""
        return self._names[split].get(index, f"#{index}")

    @functools.cached_property
    def _names(self) -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        one, many = self.sensitivity, "group of " if self.sensitivity.groups is not None else ""
        for split, index, rows in (
            ("train", one.left_out, one.left_out_row),
            ("test", one.test, one.test_row),
        ):
            names = self.ids.get(split)
            if names is None and rows is not None:
                names = [f"{many if split == 'train' else ''}row {row}" for row in rows.tolist()]
            found[split] = dict(zip(index.tolist(), names or [], strict=False))
        return found

    @property
    def metrics(self) -> list[str]:
        """The metrics that were evaluated."""
        return list(self.evaluation["metric"].unique())

    @property
    def seeds(self) -> int:
        """S, the largest number of seeds averaged."""
        return int(self.evaluation["seeds"].max())

    def judged_scores(self, method: str, subtract_mean: bool | None = None) -> Tensor:
        """Return a method's scores as the evaluation judges them; adjusted as the sensitivity if None."""
        subtract = self.sensitivity.subtract_mean if subtract_mean is None else subtract_mean
        return adjusted_scores(self.scores[method].values, self.predicts_raw_changes(method), subtract)

    def predicts_raw_changes(self, method: str) -> bool:
        """Return whether scores are changes of what is measured at each amount of further training."""
        return self.scores[method].predicts_loss_change and self.scores[method].values.ndim == 3

    def show(self, split: Split, index: int) -> InstanceDisplay | None:
        """Return an instance as people read it, or None where it was not kept."""
        return self.shown.get(split, {}).get(index)

    @property
    def noun(self) -> str:
        """What an instance of this data set is called: ``row``, ``text`` or ``picture``."""
        return noun(self.shown)

    def save(self, folder: Path, everything: bool = False) -> None:
        """Write ``report.json``: what no other file of the run's folder holds.

        Args:
            everything: also write the files that an experiment writes itself: the sensitivity, scores,
                ``evaluation*.csv``, ``cost.csv`` and ``.hydra/config.yaml``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {key: getattr(self, key) for key in JSON_FIELDS}
        content["shown"] = {
            split: {str(index): display.as_dict() for index, display in instances.items()}
            for split, instances in self.shown.items()
        }
        content["curves"] = {task: dataclasses.asdict(curve) for task, curve in self.curves.items()}
        if self.distance is not None:
            content["distance"] = self.distance.to_dict("list")
        with written_aside(folder / "report.json") as path:
            path.write_text(json.dumps(_plain(content), ensure_ascii=False))
        if self.retraining is not None:
            self.retraining.save(folder / "retraining.safetensors")
        for task, table in self.tasks.items():
            with written_aside(task_file(folder, task)) as path:
                table.to_csv(path, index=False)
        if everything:
            self._save_shared(folder)

    def _save_shared(self, folder: Path) -> None:
        self.sensitivity.save(folder / "sensitivity.safetensors")
        for name, scores in self.scores.items():
            scores.save(folder / "scores" / f"{name}.safetensors")
        self.evaluation.to_csv(folder / "evaluation.csv", index=False)
        self.cost.to_csv(folder / "cost.csv", index=False)
        for key, file in OPTIONAL_TABLES.items():
            if (table := getattr(self, key)) is not None:
                table.to_csv(folder / file, index=False)
        (folder / ".hydra").mkdir(exist_ok=True)
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(_plain(self.config)))  # JSON is YAML

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read a run's folder.

        Raises:
            InputError: a file is missing, so that the run did not finish.
        """
        folder = Path(folder)
        if (folder / SEVERAL).exists():
            several = f"holds several final models: load one, as {folder}/final_models/0, or all by ModelsRun"
            raise InputError(str(folder), several)
        if (folder / AUDIT).exists():
            raise InputError(str(folder), f"holds an audit: python -m fimo.reporting {folder}, alone")
        for file in FILES:
            if not (folder / file).exists():
                raise InputError(str(folder), f"{file} is missing: this is no folder of a finished run")
        content = json.loads((folder / "report.json").read_text())
        sensitivity, has_raw = load_sensitivity(folder / "sensitivity.safetensors")
        # runs that were written before these columns were
        evaluation = pd.read_csv(folder / "evaluation.csv", **EXACT)
        evaluation = evaluation.assign(**{c: v for c, v in EARLIER.items() if c not in evaluation})
        order = list(evaluation["method"].unique())
        stored = {p.stem: Scores.load(p) for p in sorted((folder / "scores").glob("*.safetensors"))}
        shown = {
            split: {int(index): InstanceDisplay(**display) for index, display in instances.items()}
            for split, instances in content.pop("shown").items()
        }
        distance = content.pop("distance", None)
        optional: dict[str, Any] = {
            key: pd.read_csv(folder / file, **EXACT)
            for key, file in OPTIONAL_TABLES.items()
            if (folder / file).exists()
        }
        again = folder / "retraining.safetensors"
        curves = {task: Curve(**curve) for task, curve in content.pop("curves", {}).items()}
        content["warnings"] = tuple(content["warnings"])
        measured = Measured(**content["measured"]) if "measured" in content else None
        content["measured"] = measured or Measured()
        withheld = content.pop("without_bars", {})
        stored = {
            name: found if found.method else _earlier(name, found, evaluation, optional, withheld)
            for name, found in stored.items()
        }
        return cls(
            sensitivity=dataclasses.replace(sensitivity, measured=measured),
            scores={n: dataclasses.replace(stored[n], measured=measured) for n in order if n in stored},
            evaluation=evaluation,
            cost=pd.read_csv(folder / "cost.csv", **EXACT),
            config=read_config(folder / ".hydra" / "config.yaml"),
            shown=shown,
            distance=pd.DataFrame(distance) if distance else None,
            retraining=load_sensitivity(again)[0] if again.exists() else None,
            tasks={
                task: pd.read_csv(task_file(folder, task), **EXACT)
                for task in dict.fromkeys([*TASKS, *curves])
                if task_file(folder, task).exists()
            },
            curves=curves,
            has_raw=has_raw,
            folder=folder,
            **optional,
            **content,
        )


def _earlier(
    name: str,
    scores: Scores,
    evaluation: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    withheld: Mapping[str, str],
) -> Scores:
    """Return scores of a run whose files held values alone, with what its tables say of them."""
    access = dict(zip(evaluation["method"], evaluation["access"], strict=True))
    return dataclasses.replace(
        scores,
        method=name,
        access=Access(access[name]) if name in access else scores.access,
        predicts_loss_change="slopes" in tables and name in set(tables["slopes"]["method"]),
        withheld=withheld.get(name, ""),
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's configuration as plain containers; empty where it was not kept."""
    if not path.exists():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    loaded = OmegaConf.load(path)
    try:
        config = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException:  # a resolver that only a running job knows
        config = OmegaConf.to_container(loaded, resolve=False)
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if hasattr(value, "item"):  # numpy's scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


plain = _plain
