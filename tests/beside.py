"""Installs the wheel into a fresh environment with other versions in it, touches none of them, and runs.

    python tests/beside.py [PACKAGE==VERSION …]      # default: the data libraries of a year ago

Needs a package index. The versions come first; after ``pip install fimo-….whl`` they must be the same, and
``import fimo``, ``fimo --version``, ``fimo --help`` and a small run without a report must work, from an empty
folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("numpy==2.1.3", "pandas==2.2.3", "scikit-learn==1.6.1")
SMALL = (
    "trainer.max_epochs=20 +method=[graddot,exact] further_training.epochs=2 further_training.seeds=3"
    " further_training.left_out=5 further_training.test=4 trainer.enable_progress_bar=false"
    " report=false logger=none hydra.run.dir=run"
)


def main(first: tuple[str, ...]) -> None:
    """Build, install and run; raises where a step fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(folder), at=ROOT)
        (wheel,) = folder.glob("fimo-*.whl")
        venv.create(folder / "venv", with_pip=True)
        bin = folder / "venv" / "bin"
        pip = (str(bin / "python"), "-m", "pip", "--disable-pip-version-check")
        work = folder / "work"
        work.mkdir()
        call(*pip, "install", "-q", *first, at=work)
        before = call(*pip, "freeze", at=work).splitlines()
        call(*pip, "install", "-q", str(wheel), at=work)
        after = call(*pip, "freeze", at=work).splitlines()
        assert set(before) <= set(after), f"changed: {sorted(set(before) - set(after))}"
        print("untouched:", *before)
        print("added:", *sorted(set(after) - set(before)))
        print(call(str(bin / "python"), "-c", "import fimo; print(fimo.__file__, fimo.__version__)", at=work))
        print(call(str(bin / "fimo"), "--version", at=work))
        assert "datainf" in call(str(bin / "fimo"), "--help", at=work)
        call(str(bin / "fimo"), *SMALL.split(), at=work)
        print((work / "run" / "evaluation.csv").read_text().splitlines()[-1])


def call(*command: str, at: Path) -> str:
    """Run a command without this environment's modules; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or FIRST)
