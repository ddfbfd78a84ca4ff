"""The built wheel: the console command with its configuration, from any folder."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fimo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is left in the repository; needs no network."""
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    (copy / "build" / "lib" / "fimo").mkdir(parents=True)
    (copy / "build" / "lib" / "fimo" / "forgotten.py").touch()  # of an earlier build
    command = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist"]
    made = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return next((copy / "dist").glob("*.whl"))


def test_it_holds_the_package_its_configuration_and_the_reports_page_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    conf = {f"fimo/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")}
    modules = {
        f"fimo/{p.relative_to(ROOT / 'src' / 'fimo')}"
        for p in (ROOT / "src" / "fimo").rglob("*")
        if p.suffix in (".py", ".html", ".css", ".js", ".typed")
    }
    assert "fimo/py.typed" in names
    assert set(names) == conf | modules


def test_it_says_its_version_its_licence_and_what_the_core_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    said = email.message_from_bytes(archive.read(metadata))
    assert said["Version"] == fimo.__version__
    assert said["License-Expression"] == "Apache-2.0"
    (licence,) = [n for n in archive.namelist() if n.endswith("LICENSE")]
    assert archive.read(licence).decode() == (ROOT / "LICENSE").read_text()
    core = [Requirement(line) for line in said.get_all("Requires-Dist")]
    core = [r for r in core if r.marker is None]
    assert {"torch", "datasets"} <= {r.name for r in core}
    assert not {"plotly", "wandb", "matplotlib", "openpyxl", "transformers"} & {r.name for r in core}


@pytest.mark.parametrize(
    "there",
    [
        {"torch": "2.4.1", "numpy": "2.1.0", "pandas": "2.2.3", "scikit-learn": "1.5.2"},
        {"torch": "3.0.0", "numpy": "3.1.0", "pandas": "4.0.0", "scikit-learn": "2.0.0"},
    ],
    ids=["older", "newer"],
)
def test_other_versions_that_are_there_stay_as_they_are(
    there: dict[str, str], wheel: Path, tmp_path: Path
) -> None:
    for name, version in there.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from pip._internal.cli.main import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    wanted = ["install", "--dry-run", "--no-index", "--quiet", "--report", "-", str(wheel)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *wanted],
        cwd=tmp_path,
        env={**environment, "PIP_CONFIG_FILE": os.devnull},  # no constraints of this machine
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [package["metadata"]["name"] for package in json.loads(done.stdout)["install"]] == ["fimo"]


def test_the_console_command_explains_itself_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    archive.extractall(tmp_path / "site")
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "fimo = fimo.app.command:console" in archive.read(entry).decode()
    code = "import fimo, sys; from fimo.app.command import console; print(fimo.__file__); console()"
    shown = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(str(tmp_path / "site"))
    for choice in ("datainf", "concrete", "counterfactual", "further_training: adam, adamw, default"):
        assert choice in shown.stdout
