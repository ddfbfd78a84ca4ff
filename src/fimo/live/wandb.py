"""Weights & Biases as a Lightning logger that begins with the run, and goes on where it stopped."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning.loggers as loggers
from pytorch_lightning.utilities import rank_zero_only

from fimo.errors import InputError
from fimo.live.log import About, Artifact, State
from fimo.live.sweep_job import sweep_job

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")

ID = "wandb_id"
"""The file of a run's folder with the W&B run's id."""

DATASET = "dataset.json"
"""The description of the data set that is kept instead of the data."""

CONNECT_SECONDS = 20
"""How long an online run waits for a server before it is written offline."""

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 255}
"""As W&B's own: 255 of Ctrl-C."""

FLUSH_SECONDS = 5.0
"""How often an offline run's file is brought up to date."""

OWN = (
    "final_model/", "final_models/", "further_training/", "agreement/", "sem/", "sem_models/", "ceiling",
    "distance", "method/", "stage",
)  # fmt: skip
"""Metrics that a run logs of itself begin so."""

DRAWN = (
    "final_model/train_loss", "final_model/val_loss", "final_model/val_accuracy",
    "further_training/test_loss", "further_training/per_second", "further_training/ceiling",
)  # fmt: skip
"""Those of them that W&B draws without being asked; a panel for each of hundreds is no overview."""


