"""Rebuild reports and figures from runs' folders: ``python -m fimo.reporting RUN_DIR…``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fimo.errors import InputError

FIGURES = ("agreement", "seeds", "sorted", "mean", "distance", "retraining", "cost",
           "datamodeling", "removal", "mislabelled")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fimo.reporting",
        description="Rebuild the report of a run from its folder, or overlay several runs in one.",
    )
    parser.add_argument(
        "run_dir",
        nargs="+",
        type=Path,
        help="folder of a finished run, an audit, or a sweep (its finished jobs)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="report to write; default: report.html in the run's or sweep's folder (several: in this folder)",
    )
    parser.add_argument(
        "--figures",
        nargs="*",
        choices=[*FIGURES, []],
        metavar="NAME",
        help=f"write figures as PDF and PNG instead: all, or some of {', '.join(FIGURES)}",
    )
    parser.add_argument("--folder", type=Path, help="of the figures; default: figures beside the report")
    parser.add_argument("--names", nargs="*", help="names of the runs in legends; default: what differs")
    chosen = parser.parse_args(arguments)
    try:
        for path in write(chosen):
            print(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(chosen: argparse.Namespace) -> list[Path]:
    """Write what was asked for, and return the files."""
    import dataclasses

    from fimo.audit.result import AUDIT
    from fimo.reporting.overlay import load_runs
    from fimo.reporting.results import SEVERAL

    if len(chosen.run_dir) == 1 and chosen.figures is None and (chosen.run_dir[0] / SEVERAL).exists():
        from fimo.reporting import ModelsRun, write_models_report

        folder = chosen.run_dir[0]
        return [write_models_report(ModelsRun.load(folder), chosen.output or folder / "report.html")]
    if len(chosen.run_dir) == 1 and chosen.figures is None and (chosen.run_dir[0] / AUDIT).exists():
        from fimo.reporting import write_audit_report
        from fimo.reporting.audit_run import AuditRun

        folder = chosen.run_dir[0]
        return [write_audit_report(AuditRun.load(folder), chosen.output or folder / "report.html")]
    runs = load_runs(chosen.run_dir)
    if chosen.names:
        if len(chosen.names) != len(runs):
            raise InputError("--names", f"expected {len(runs)} names but got {len(chosen.names)}")
        runs = [dataclasses.replace(run, name=n) for run, n in zip(runs, chosen.names, strict=True)]
    output = chosen.output or (chosen.run_dir[0] if len(chosen.run_dir) == 1 else Path()) / "report.html"
    if chosen.figures is not None:
        from fimo.reporting import write_figures

        return write_figures(runs, chosen.folder or output.parent / "figures", chosen.figures or None)
    from fimo.reporting import write_report

    return [write_report(runs, output)]


if __name__ == "__main__":
    sys.exit(main())
