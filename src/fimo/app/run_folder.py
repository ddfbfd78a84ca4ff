"""A run's folder: it holds the results of one configuration, and one run at a time writes into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fimo.app.definitions import libraries
from fimo.errors import InputError
from fimo.store.fingerprint import job_key

KEY = "hydra.run.dir"
RECORD = "run.json"
LOCK = ".run.lock"
RESULTS = (
    "final_model.ckpt", "sensitivity.safetensors", "scores", "evaluation.csv", "evaluation_*.csv",
    "effects.csv", "cost.csv", "report.json", "answer.json", "report.html", "failures",
    "audit.json", "rows.csv", "pairs.csv", "groups.csv", "suspects.csv", "proof.csv", "cleaned.csv",
    "audit_report.json", "final_models", "final_models.json",
)  # fmt: skip
"""What the stages of a run leave behind."""

LOGGED = ("metrics.csv", "summary.json", "wandb_id")
"""What a run that goes on adds to; another one in its folder begins them anew."""

ASIDE = (
    "threads", "store", "logger", "trainer.enable_progress_bar", "further_training.chunk",
    "further_training.graphs", "until", "report",
)  # fmt: skip
"""Settings that no result depends on: a rerun may change them."""


def clear(folder: Path) -> None:
    """Delete the results that a folder holds."""
    for path in results(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    forget(folder)


def forget(folder: Path) -> None:
    """Let the next run in a folder begin its log anew."""
    for name in LOGGED:
        (folder / name).unlink(missing_ok=True)


class RunFolder:
    """A run's folder, held by one process.

    What is in it is remembered until the run may begin, since Hydra writes its files there before that.

    Raises:
        InputError: ``hydra.run.dir``: another run is writing into it, or it is a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise InputError(KEY, f"expected a folder but {folder} is a file")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(KEY, f"{folder}: {error.strerror}") from error
        self.lock = FileLock(folder / LOCK, blocking=False)
        try:
            self.lock.acquire()
        except Timeout:
            raise InputError(KEY, f"another run is writing into {folder}; choose another folder") from None
        self._hydras = {path: path.read_bytes() for path in folder.glob(".hydra/*") if path.is_file()}

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make sure that the folder holds no other configuration's results, and record this one.

        Args:
            config: of the run, checked, as plain containers.

        Raises:
            InputError: ``hydra.run.dir``: it does, and what differs.
        """
        asked = {name: value for name, value in flat(config).items() if not _aside(name)}
        record = {"identity": job_key(asked, libraries(asked)), "config": asked}
        if results(self.folder):
            before = self._read()
            if before is None or before.get("identity") != record["identity"]:
                for path, content in self._hydras.items():
                    path.write_bytes(content)
                raise InputError(
                    KEY,
                    f"{self.folder} holds the results of another run ({_difference(before, asked)}); "
                    "choose another folder, or delete it",
                )
        elif (self._read() or record).get("identity") != record["identity"]:
            forget(self.folder)
        (self.folder / RECORD).write_text(json.dumps(record, indent=1, default=str))

    def end(self) -> None:
        """Let other runs write into the folder."""
        self.lock.release()
        (self.folder / LOCK).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / RECORD).read_text()))
        except (OSError, ValueError):
            return None


def results(folder: Path) -> list[Path]:
    """Return the results that a folder holds."""
    return [path for pattern in RESULTS for path in sorted(folder.glob(pattern))]


def given_folder(arguments: Sequence[str]) -> str | None:
    """Return the run's folder that a command line names, or None for a new one of its own."""
    given = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith(f"{KEY}=")]
    return given[-1] if given else None


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return settings by their dotted names."""
    return dict(_flat(config, prefix))


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, node


def _aside(name: str) -> bool:
    return any(name == aside or name.startswith(f"{aside}.") for aside in ASIDE)


def _difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Return what differs from an earlier run, in a few words."""
    if before is None:
        return "which left no record"
    then = before.get("config", {})
    current = json.loads(json.dumps(now, default=str))
    names = [n for n in sorted({*then, *current}) if then.get(n, None) != current.get(n, None)]
    if not names:
        return "with other input files or code"
    first = names[0]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{first}: {then.get(first)!r} there, {current.get(first)!r} now{more}"
