"""Jobs of a sweep: each keeps a record in its own folder, and is run once.

A record, ``job.json``, lies beside the job's results, so that jobs on other machines report through the file
system alone. A finished job is skipped when its whole configuration, the input files, the code and the
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
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from fimo.errors import InputError

log = logging.getLogger(__name__)

RECORD = "job.json"
LOCK = ".job.lock"
PACKAGES = ("torch", "pytorch-lightning", "numpy", "scikit-learn")
FILE_KEYS = ("path", "checkpoint", "file")


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
    with FileLock(folder / LOCK):  # a job of an earlier attempt may still be running on a cluster
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


def job_identity(config: DictConfig) -> str:
    """Return a hash of all that a job's result depends on: configuration, input files, code, versions."""
    return digest(OmegaConf.to_yaml(config, resolve=True), code_identity(), *_inputs(config, ""))


def code_identity() -> str:
    """Return a hash of the package's source and of the versions that results depend on."""
    versions = [platform.python_version(), *(importlib.metadata.version(p) for p in PACKAGES)]
    return digest(*versions, *contents(Path(__file__).parent, "*.py"))


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


def contents(folder: Path, pattern: str) -> Iterator[str]:
    """Yield the name and hash of every file of a pattern in a folder."""
    for path in sorted(folder.rglob(pattern)):
        yield f"{path.relative_to(folder)}:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def digest(*parts: Any) -> str:
    """Return a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
