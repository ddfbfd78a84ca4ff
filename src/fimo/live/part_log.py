"""The log of a part of a run that is a run of its own: into its own folder, and into the whole's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fimo.live.log import About, Log


class PartLog(Log):
    """Logs into a part's own ``metrics.csv`` and ``summary.json``, and all points into the whole's as well.

    There they are called ``PART/NAME``, so that no part's hide another's; the whole begins with its first
    part, which knows the data set. Artifacts, tables and pages are the whole's own alone.

    Args:
        whole: log of the run that this is a part of.
        folder: of the part.
        part: name of the part, as ``final_models/3``.
        settings: of the whole, by dotted keys, where they differ from the part's.
    """

    def __init__(
        self, whole: Log, folder: Path, part: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(folder)
        self.whole, self.part, self.settings = whole, part, dict(settings or {})

    def begin(self, about: About) -> None:
        super().begin(about)
        if self.whole.folder is not None and not self.whole.begun:
            config = {**about.config, **self.settings}
            self.whole.begin(replace(about, folder=self.whole.folder, config=config))

    def log(self, values: Mapping[str, float], axis: str | None = None, at: float = 0.0) -> None:
        super().log(values, axis, at)
        if values:
            self.whole.log({f"{self.part}/{name}": value for name, value in values.items()}, axis, at)

    def stage(self, name: str) -> None:
        super().stage(name)
        self.whole.summarise({"state": f"running: {name} ({self.part})"})
