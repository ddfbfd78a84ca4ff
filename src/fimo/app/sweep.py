"""Sweeps that can be repeated: the same command goes on in the same folder and repeats what is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from fimo.app.jobs import LOCK, RECORD, JobRecord
from fimo.app.search_path import SearchPath
from fimo.app.sweep_table import write_table
from fimo.errors import InputError
from fimo.store.fingerprint import code_identity, contents, digest

SWEEP_FOLDER = "hydra.sweep.dir="
SWEEP = "sweep.json"
"""Of a sweep's folder."""


class Sweep:
    """A sweep's folder, held by one process from start to end.

    Args:
        arguments: of the command line, without the program.
        places: where groups of configuration are.

    Attributes:
        folder: of the sweep: the one given, else that of an earlier sweep by the same command with the same
            configuration and code, else a new one.
    """

    def __init__(self, arguments: Sequence[str], places: SearchPath) -> None:
        self.jobs = job_overrides(arguments)
        files = [name for folder in places.folders for name in contents(folder, "*.yaml")]
        identity = digest(list(arguments), code_identity(), *files)
        pattern = _default_folder(places)
        given = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith(SWEEP_FOLDER)]
        self.arguments: list[str] = []
        if given:
            self.folder = Path(resolved(given[-1]))
            if not self._hold():
                raise InputError("hydra.sweep.dir", f"another sweep is running in {self.folder}")
        else:
            earlier = [p for p in _earlier(pattern) if _read(p / SWEEP).get("identity") == identity]
            for self.folder in [*earlier, Path(resolved(pattern))]:
                if self._hold():
                    break
            self.arguments = [f"{SWEEP_FOLDER}'{self.folder}'"]
        others = [record for _, record in jobs_of(self.folder) if record.number >= len(self.jobs) > 0]
        if others:
            self.lock.release()
            count, first = len(self.jobs), f"job {others[0].number}: {' '.join(others[0].overrides)}"
            raise InputError(
                "hydra.sweep.dir",
                f"{self.folder} holds jobs of another sweep, and this one has only {count} ({first}); choose "
                "another folder, or delete it",
            )
        content = {"identity": identity, "command": list(arguments)}
        (self.folder / SWEEP).write_text(json.dumps(content, indent=1))
        records = self._records()
        for folder, record in records:
            record.status = "waiting"
            record.write(folder)
        if records:
            done = sum(record.done for _, record in records)
            print(f"going on with the sweep in {self.folder}: {done} of {self._total(records)} jobs are done")

    def conclude(self) -> bool:
        """Say what became of every job; return whether all are done.

        Jobs that outlived their launcher (where another was killed) are waited for.
        """
        while self._alive():
            time.sleep(0.5)
        self.lock.release()
        records = self._records()
        if not records:
            return not self.jobs
        by_status: dict[str, list[tuple[Path, JobRecord]]] = {}
        for folder, record in records:
            by_status.setdefault(record.status, []).append((folder, record))
        if missing := self._total(records) - len(records):
            missing += len(by_status.pop("waiting", []))
        counts = {
            "done before, skipped": len(by_status.get("skipped", [])),
            "finished": len(by_status.get("finished", [])),
            "failed": len(by_status.get("failed", [])),
            "ended without a result": len(by_status.get("running", [])),
            "not started": missing + len(by_status.get("waiting", [])),
        }
        parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        print(f"sweep of {self._total(records)} jobs in {self.folder}: {parts}")
        if (table := write_table(self.folder, records)) is not None:
            print(f"the jobs as one table: {table}")
        names = what_differs([record for _, record in records])
        for _, record in by_status.get("skipped", []):
            print(f"  {names[record.number]}: done before, skipped")
        for folder, record in by_status.get("failed", []):
            print(f"  {names[record.number]}: failed: {record.error} ({folder}/error.txt)")
        for folder, record in by_status.get("running", []):
            print(f"  {names[record.number]}: was ended from outside ({record.process}, {folder})")
        good = counts["finished"] + counts["done before, skipped"] == self._total(records)
        if not good:
            print("the same command again repeats only what is missing")
        return good

    def _records(self) -> list[tuple[Path, JobRecord]]:
        """Return folders and records of this sweep's jobs; others are to be run again with its settings."""
        found = jobs_of(self.folder)
        if not self.jobs:
            return found
        return [(folder, record) for folder, record in found if record.overrides == self.jobs[record.number]]

    def _total(self, records: Sequence[Any]) -> int:
        return max(len(self.jobs), len(records))

    def _alive(self) -> bool:
        for folder, record in jobs_of(self.folder):
            if record.status == "running":
                try:
                    FileLock(folder / LOCK, blocking=False).acquire().lock.release()
                except Timeout:
                    return True
        return False

    def _hold(self) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".sweep.lock", blocking=False)
        try:
            self.lock.acquire()
        except Timeout:
            return False
        return True


def jobs_of(sweep: Path) -> list[tuple[Path, JobRecord]]:
    """Return the folders of a sweep's jobs that have begun, with their records, by number."""
    found = [(path.parent, JobRecord.read(path.parent)) for path in sweep.rglob(RECORD)]
    kept = [(folder, record) for folder, record in found if record is not None]
    return sorted(kept, key=lambda pair: pair[1].number)


def what_differs(records: Sequence[JobRecord]) -> dict[int, str]:
    """Return by job a name for people: its number, and the overrides that not all jobs share."""
    shared = set.intersection(*(set(r.overrides) for r in records)) if len(records) > 1 else set()
    return {
        r.number: f"#{r.number} {' '.join(o for o in r.overrides if o not in shared)}".rstrip()
        for r in records
    }


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether a command line starts a sweep (and not its help, or its configuration)."""
    return not only_shows(arguments) and any(
        a in ("-m", "--multirun", "hydra.mode=MULTIRUN") for a in arguments
    )


def only_shows(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help or for its configuration, and runs nothing."""
    flags = (
        "--help",
        "-h",
        "--hydra-help",
        "--version",
        "--cfg",
        "-c",
        "--info",
        "-i",
        "--shell-completion",
        "-sc",
    )
    return any(a.split("=")[0] in flags for a in arguments)


def job_overrides(arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job that Hydra's basic sweeper makes of a command line; [] if unknown."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    settings = [a for a in arguments if not a.startswith("-") and not a.lstrip("+~").startswith("hydra")]
    if any(a.startswith("hydra/sweeper=") for a in arguments):
        return []
    try:
        overrides = OverridesParser.create().parse_overrides(settings)
        return [list(job) for job in BasicSweeper.split_arguments(overrides, None)[0]]
    except Exception:  # Hydra says what is wrong with it
        return []


def resolved(text: str) -> str:
    """Return a setting with ``${now:...}`` in it as Hydra would."""
    from hydra.core.utils import setup_globals

    setup_globals()  # the resolver of ${now:...}
    return str(OmegaConf.create({"folder": text}).folder)


def _default_folder(places: SearchPath) -> str:
    """Return the configured folder of sweeps, unresolved."""
    file = next(f for folder in places.folders if (f := folder / "config.yaml").is_file())
    config: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return str(config["hydra"]["sweep"]["dir"])


def _earlier(pattern: str) -> list[Path]:
    """Return folders of earlier sweeps, the newest first."""
    root, _, rest = pattern.partition("${")
    depth = 1 + rest.count("/") if rest else 0
    start = Path(root) if root.endswith("/") or not rest else Path(root).parent
    found = [p.parent for p in start.glob("*/" * depth + SWEEP)] if start.is_dir() else []
    return sorted(found, key=lambda p: (p / SWEEP).stat().st_mtime, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
