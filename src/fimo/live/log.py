"""What a run says to its loggers while it goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fimo.errors import reason
from fimo.live.files import METRICS, SUMMARY
from fimo.live.metrics_file import FIRST, MetricsFile
from fimo.live.outlet import Outlet
from fimo.store.files import written_aside

log = logging.getLogger(__name__)

STAGES = {"final_model": 1, "further_training": 2, "evaluation": 4, "report": 5}
"""The metric ``stage``; methods, further evaluations and the parts of an audit are 3."""

BEGIN_SECONDS = 10.0
"""How long a run waits for its loggers to begin, so that they have it from the first step on."""

State = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Artifact:
    """Files of a run that belong together, for loggers that keep files.

    Args:
        name, kind: a name has versions, told apart by content.
        files: patterns in the run's folder.
        after: the stage that makes them; empty: they are kept when the run has finished.
        made_from: names of artifacts.
    """

    name: str
    kind: str
    files: Sequence[str]
    after: str = ""
    made_from: Sequence[str] = ()


ARTIFACTS = (
    Artifact("final_model", "model", ["final_model.ckpt"], "final_model", ["dataset"]),
    Artifact(
        "sensitivity", "sensitivity", ["sensitivity.safetensors"], "further_training",
        ["dataset", "final_model"],
    ),
    Artifact("scores", "scores", ["scores/*.safetensors"], "", ["dataset", "final_model"]),
    Artifact(
        "audit", "audit",
        ["rows.csv", "pairs.csv", "groups.csv", "suspects.csv", "cleaned.csv", "proof.csv", "audit.json"], "",
        ["dataset", "final_model"],
    ),
    Artifact(
        "report", "report", ["report.html", "report.json", "evaluation*.csv", "effects.csv", "cost.csv"], "",
        ["dataset", "final_model", "sensitivity", "scores", "audit"],
    ),
)  # fmt: skip
"""What a run makes, in an order in which each is made from those before."""


@dataclass(frozen=True)
class About:
    """What a logger is told of a run when it begins.

    Args:
        folder: of the run.
        name: for people.
        config: the whole configuration by dotted keys.
        tags: the data set's name, and a few methods'.
        dataset: makes a description of the data set, with a hash of all instances.
        checkpoint: of an artifact of the logger's that the run begins with.
    """

    folder: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    dataset: Callable[[], Mapping[str, Any]] | None = None
    checkpoint: str | None = None


class Log:
    """Hands on what a run says to ``metrics.csv``, ``summary.json`` and loggers, each in a thread of its own.

    It never raises, and waits a bounded time for loggers that hang, when it begins and when it ends. A point
    is logged once: a run that goes on in its folder logs what lies beyond the last one in ``metrics.csv``.

    Loggers are Lightning's: they get ``log_hyperparams``, ``log_metrics``, ``save`` and ``finalize``. Those
    that have more get that too: ``begin(about, rows)``, ``summarise(values)``, ``show(media)``,
    ``keep(artifact, folder)``, ``alert(title, text)``, ``end(state, error)``, and in place of
    ``log_metrics`` ``point(row, axis, number)``.

    Args:
        folder: of the run; None: nothing is logged.
        outlets: loggers.
    """

    def __init__(self, folder: Path | None = None, outlets: Sequence[Outlet] = ()) -> None:
        self.folder, self.outlets = folder, list(outlets)
        self.stage_name, self._rows = "", 0
        self._last: dict[str, float] = {}
        self._file: Outlet | None = None
        self._begun = False
        self.later = 0.0  # seconds of the stages after this one, as far as they are known
        self.summary: dict[str, Any] = {}

    @property
    def begun(self) -> bool:
        """Whether the loggers were started, and not ended."""
        return self._begun

    def begin(self, about: About) -> None:
        """Start the loggers."""
        if self.folder is None:
            return
        file = self._opened(self.folder / METRICS)
        self._file, self._rows, self._begun = Outlet(METRICS, file), len(file.rows), True
        for row in file.rows:
            at = row.get(str(row.get("axis")), math.inf)
            self._last |= {name: float(at) for name in row if name not in FIRST}
        self._tell("begin", about, self._rows)
        self._tell("log_hyperparams", dict(about.config))
        until = time.monotonic() + BEGIN_SECONDS
        for outlet in self.outlets:
            outlet.wait(until - time.monotonic())

    def _opened(self, path: Path) -> MetricsFile:
        """Return the file of all points; one that can't be read is put aside."""
        try:
            return MetricsFile(path)
        except (OSError, ValueError) as error:
            aside = path.with_name(f"unreadable_{path.name}")
            log.warning("%s can't be read (%s): it is now %s", path.name, reason(error), aside.name)
            with contextlib.suppress(OSError):
                path.replace(aside)
            return MetricsFile(path)

    def stage(self, name: str) -> None:
        """Say that a stage begins."""
        self.stage_name = name
        self.log({}, "stage", STAGES.get(name, 3))
        self.summarise({"state": f"running: {name}"})

    def log(self, values: Mapping[str, float], axis: str | None = None, at: float = 0.0) -> None:
        """Log a point: metrics at a value of what they are drawn against.

        Args:
            axis: the metric that they are drawn against; None: single values.
            at: its value, of which only those beyond a metric's last are logged.
        """
        if not self._begun:
            return
        order = math.inf if axis is None else at
        names = [*values] or [axis or ""]
        new = [name for name in names if order > self._last.get(name, -math.inf)]
        row = {name: float(values[name]) for name in new if name in values and math.isfinite(values[name])}
        if not row and (values or not new):
            return
        self._last |= dict.fromkeys(new, order)
        if axis is not None:
            row[axis] = at
        numbered = {"row": self._rows, "time": round(time.time(), 3), "axis": axis or "", **row}
        if self._file is not None:
            self._file.call("add", numbered)
        for outlet in self.outlets:
            if hasattr(outlet.logger, "point"):
                outlet.call("point", row, axis, self._rows)
            else:
                outlet.call("log_metrics", row, step=self._rows if axis is None else int(at))
        self._rows += 1

    def ended(self, name: str, seconds: float | None = None) -> None:
        """Say that a stage has ended well.

        Args:
            seconds: for the summary.
        """
        if seconds is not None:
            self.summarise({f"cost/{name}/seconds": seconds})
        self._keep([one for one in ARTIFACTS if one.after == name])

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Set what a table of runs has: the latest value by name."""
        self.summary |= values
        self._tell("summarise", dict(values))

    def show(self, media: Callable[[], Mapping[str, Any]]) -> None:
        """Show tables, pages and figures, which are made where a logger shows them only."""
        self._tell("show", media)

    def alert(self, title: str, text: str) -> None:
        """Tell a person."""
        self._tell("alert", title, text)

    def end(self, state: State, error: str = "") -> None:
        """Say how the run ended, and wait for the loggers, which may take a bounded time."""
        if not self._begun:
            return
        if state == "finished":
            self._keep([one for one in ARTIFACTS if not one.after])
        if state == "failed":
            self.alert("failed", error)
        self.summarise({"state": state, "error": error})  # of an earlier attempt there may be another
        self._tell("save")
        self._write_summary()
        self._tell("finalize", "success" if state == "finished" else "failed")
        self._tell("end", state, error)
        self._begun = False
        for outlet in [*self.outlets, *([self._file] if self._file else [])]:
            outlet.close()

    def _write_summary(self) -> None:
        assert self.folder is not None
        try:
            with written_aside(self.folder / SUMMARY) as aside:
                aside.write_text(json.dumps(self.summary, indent=1, default=str))
        except OSError as error:
            log.warning("%s could not be written: %s", SUMMARY, error)

    def _keep(self, artifacts: Sequence[Artifact]) -> None:
        for one in artifacts:
            self._tell("keep", one, self.folder)

    def _tell(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._begun:
            for outlet in self.outlets:
                outlet.call(method, *arguments, **named)
