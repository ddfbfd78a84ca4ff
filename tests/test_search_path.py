"""Choices of one's own: ``--config-dir``, ``hydra.searchpath``, ``-cn``, and packages that add some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import fimo
from fimo.app.command import main
from fimo.app.methods import Told
from fimo.app.search_path import SearchPath, flags_first
from fimo.methods import catalogue

CONF = Path(__file__).parents[1] / "conf"
SMALL = [
    "trainer.max_epochs=1", "model.network.hidden=[4]", "model.accept_poor=true", "further_training.seeds=2",
    "further_training.left_out=3", "further_training.epochs=1", "report=false", "logger=none",
]  # fmt: skip


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of choices: a preset, a data set, and a configuration that chooses it."""
    folder = tmp_path / "own"
    files = {
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /dataset: houses\nseed: 7\n",
        "dataset/houses.yaml": (CONF / "dataset/diabetes.yaml")
        .read_text()
        .replace("batch_size: 32", "batch_size: 16"),
        "other.yaml": "defaults:\n  - config\n  - override dataset: houses\n  - _self_\nseed: 9\n",
        "placed.yaml": f"defaults:\n  - config\n  - _self_\nhydra:\n  searchpath: ['file://{folder}']\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a method, a data set and a preset, without importing it."""
    site = tmp_path / "site"
    files = {
        "extra/__init__.py": "",
        "extra/method.py": (
            "import torch\n"
            "from fimo.methods.base import AttributionMethod\n"
            "from fimo.scores import Scores\n\n\n"
            "class Constant(AttributionMethod):\n"
            '    """Ones."""\n\n'
            '    needs = "nothing"\n'
            '    cost = "none"\n'
            '    use = "never"\n\n'
            "    def __init__(self, value: float = 1.0) -> None:\n"
            "        self.value = value\n\n"
            "    def scores(self, problem):\n"
            "        shape = (len(problem.test), len(problem.left_out))\n"
            "        return self.value * torch.arange(float(shape[1])).expand(shape)\n"
        ),
        "extra/conf/method/constant.yaml": (
            "# @package methods\nconstant:\n  _target_: extra.method.Constant\n  value: 2.0  # of all\n"
        ),
        "extra/conf/dataset/houses.yaml": (CONF / "dataset/diabetes.yaml").read_text(),
        "extra/conf/experiment/lab/first.yaml": "# @package _global_\nseed: 5\n",
        "extra/conf/model/mlp.yaml": "network: {}\n",  # never instead of the packaged one
        "extra-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n",
        "extra-1.0.dist-info/entry_points.txt": "[fimo.conf]\nextra = extra.conf\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    catalogue._settings.cache_clear()
    yield site
    catalogue._settings.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "extra"]:
        del sys.modules[name]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a command line; return what it printed, errors too."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["src.run", *arguments])
        try:
            main(CONF)
        except SystemExit as ended:
            if ended.code not in (0, None):
                found = capsys.readouterr()
                return found.err if found.err.startswith("error") else found.out + found.err
        return capsys.readouterr().out

    return run


def test_a_folder_of_ones_own_choices_is_looked_into_as_hydra_does(own: Path, printed) -> None:
    shown = ["--cfg", "job", "-p"]
    assert printed("--config-dir", str(own), "experiment=mine", *shown, "seed").strip() == "7"
    assert printed("experiment=mine", "-cd", str(own), *shown, "dataset.batch_size").strip() == "16"
    assert (
        printed(f"hydra.searchpath=[file://{own}]", "dataset=houses", *shown, "dataset.batch_size").strip()
        == "16"
    )
    assert printed("-cn", "other", "-cd", str(own), *shown, "seed").strip() == "9"
    assert (
        printed("-cn", "placed", "-cd", str(own), "dataset=houses", *shown, "dataset.batch_size").strip()
        == "16"
    )
    assert "mine" in printed("-cd", str(own), "--help")


def test_a_misspelt_choice_of_ones_own_is_one_line_with_the_nearest(own: Path, printed) -> None:
    assert (
        printed("-cd", str(own), "experiment=min")
        == "error: experiment: no choice 'min'; did you mean mine?\n"
    )
    assert printed("-cd", f"{own}/none", "seed=1") == f"error: --config-dir: no such folder: {own}/none\n"
    assert "-config-name: no configuration 'othr'" in printed("-cd", str(own), "-cn", "othr")


def test_a_sweep_takes_its_jobs_from_a_folder_of_ones_own(own: Path, printed, tmp_path: Path) -> None:
    places = [f"store={tmp_path}/store", f"hydra.sweep.dir={tmp_path}/sweep", "+method=graddot"]
    told = printed("-m", "dataset=houses,diabetes", "--config-dir", str(own), *SMALL, *places)
    assert "sweep of 2 jobs" in told
    assert "2 finished" in told


@pytest.mark.parametrize(
    ("given", "sorted_"),
    [
        ("seed=1 -m --config-dir own x=2", "-m --config-dir own seed=1 x=2"),
        ("-m a=1,2 -cn other", "-m -cn other a=1,2"),
        ("a=1 --info defaults", "--info=defaults a=1"),
        ("--info a=1", "--info=all a=1"),
        ("--cfg=job a=1 -p seed", "--cfg=job -p seed a=1"),
    ],
)
def test_flags_go_before_settings_with_what_they_take(given: str, sorted_: str) -> None:
    assert flags_first(given.split()) == sorted_.split()


def test_an_installed_package_adds_methods_data_sets_and_presets(
    package: Path, printed, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = printed(
        "experiment=lab/first", "dataset=houses", "+method=[constant,graddot]", *SMALL,
        "methods.constant.value=3", f"hydra.run.dir={run}", f"store={tmp_path}/store",
    )  # fmt: skip
    table = pd.read_csv(run / "evaluation.csv")
    assert set(table["method"]) == {"constant", "graddot"}, said
    assert "seed: 5" in (run / ".hydra/config.yaml").read_text()


def test_an_installed_package_is_known_to_python_and_changes_nothing(package: Path) -> None:
    assert fimo.methods().loc["constant", "use"] == "never"
    places = SearchPath.of([], CONF)
    assert places.files("model")["mlp"] == CONF / "model/mlp.yaml"
    assert places.files("dataset")["houses"] == package / "extra/conf/dataset/houses.yaml"


def test_a_packages_folder_that_is_missing_is_named(package: Path, printed) -> None:
    (package / "extra-1.0.dist-info/entry_points.txt").write_text("[fimo.conf]\nextra = extra.cnf\n")
    assert printed("seed=1") == "error: fimo.conf.extra: extra.cnf is no folder of an installed package\n"


def test_methods_are_listed_with_what_they_say_of_themselves(package: Path) -> None:
    files = SearchPath.of([], CONF).files("method")
    table = fimo.methods()
    assert list(files) == sorted(table.index)
    for name, file in files.items():
        told, known = Told.of(file), table.loc[name]
        assert (told.summary, told.needs, told.cost, told.use) == (
            known["summary"], known["needs"], known["cost"], known["use"],
        ), name  # fmt: skip


def test_the_list_of_methods_imports_no_torch() -> None:
    code = (
        "import sys; from fimo.app.command import main; from pathlib import Path\n"
        "sys.argv = ['fimo', 'methods', *sys.argv[1:]]\n"
        "try: main(Path('conf'))\n"
        "finally: assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *names], cwd=CONF.parent, capture_output=True, text=True
        )

    every, one, none = run(), run("ekfac"), run("ekfack")
    assert [line.split()[0] for line in every.stdout.partition("\n\n")[0].splitlines()[1:]] == sorted(
        fimo.methods().index
    )
    assert "damping: auto" in one.stdout
    assert "EK-FAC" in one.stdout
    assert none.returncode == 2
    assert "error: method: there is no 'ekfack'; did you mean ekfac or kfac" in none.stderr
