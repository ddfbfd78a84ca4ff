"""What the store holds, as a list, and what of it shall be deleted: ``fimo store``."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from fimo.errors import InputError
from fimo.store import VERSION

KINDS = {
    "final_model": "final models",
    "further_training": "further-training runs",
    "trajectory": "trajectories",
    "scores": "scores",
    "gradients": "gradients",
}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Entry:
    """One kept result.

    Args:
        folder: that holds it.
        kind: one of ``KINDS``.
        size: bytes of its files.
        used: when it was last asked for, seconds since 1970.
        about: in words.
        version: of the store that wrote it; None where its description can't be read.
    """

    folder: Path
    kind: str
    size: int
    used: float
    about: str
    version: int | None


def entries(root: Path) -> list[Entry]:
    """Return everything in a store, by kind, the latest used first."""
    found = [_entry(folder, kind) for kind in KINDS for folder in root.glob(f"{kind}/*") if folder.is_dir()]
    order = list(KINDS)
    return sorted(found, key=lambda e: (order.index(e.kind), -e.used, e.folder))


def _entry(folder: Path, kind: str) -> Entry:
    sizes, times = [0], []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process replaces its files
            status = path.stat()
            sizes.append(status.st_size)
            times.append(status.st_mtime)
    about, version = "(no description)", None
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found: dict[str, Any] = json.loads((folder / "key.json").read_text())
        version = int(found.get("key", found)["version"])
        about = str(found.get("about", about))
    return Entry(folder, kind, sum(sizes), max(times, default=folder.stat().st_mtime), about, version)


def chosen(
    found: Sequence[Entry],
    now: float,
    kind: str | None = None,
    older_than: float | None = None,
    keep_bytes: float | None = None,
    old_version: bool = False,
    unreadable: bool = False,
) -> list[Entry]:
    """Return what of a store is to be deleted, the least recently used first.

    Args:
        kind: of these only.
        older_than: not used for so many seconds.
        keep_bytes: only as many as bring what is left of the kind below this size.
        old_version, unreadable: only what another version of the store wrote, or what has no description.
    """
    some = sorted((e for e in found if kind in (None, e.kind)), key=lambda e: e.used)
    total = sum(e.size for e in some)
    if old_version or unreadable:
        some = [
            e
            for e in some
            if (old_version and e.version not in (None, VERSION)) or (unreadable and e.version is None)
        ]
    if older_than is not None:
        some = [e for e in some if now - e.used >= older_than]
    if keep_bytes is None:
        return some
    taken = []
    for entry in some:
        if total <= keep_bytes:
            break
        taken.append(entry)
        total -= entry.size
    return taken


def delete(entry: Entry) -> bool:
    """Delete a result; False, and nothing done, where a process holds one of its locks."""
    with contextlib.ExitStack() as held:
        for path in sorted({*entry.folder.rglob("*lock"), entry.folder / "lock"}):
            lock = FileLock(path, blocking=False)
            try:
                held.enter_context(lock)
            except Timeout:
                return False
        shutil.rmtree(entry.folder)
    return True


def listing(root: Path, found: Sequence[Entry], now: float) -> Iterator[str]:
    """Yield the lines of a list of results: their size, how long ago they were used, and what they are."""
    total = sum(e.size for e in found)
    yield f"{root}: {_size(total)} in {len(found)} results"
    for kind, words in KINDS.items():
        some = [e for e in found if e.kind == kind]
        if some:
            yield ""
            yield f"{words}: {_size(sum(e.size for e in some))} in {len(some)}"
            yield from (_line(e, now) for e in some)


def _line(entry: Entry, now: float) -> str:
    old = "" if entry.version == VERSION else "[not read any more] "
    return f"  {entry.folder.name}  {_size(entry.size):>9}  {_age(now - entry.used):>5}  {old}{entry.about}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _age(seconds: float) -> str:
    for unit in ("d", "h", "m"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not match:
        raise InputError("--older-than", f"expected a time such as 12h, 30d or 4w but got {text!r}")
    return float(match[1]) * SECONDS[match[2]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fimo store``; return the exit status.

    Raises:
        InputError: naming the flag at fault.
    """
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    root, now = Path(options.store), time.time()
    if not root.is_dir():
        raise InputError("--store", f"no such folder: {root}; --store FOLDER names the store of a run")
    found = entries(root)
    if options.action == "list":
        print("\n".join(listing(root, found, now)))
        return 0
    older = None if options.older_than is None else _duration(options.older_than)
    keep = None if options.keep_mb is None else options.keep_mb * 1e6
    flags = (options.kind, older, keep, options.old_version or None, options.unreadable or None)
    if not options.all and all(flag is None for flag in flags):
        raise InputError(
            "prune", "say what: --older-than, --kind, --keep-mb, --old-version, --unreadable or --all"
        )
    some = chosen(found, now, options.kind, older, keep, options.old_version, options.unreadable)
    if not options.yes:
        print("\n".join([*listing(root, some, now), "", "nothing was deleted; --yes deletes these"]))
        return 0
    done = [(entry, delete(entry)) for entry in some]
    freed = sum(entry.size for entry, gone in done if gone)
    print(f"{root}: deleted {sum(gone for _, gone in done)} results, {_size(freed)}")
    for entry, gone in done:
        if not gone:
            print(f"  in use, kept: {entry.folder}")
    return 0


def console(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``fimo store`` (``python -m fimo.store``) and end the process."""
    try:
        status = main(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fimo store",
        description="List what the store of results holds, or prune it. A pruned result is computed again "
        "when it is needed.",
    )
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "prune"), default="list")
    add("--store", default="outputs/store", metavar="FOLDER", help="as the setting store; outputs/store")
    add("--kind", choices=tuple(KINDS), help="prune: only of this kind")
    add("--older-than", metavar="TIME", help="prune: what was not used for so long: 12h, 30d, 4w")
    add("--keep-mb", type=float, metavar="N", help="prune: the least recently used, until N MB are left")
    add("--old-version", action="store_true", help="prune: what an older fimo wrote, which is never read")
    add("--unreadable", action="store_true", help="prune: what has no description")
    add("--all", action="store_true", help="prune: everything")
    add("--yes", action="store_true", help="delete; without it, prune only lists what it would delete")
    return parser
