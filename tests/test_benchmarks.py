"""Benchmarks are commands: each can be asked what it does, so that what it imports is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_does(script: Path) -> None:
    if script.stem == "mutation" and importlib.util.find_spec("libcst") is None:
        pytest.skip("the extra mutation is not installed")
    found = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("usage: ")
