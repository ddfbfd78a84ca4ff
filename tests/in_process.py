"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fimo.app.command import main


def commands(
    conf: Path,
    settings: Sequence[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Path | str]:
    """Return what runs a command line in ``place/NAME``, and returns the folder, or the error's line."""

    def run(name: str, *arguments: str) -> Path | str:
        folder = place / name
        places = [f"hydra.run.dir={folder}", f"store={place}/store"]
        monkeypatch.setattr(sys, "argv", ["src.run", *settings, *places, *arguments])
        try:
            main(conf)
        except SystemExit:
            return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
        return folder

    return run
