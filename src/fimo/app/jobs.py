"""Jobs of a sweep: each keeps a record in its own folder, and is run once.

A record, ``job.json``, lies beside the job's results, so that jobs on other machines report through the file
system alone. A finished job is skipped when its whole configuration, the input files, the code and the
packages' versions are the same; any other is run again, and takes from the store what is there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from fimo.app.definitions import libraries
from fimo.app.run_folder import clear
from fimo.errors import InputError
from fimo.store.fingerprint import job_key

log = logging.getLogger(__name__)

RECORD = "job.json"
LOCK = ".job.lock"


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
            before.status, before.overrides = "skipped", record.overrides
            before.write(folder)
            return before.objective
        if before is not None and before.done:
            log.info("job %d was done with other settings, files or code: it runs again", number)
        if before is not None and before.identity != record.identity:
            clear(folder)  # no result of theirs may stay beside this job's
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
    """Return a hash of all that a job's result depends on."""
    plain = OmegaConf.to_container(config, resolve=True)
    return job_key(plain, libraries(plain))
