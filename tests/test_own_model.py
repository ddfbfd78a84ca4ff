"""The documents' example of a user's own network and data runs from the command line as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_of_a_users_own_network_and_data_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how_to" / "command_line.md").read_text()
    module = re.search(r"```python file=mine.py\n(.*?)```", page, re.DOTALL)
    command = re.search(r"```sh\npython (-m src.run model=custom .*?)```", page, re.DOTALL)
    assert module is not None
    assert command is not None
    (tmp_path / "mine.py").write_text(module[1])
    reduced = [
        "+method=graddot", "trainer.max_epochs=1", "further_training.epochs=1", "further_training.seeds=2",
        "further_training.left_out=3", "evaluation.bootstrap=0", "logger=none", "model.accept_poor=true",
        f"store={tmp_path}/store", f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    result = subprocess.run(
        [sys.executable, *shlex.split(command[1].replace("\\\n", " ")), *reduced],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "scores" / "graddot.safetensors").is_file()
    assert "custom" in (tmp_path / "run" / "report.html").read_text()
