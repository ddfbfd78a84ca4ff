"""What a change must pass: the tests and the lint, both."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "run"

MAKE = """#!/bin/sh
echo "make $1" >> "$CALLS"
[ "$1" = test ] && echo '3 passed, 1 skipped in 0.12s'
case " $FAILING " in *" $1 "*) exit 2;; esac
"""


@pytest.mark.parametrize("failing", ["", "test", "lint", "test lint"])
def test_both_tests_and_lint_run_and_either_fails_the_whole(failing, tmp_path):
    make = tmp_path / "make"
    make.write_text(MAKE)
    make.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "FAILING": failing,
    }  # fmt: skip
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(failing)
    assert calls.read_text().split("\n") == ["make test", "make lint", ""]
    assert done.stdout.splitlines()[-1] == "3 passed, 1 skipped in 0.12s"
