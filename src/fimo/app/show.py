"""What a finished run answered, printed again: ``fimo show FOLDER``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fimo.app.jobs import JobRecord
from fimo.app.sweep import SWEEP, jobs_of, what_differs
from fimo.errors import InputError
from fimo.reporting.answer import FILE, Answer
from fimo.reporting.plain_text import as_text, table, terminal_width


def console(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``fimo show`` and end the process."""
    parser = argparse.ArgumentParser(
        prog="fimo show",
        description="Print what a finished run, audit or sweep answered: the rows that matter, how good the "
        "ranking of the others is, what to do, what to distrust.",
    )
    parser.add_argument("folder", type=Path, help="of a finished run, or of a sweep")
    try:
        print(shown(parser.parse_args(arguments).folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def shown(folder: Path, width: int | None = None) -> str:
    """Return what a run's or sweep's folder answers, in lines for a terminal.

    Args:
        width: of a line; the terminal's when None.

    Raises:
        InputError: there is no finished run in it.
    """
    if not folder.is_dir():
        raise InputError("show", f"no such folder: {folder}")
    if (folder / SWEEP).exists():
        return _jobs(folder, width)
    answer = answer_of(folder)
    there = {str(folder / name): what for name, what in answer.files.items() if (folder / name).exists()}
    return as_text(dataclasses.replace(answer, files=there), width)


def answer_of(folder: Path) -> Answer:
    """Return what a run's folder answers; worked out anew where no ``answer.json`` was written.

    Raises:
        InputError: there is no finished run in it.
    """
    if (folder / FILE).exists():
        return Answer.load(folder)
    if (folder / "audit.json").exists():
        from fimo.reporting.audit_answer import audit_answer
        from fimo.reporting.audit_run import AuditRun

        return audit_answer(AuditRun.load(folder))
    if not (folder / "report.json").exists():
        raise InputError("show", f"{folder} is no folder of a finished run, audit or sweep")
    from fimo.reporting.results import Results  # torch takes seconds to import
    from fimo.reporting.study_answer import study_answer

    return study_answer(Results.load(folder))


def _jobs(folder: Path, width: int | None) -> str:
    """Return a line for each job of a sweep: what it differs in, what became of it, what it answered."""
    found = jobs_of(folder)
    if not found:
        raise InputError("show", f"no job of the sweep in {folder} has begun")
    names = what_differs([record for _, record in found])
    lines = [["job", "status", "agreement", "answer"]]
    for where, record in found:
        agreement = "" if record.objective is None else f"{record.objective:.3f}"
        lines.append([names[record.number], _status(record), agreement, _in_short(where, record)])
    return "\n".join([f"sweep of {len(found)} jobs in {folder}", *table(lines, width or terminal_width())])


def _status(record: JobRecord) -> str:
    return "done" if record.done else record.status


def _in_short(folder: Path, record: JobRecord) -> str:
    if record.error:
        return record.error
    verdict = Answer.load(folder).verdict if (folder / FILE).exists() else ()
    return str(verdict[1] if len(verdict) > 1 else "".join(verdict))
