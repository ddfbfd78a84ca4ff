"""Packages of extras: the core does without them, and what needs one says which extra brings it, at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fimo import extras
from fimo.app.command import main
from fimo.data.concrete import ConcreteData
from fimo.data.energy import EnergyData, read_sheet
from fimo.data.image import ImageData
from fimo.data.tokens import make_tokens
from fimo.errors import InputError
from fimo.models.huggingface import causal_lm, text_classifier

ROOT = Path(__file__).parents[1]
OPTIONAL = ("plotly", "jinja2", "matplotlib", "wandb", "xlrd", "openpyxl", "transformers", "PIL")

HIDDEN = f"""
import importlib.metadata as metadata, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
found = metadata.Distribution.from_name
def from_name(name):  # what other libraries ask whether a package is installed
    if name.lower() in {(*OPTIONAL, "pillow")}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.Distribution.from_name = from_name
"""


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages look as if they were not installed."""

    def hide(*modules: str) -> None:
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)

    return hide


def test_a_run_without_a_report_needs_no_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    small = (
        "trainer.max_epochs=2 model.accept_poor=true +method=graddot further_training.epochs=1"
        " further_training.seeds=2 further_training.left_out=3 further_training.test=2"
        " trainer.enable_progress_bar=false report=false logger=none hydra.run.dir=run store=store"
    )
    places = [str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "fimo", *small.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation.csv").stat().st_size > 0
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("missing", "arguments", "said"),
    [
        (
            ["plotly", "jinja2", "wandb"],
            "",
            "error: report: needs plotly, jinja2, wandb, not installed here: "
            "pip install 'fimo[figures,wandb]'; or without: report=false logger=none",
        ),
        (
            ["plotly", "jinja2"],
            "logger=none",
            "error: report: needs plotly, jinja2, not installed here: pip install 'fimo[figures]'; "
            "or without: report=false",
        ),
        (
            ["wandb"],
            "report=false",
            "error: logger: needs wandb, not installed here: pip install 'fimo[wandb]'; "
            "or without: logger=none",
        ),
        (
            ["PIL"],
            "report=false logger=none dataset=images dataset.path=.",
            "error: dataset: needs pillow, not installed here: pip install 'fimo[image]'",
        ),
        (
            ["xlrd"],
            "report=false logger=none dataset=concrete",
            "error: dataset.path: needs xlrd, not installed here: pip install 'fimo[spreadsheets]'; "
            "or give a text table",
        ),
    ],
)
def test_a_command_that_needs_a_missing_package_is_refused_in_one_line_before_any_work(
    missing: list[str],
    arguments: str,
    said: str,
    without: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    without(*missing)
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *a, **k: pytest.fail("training began"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a file was asked for"))
    places = f"hydra.run.dir={tmp_path}/run store={tmp_path}/store"
    monkeypatch.setattr(sys, "argv", ["fimo", *places.split(), *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main(ROOT / "conf")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    ("missing", "call", "said"),
    [
        ("PIL", lambda folder: ImageData(str(folder)).setup(), r"dataset: needs pillow.*fimo\[image\]"),
        ("xlrd", lambda folder: ConcreteData().read(), r"dataset\.path: needs xlrd.*fimo\[spreadsheets\]"),
        ("openpyxl", lambda folder: EnergyData().read(), r"needs openpyxl.*fimo\[spreadsheets\]"),
        ("openpyxl", lambda folder: read_sheet(folder / "a.xlsx"), r"needs openpyxl.*or give a text table"),
        ("xlrd", lambda folder: read_sheet(folder / "a.xls"), r"needs xlrd.*fimo\[spreadsheets\]"),
        ("transformers", lambda folder: make_tokens(str(folder)), r"dataset\.tokenizer: needs transformers"),
        ("transformers", lambda folder: causal_lm(9), r"model\.network: needs transformers.*fimo\[text\]"),
        ("transformers", lambda folder: text_classifier(str(folder), 9, 2), r"model\.network: needs transf"),
        ("jinja2", lambda folder: written("write_report"), r"report: needs jinja2.*fimo\[figures\]"),
        ("matplotlib", lambda folder: written("write_figures"), r"figures: needs matplotlib"),
    ],
)
def test_each_part_names_the_extra_that_it_lacks(
    missing: str, call: Callable[[Path], Any], said: str, without: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("a.xls", "a.xlsx"):
        (tmp_path / name).touch()
    without(missing)
    with pytest.raises(InputError, match=said) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def written(name: str) -> Any:
    import fimo.reporting

    return getattr(fimo.reporting, name)


def test_the_extra_that_a_message_names_brings_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    needs = [v for v in vars(extras).values() if isinstance(v, dict) and v is not extras.PACKAGES]
    needs = [need for need in needs if all(isinstance(modules, tuple) for modules in need.values())]
    asked = {(extra, module) for need in needs for extra, modules in need.items() for module in modules}
    assert {module for _, module in asked} == set(OPTIONAL)
    for extra, module in asked:
        assert extras.PACKAGES.get(module, module) in brought[extra]
