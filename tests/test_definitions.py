"""What is read of classes and functions without importing them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object

from fimo.app.definitions import arguments

CONF = Path(__file__).parents[1] / "conf"


def targets() -> list[str]:
    files = [file for group in ("dataset", "model", "method") for file in (CONF / group).glob("*.yaml")]
    named = {name for file in files for name in re.findall(r"_target_: (fimo\.\S+)", file.read_text())}
    return sorted(named)


def test_arguments_read_from_source_are_those_of_the_signature() -> None:
    told = 0
    for target in targets():
        known = arguments(target)
        if known is not None:
            told += 1
            assert known == list(inspect.signature(get_object(target)).parameters), target
    assert told >= 20


@pytest.mark.parametrize(
    "mistake",
    [
        "+dataset.typo=1", "+model.network.widht=3", "+method=tracin methods.tracin.lrr=1",
        "further_training.lr=-1", "further_training.optimizer=sgdd", "further_training.leave_out=skip",
        "further_training.seeds=0", "trainer.max_epoch=3", "callbacks=[early_stoping]", "seed=-1",
    ],
)  # fmt: skip
def test_a_mistake_is_answered_before_torch_is_imported(mistake: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fimo.app.command import main\n"
        "sys.argv = ['src.run', *sys.argv[1:]]\n"
        "try: main(Path('conf'))\n"
        "finally: assert not {'torch', 'pandas', 'pytorch_lightning'} & set(sys.modules)"
    )
    given = [f"hydra.run.dir={tmp_path}/run", "logger=none", *mistake.split()]
    said = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=CONF.parent, capture_output=True, text=True
    )
    lines = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert said.returncode == 2, said.stderr
    assert len(lines) == 1, said.stderr
    assert "Traceback" not in said.stderr
