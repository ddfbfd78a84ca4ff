"""Sweeps that can be repeated: the same command goes on in the same folder and repeats what is missing.

Every job keeps a record, ``job.json``, in its own folder, so that jobs on other machines report through the
file system alone. A finished job is skipped when its whole configuration, the input files, the code and the
packages' versions are the same; any other is run again, and takes from the store what is there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from fimo.errors import InputError

log = logging.getLogger(__name__)

RECORD = "job.json"
PACKAGES = ("torch", "pytorch-lightning", "numpy", "scikit-learn")
FILE_KEYS = ("path", "checkpoint", "file")
SWEEP_FOLDER = "hydra.sweep.dir="


@dataclass
class JobRecord:
    """What is known of one job of a sweep.

    Args:
        number: of the job in its sweep.
        overrides: of the configuration that make this job.
        identity: of everything that its result depends on.
        status: in the latest attempt: ``waiting``, ``running``, ``finished``, ``skipped`` or ``failed``.
        done: whether the folder holds the job's whole result.
        objective: what the job returned to a sweeper that searches.
        error: of a failed job, in one line.
        process: machine and process id of the latest attempt.
    """

    number: int
    overrides: list[str] = field(default_factory=list)
    identity: str = ""
    status: str = "waiting"
    done: bool = False
    objective: float | None = None
    error: str = ""
    process: str = ""

    def write(self, folder: Path) -> None:
        """Write the record to a job's folder, whole or not at all."""
        aside = folder / f".{RECORD}"
        aside.write_text(json.dumps(asdict(self), indent=1))
        aside.replace(folder / RECORD)

    @classmethod
    def read(cls, folder: Path) -> JobRecord | None:
        """Return the record of a job's folder, or None."""
        try:
            return cls(**json.loads((folder / RECORD).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def run_once(
    work: Callable[[], float | None],
    config: DictConfig,
    folder: Path,
    number: int,
    overrides: Sequence[str],
    go_on: bool,
) -> float | None:
    """Run a job of a sweep unless its folder holds its result, and keep its record.

    Args:
        work: runs the job and returns its objective.
        config: the job's, checked.
        folder: the job's.
        go_on: return NaN where the job fails, so that a launcher goes on; else raise.

    Returns:
        the objective, of this run or of the earlier one.
    """
    with FileLock(folder / ".job.lock"):  # a job of an earlier attempt may still be running on a cluster
        record = JobRecord(number, list(overrides), job_identity(config))
        before = JobRecord.read(folder)
        if before is not None and before.done and before.identity == record.identity:
            log.info("job %d is done already in %s: skipped", number, folder)
            before.status = "skipped"
            before.write(folder)
            return before.objective
        if before is not None and before.done:
            log.info("job %d was done with other settings, files or code: it runs again", number)
        return _attempt(work, record, folder, go_on)


def _attempt(work: Callable[[], float | None], record: JobRecord, folder: Path, go_on: bool) -> float | None:
    (folder / "error.txt").unlink(missing_ok=True)
    record.status, record.process = "running", f"{platform.node()}:{os.getpid()}"
    record.write(folder)
    try:
        record.objective = work()
    except Exception as error:
        record.status = "failed"
        record.error = (str(error).splitlines() or [""])[0]
        if not isinstance(error, InputError):  # whose message says it all
            record.error = f"{type(error).__name__}: {record.error}"
        record.write(folder)
        (folder / "error.txt").write_text(traceback.format_exc())
        log.error("job %d failed: %s", record.number, record.error)
        if go_on:
            return math.nan
        raise
    record.status, record.done = "finished", True
    record.write(folder)
    return record.objective


class Sweep:
    """A sweep's folder, held by one process from start to end.

    Args:
        arguments: of the command line, without the program.
        conf: the folder of configuration groups.

    Attributes:
        folder: of the sweep: the one given, else that of an earlier sweep by the same command with the same
            configuration and code, else a new one.
    """

    def __init__(self, arguments: Sequence[str], conf: Path) -> None:
        self.jobs = job_overrides(arguments)
        identity = _digest(list(arguments), code_identity(), *_contents(conf, "*.yaml"))
        pattern = _default_folder(conf)
        given = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith(SWEEP_FOLDER)]
        self.arguments: list[str] = []
        if given:
            self.folder = Path(_resolved(given[-1]))
            if not self._hold():
                raise InputError("hydra.sweep.dir", f"another sweep is running in {self.folder}")
        else:
            earlier = [p for p in _earlier(pattern) if _read(p / "sweep.json").get("identity") == identity]
            for self.folder in [*earlier, Path(_resolved(pattern))]:
                if self._hold():
                    break
            self.arguments = [f"{SWEEP_FOLDER}'{self.folder}'"]
        content = {"identity": identity, "command": list(arguments)}
        (self.folder / "sweep.json").write_text(json.dumps(content, indent=1))
        records = list(self._records())
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
        records = list(self._records())
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
        names = _what_differs([record for _, record in records])
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

    def _total(self, records: Sequence[Any]) -> int:
        return max(len(self.jobs), len(records))

    def _records(self) -> Iterator[tuple[Path, JobRecord]]:
        found = [(path.parent, JobRecord.read(path.parent)) for path in self.folder.rglob(RECORD)]
        kept = [(folder, record) for folder, record in found if record is not None]
        yield from sorted(kept, key=lambda pair: pair[1].number)

    def _alive(self) -> bool:
        for folder, record in self._records():
            if record.status == "running":
                try:
                    FileLock(folder / ".job.lock", blocking=False).acquire().lock.release()
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


def _what_differs(records: Sequence[JobRecord]) -> dict[int, str]:
    """Return by job a name for people: its number, and the overrides that not all jobs share."""
    shared = set.intersection(*(set(r.overrides) for r in records)) if len(records) > 1 else set()
    return {
        r.number: f"#{r.number} {' '.join(o for o in r.overrides if o not in shared)}".rstrip()
        for r in records
    }


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether a command line starts a sweep (and not its help, or its configuration)."""
    only_shown = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
    if any(a.split("=")[0] in only_shown for a in arguments):
        return False
    return any(a in ("-m", "--multirun", "hydra.mode=MULTIRUN") for a in arguments)


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


def job_identity(config: DictConfig) -> str:
    """Return a hash of all that a job's result depends on: configuration, input files, code, versions."""
    return _digest(OmegaConf.to_yaml(config, resolve=True), code_identity(), *_inputs(config, ""))


def code_identity() -> str:
    """Return a hash of the package's source and of the versions that results depend on."""
    versions = [platform.python_version(), *(importlib.metadata.version(p) for p in PACKAGES)]
    return _digest(*versions, *_contents(Path(__file__).parent, "*.py"))


def _inputs(node: Any, key: str) -> Iterator[str]:
    """Yield what identifies the files and the user's own modules that a configuration names."""
    if OmegaConf.is_dict(node):
        for name in node:
            yield from _inputs(node[name], str(name))
    elif OmegaConf.is_list(node):
        for entry in node:
            yield from _inputs(entry, key)
    elif isinstance(node, str):
        path = Path(node)
        if any(word in key for word in FILE_KEYS) and node and path.exists():
            for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                yield f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
        elif "." in node and all(part.isidentifier() for part in node.split(".")):
            yield from _module_source(node)


def _module_source(dotted: str) -> Iterator[str]:
    """Yield the source of the module that a dotted name is in, where it is not an installed package's."""
    parts = dotted.split(".")
    if parts[0] in ("fimo", "torch"):
        return
    for length in range(len(parts), 0, -1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:length]))
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            yield hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
            return


def _contents(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern)):
        yield f"{path.relative_to(folder)}:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _resolved(text: str) -> str:
    from hydra.core.utils import setup_globals

    setup_globals()  # the resolver of ${now:...}
    return str(OmegaConf.create({"folder": text}).folder)


def _default_folder(conf: Path) -> str:
    """Return the configured folder of sweeps, unresolved."""
    config: Any = OmegaConf.to_container(OmegaConf.load(conf / "config.yaml"), resolve=False)
    return str(config["hydra"]["sweep"]["dir"])


def _earlier(pattern: str) -> list[Path]:
    """Return folders of earlier sweeps, the newest first."""
    root, _, rest = pattern.partition("${")
    depth = 1 + rest.count("/") if rest else 0
    start = Path(root) if root.endswith("/") or not rest else Path(root).parent
    found = [p.parent for p in start.glob("*/" * depth + "sweep.json")] if start.is_dir() else []
    return sorted(found, key=lambda p: (p / "sweep.json").stat().st_mtime, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