class WandbLogger(loggers.WandbLogger):
    """One W&B run for one run's folder: live, offline unless asked otherwise.

    Where there is no login or no network, a run is written offline, with a warning. A run in a folder whose
    ``wandb_id`` names one goes on in it; so does one with ``WANDB_RUN_ID``, as W&B's agents set it.

    Args:
        mode: ``offline``, ``online`` or ``disabled``; null: ``online`` for a job of a W&B agent, which has
            a server, else ``offline``.
        project: to log to.
        entity: user or team; null: the login's default.
        group: of a sweep's runs; null: the sweep's folder.
        name: of the run; null: methods and data set.
        tags: besides the data set and a few methods.
        notes: null: the overrides of the command line.
        save_dir: where W&B's folder ``wandb`` goes; null: the run's folder.
        alerts: of divergence, of a low noise ceiling and of a failed run; null: where it is online.
        artifacts: keep the run's files, at most so many MB each.
        console: keep what the run prints.
        system_metrics: CPU, memory, GPU.
        code: keep the commit and what was changed since.
        closing_seconds: the longest that the end of a run waits for a server.
    """

    def __init__(
        self,
        mode: str | None = None,
        project: str = "fimo",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        save_dir: str | Path | None = None,
        alerts: bool | None = None,
        artifacts: float = 1000.0,
        console: bool = True,
        system_metrics: bool = True,
        code: bool = False,
        closing_seconds: float = 300.0,
    ) -> None:
        mode = {"dryrun": "offline", "run": "online"}.get(str(mode), mode)  # W&B's old words
        mode = mode or ("online" if os.environ.get("WANDB_SWEEP_ID") else "offline")
        if mode not in MODES:
            raise InputError("logger.wandb.mode", f"expected one of {', '.join(MODES)} but got {mode!r}")
        super().__init__(name=name, save_dir=save_dir or ".", project=project, entity=entity)
        self.mode, self.group, self.tags, self.notes = mode, group, list(tags), notes
        self.alerts, self.artifacts, self.closing_seconds = alerts, artifacts, closing_seconds
        self.console, self.system_metrics, self.code = console, system_metrics, code
        self.own_dir = save_dir
        self._known: set[str] = set()
        self._digests: dict[str, str] = {}

    @property
    def run(self) -> wandb.Run | None:
        """The W&B run, once it has begun."""
        return self._experiment  # type: ignore[return-value]

    @property
    def experiment(self) -> Any:
        """The W&B run."""
        return self._experiment if self.mode != "disabled" else super().experiment

    def begin(self, about: About, rows: int) -> None:
        """Start the W&B run.

        Args:
            rows: logged already by earlier processes.
        """
        import wandb

        if self.mode == "disabled":
            return
        if self.mode == "online" and not wandb.api.api_key:
            log.warning("W&B: mode is online but nobody is logged in (wandb login); writing offline")
            self.mode = "offline"
        about.folder.mkdir(parents=True, exist_ok=True)
        try:
            run = self._init(about, self.mode)
        except wandb.Error as error:
            if self.mode != "online":
                raise
            log.warning("W&B: no connection (%s); writing offline", str(error).splitlines()[0])
            wandb.teardown()
            run = self._init(about, "offline")
        self._experiment = run
        self._inputs(about)
        if run.offline:
            log.info("W&B is written offline; to sync it: wandb sync %s", self._to_sync(about))
        else:
            log.info("W&B: %s", run.url)

    def _init(self, about: About, mode: str) -> wandb.Run:
        import wandb

        sweep, overrides = sweep_job(about.folder)
        self.mode = mode
        settings: dict[str, Any] = {
            "silent": True,
            "console": "auto" if self.console else "off",
            "disable_git": not self.code,
            "save_code": self.code,
            "x_disable_stats": not self.system_metrics,
            "init_timeout": CONNECT_SECONDS,
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
            "finish_timeout": 0.9 * self.closing_seconds,  # W&B's own way to give up comes first
        }
        known = wandb.Settings.model_fields
        return wandb.init(
            project=self._project,
            entity=self._wandb_init["entity"],
            group=self.group or sweep,
            name=self._name or about.name,
            tags=[tag[:64] for tag in dict.fromkeys([*self.tags, *about.tags]) if tag],
            notes=self.notes or " ".join(overrides) or None,
            job_type="job of a sweep" if sweep else "run",
            config=dict(about.config),
            dir=self.own_dir or about.folder,
            id=run_id(about.folder, one_of_many=sweep is not None),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(**{k: v for k, v in settings.items() if k in known}),
        )

    def point(self, row: Mapping[str, float], axis: str | None, number: int) -> None:
        """Log a point as the row of this number."""
        if self.run is None:
            return
        for name in sorted(row, key=lambda name: name != axis):
            if name not in self._known:
                self._known.add(name)
                hidden = name == axis or (name.startswith(OWN) and name not in DRAWN)
                drawn_against = None if name == axis else axis
                self.run.define_metric(name, step_metric=drawn_against, hidden=hidden, summary="none")
        self.run.log(dict(row), step=max(number, self.run.step), commit=True)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Do nothing: the configuration was given at the start."""

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Set values of the summary."""
        if self.run is not None:
            self.run.summary.update(dict(values))

    def show(self, media: Callable[[], Mapping[str, Any]]) -> None:
        """Log W&B's media."""
        if self.run is not None:
            self.run.log(dict(media()))

    def keep(self, artifact: Artifact, folder: Path) -> None:
        """Keep the files of an artifact that are there and not too large, and what it was made from."""
        files = [path for pattern in artifact.files for path in sorted(folder.glob(pattern))]
        self._keep(artifact, [path for path in files if path.stat().st_size <= self.artifacts * 2**20])

    def _keep(self, about: Artifact, files: Sequence[Path], used: bool = False) -> None:
        import wandb

        if self.run is None or not files:
            return
        made_from = {name: self._digests[name] for name in about.made_from if name in self._digests}
        made = wandb.Artifact(about.name, about.kind, metadata={"made_from": made_from})
        for path in files:  # read when they are sent, or kept by their place: not copied
            made.add_file(str(path), path.name, policy="immutable", skip_cache=True)
        self._digests[about.name] = made.digest
        if not used:
            self.run.log_artifact(made)
        elif self.run.offline:  # use_artifact refuses; this writes what it would
            self.run._log_artifact(made, is_user_created=True, use_after_commit=True)
        else:
            self.run.use_artifact(made)

    def _inputs(self, about: About) -> None:
        """Say what the run is made from: a data set (its description), and a model of W&B's."""
        if about.dataset is not None and self.artifacts > 0:
            path = about.folder / DATASET
            path.write_text(json.dumps(about.dataset(), indent=1))
            self._keep(Artifact("dataset", "dataset", []), [path], used=True)
        if about.checkpoint is not None and self.run is not None and not self.run.offline:
            self.run.use_artifact(about.checkpoint)

    def alert(self, title: str, text: str) -> None:
        """Tell those who follow the project."""
        if self.run is not None and (self.alerts or (self.alerts is None and not self.run.offline)):
            self.run.alert(title[:63], f"{self.run.name}: {text}", level="ERROR")

    def end(self, state: State, error: str = "") -> None:
        """End the W&B run with a state."""
        if self.run is None:
            return
        if error:
            self.run.write_logs(f"error: {error}")
        self.run.finish(exit_code=EXIT_CODES[state])  # or a sweep's next job would be written into this run

    def _to_sync(self, about: About) -> str:
        """Return what ``wandb sync`` is given: a run's files, or all jobs of a sweep at once."""
        sweep, _ = sweep_job(about.folder)
        folder = Path(self.own_dir) if self.own_dir else about.folder
        if sweep and not self.own_dir:
            return f"{folder.parent}/*/wandb/offline-run-*"
        return f"{folder}/wandb/offline-run-*"


def run_id(folder: Path, one_of_many: bool = False) -> str:
    """Return the id of a run's folder, a new one where it has none, and keep it there.

    Args:
        one_of_many: of a sweep's jobs, which can't all be the run of ``WANDB_RUN_ID``.
    """
    path = folder / ID
    given = None if one_of_many else os.environ.get("WANDB_RUN_ID")
    found = given or (path.read_text().strip() if path.exists() else "")
    found = found or secrets.token_hex(4)
    path.write_text(f"{found}\n")
    return found
