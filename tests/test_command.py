"""The command line: mistakes are one line, with the key and exit status, before any training."""

from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fimo.app.command import console, main
from fimo.models.mlp import mlp

ROOT = Path(__file__).parents[1]
CSV = "dataset=csv dataset.target=label dataset.task=classification dataset.path="


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Run a command line that must fail; return what it printed. Training raises, so it comes too late."""

    def run(arguments: str, training: bool = False) -> str:
        places = f"hydra.run.dir={tmp_path}/run store={tmp_path}/store logger=none"
        monkeypatch.setattr(sys, "argv", ["src.run", *places.split(), *arguments.split()])
        if not training:
            monkeypatch.setattr(
                "pytorch_lightning.Trainer.fit", lambda *a, **k: pytest.fail("training began")
            )
        with pytest.raises(SystemExit) as caught:
            main(ROOT / "conf")
        assert caught.value.code not in (0, None)
        return capsys.readouterr().err

    return run


def table(folder: Path, rows: str) -> str:
    path = folder / "table.csv"
    path.write_text("a,b,label\n" + "\n".join(f"{k},{k % 7},{'yn'[k % 2]}" for k in range(20)) + rows)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("dataset=concrete dataset.path=/nowhere", "error: dataset.path: no such file: /nowhere"),
        ("+method=trasin", "error: method: no choice 'trasin'; did you mean tracin"),
        ("dataset=diabetis", "error: dataset: no choice 'diabetis'; did you mean diabetes"),
        ("further_training.left_out=[0,397]", "further_training.left_out: expected indices from 0 to 396"),
        ("further_training.left_out=[3,5,3]", "further_training.left_out: left out twice: 3"),
        ("further_training.left_out=[[3,3]]", "further_training.left_out: a group has an index twice: 3, 3"),
        ("further_training.left_out=398", "further_training.left_out: expected a number from 1 to 397"),
        ("further_training.test=[-1]", "further_training.test: expected indices from 0 to 44 but got -1"),
        ("further_training.seeds=0", "further_training.seeds: expected at least 1 seed but got 0"),
        ("further_training.seeds=[1,1]", "further_training.seeds: expected distinct"),
        ("further_training.lr=-1", "further_training.lr: expected a positive number but got -1"),
        ("further_training.micro_batch_size=0", "further_training.micro_batch_size: expected at least 1"),
        (
            "further_training.micro_batch_size=8",
            "further_training.micro_batch_size: a network of linear layers is run by products of whole",
        ),
        ("further_training.optimizer=sgdd", "further_training.optimizer: expected one of sgd, adam, adamw"),
        ("further_training.leave_out=skip", "further_training.leave_out: expected one of shift, mask"),
        ("model.optimizer=lbfgs", "model.optimizer: expected one of sgd, adam, adamw"),
        ("model.loss=hinge", "model.loss: expected one of mse"),
        ("model.network.hidden=[0]", "model.network.hidden: expected widths of at least 1"),
        ("model.network.hidden=[a]", "model.network.hidden: expected widths of at least 1, a list of"),
        ("model.network.hidden=[1.5]", "model.network.hidden: expected widths of at least 1"),
        ("further_training.left_out=all", "further_training.left_out: expected a number of rows, a list of"),
        ("+model.network.widht=3", "model.network.widht: unknown argument"),
        ("model.trainable=[head.*]", "model.trainable: no parameter matches 'head.*'"),
        ("dataset.test_size=1.5", "dataset.test_size: expected a share between 0 and 1"),
        ("+method=datainf methods.datainf.damping=-1", "damping"),
        ("evaluation.metrics=[hoeffding]", "hoeffding"),
        ("+dataset.typo=1", "dataset.typo: unknown argument"),
        ("+method=tracin methods.tracin.lrr=1", "methods.tracin.lrr: unknown argument; did you mean lr"),
        ("+method=graddot methods.tracin.lr=1", "methods.tracin: does not run; there are graddot"),
        ("methods.trasin.lr=1", "methods.trasin: no such method; did you mean tracin"),
        ("further_training.lrr=1", "further_training.lrr: unknown key; did you mean lr"),
        ("lr=1", "lr: unknown key; did you mean model.lr or further_training.lr"),
        ("+method=tracin,datainf", "method: got several values"),
        ("dataset.path=~/a", "dataset.path: unknown key of the chosen file; a key of dataset=cifar10, "),
        ("experiment=null", "experiment: null is no choice; ~experiment leaves the group out"),
        ("trainer.precision=64-true", "trainer.precision: expected one of 32-true, bf16-mixed, 16-mixed"),
        ("trainer.devices=0", "trainer.devices: expected a number, a list of indices or auto but got 0"),
        ("trainer.strategy=dpp", "trainer.strategy: expected one of auto, ddp"),
        ("trainer.accelerator=mps", "trainer: accelerator=mps: `MPSAccelerator` can not run"),
        ("model.momentum=2", "model.momentum: expected a number in [0, 1)"),
        ("model.weight_decay=-1", "model.weight_decay: expected at least 0"),
        ("model.loss=cross_entropy", "model.loss: cross_entropy needs classes"),
        (
            "model.measurement=logit_margin",
            "model.measurement: logit_margin needs classes as targets",
        ),
        ("model.loss=torch.nn.MSELoss", "model.loss: torch.nn.MSELoss is a class, not a function of outputs"),
        (
            "model=custom model.network._target_=torch.nn.Linear +model.network.in_features=10 "
            "+model.network.out_features=auto",
            "model.network.out_features: auto is known of arguments called inputs, outputs and classes only",
        ),
        (
            "model=custom model.network._target_=tests.test_door.Recomputing +model.network.how=reentrant "
            "+model.network.always=false +model.network.inputs=10",
            "model.network: calls parts of its forward pass again in the backward pass (torch.utils.check",
        ),
        ("+method=?", "method: no choice '?'; there are arnoldi, "),
        ("+method=", "method: expected a choice but got nothing; there are arnoldi, "),
        ("experiment=", "experiment: expected a choice but got nothing; there are bench/adult, "),
        ("+method=list", "method: no choice 'list'; there are arnoldi, "),
        ("+method=Tracin", "method: no choice 'Tracin'; did you mean tracin?"),
        ("+method=null", "method: null is no choice; without it all methods run"),
        ("~method", "method: is not chosen, so it can't be left out; without +method=NAME all methods run"),
        ("+methods=[tracin]", "methods: did you mean +method=[tracin]?"),
        (
            "+method=graddot methods.exact.damping=10x",
            "methods.exact: does not run; there are graddot; +method=[graddot,exact] runs it too",
        ),
        ("-cn other", "--config-name: no configuration 'other' in "),
        ("seed=-1", "seed: expected at least 0 but got -1"),
        ("trainer.max_epochs=0", "trainer.max_epochs: 0 leaves the network at its random initial parameters"),
        ("store=pyproject.toml", "store: expected a folder but pyproject.toml is a file"),
        ("store=pyproject.toml/a/b", "store: expected a folder but pyproject.toml is a file"),
        ("model.checkpoint=src", "model.checkpoint: expected a file but src is a folder"),
        ("model.checkpoint=README.md", "model.checkpoint: README.md is not a checkpoint; expected a file"),
        (
            "dataset=csv dataset.path=${oc.env:NOPE}",
            "dataset.path: Environment variable 'NOPE' not found",
        ),
        ("model.loss=no.such", "model.loss: no.such can't be imported: "),
        ("further_training.betas=[0.9]", "further_training.betas: expected two numbers in [0, 1)"),
        ("further_training.test=[1,1]", "further_training.test: measured twice: 1"),
        ("evaluation.shown=-1", "evaluation.shown: expected at least 1 but got -1"),
        ("dataset.split_seed=-1", "dataset.split_seed: expected a number from 0"),
        ("dataset.test_size=0.9999", "dataset.test_size: 0.9999 of 442 instances can't be held out"),
        ("store=", "store: expected a folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_key(refused, arguments: str, said: str) -> None:
    printed = refused(arguments)
    line = [text for text in printed.splitlines() if text.startswith("error: ")]
    assert len(line) == 1, printed
    assert said in line[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            "\n1,x,y",
            "dataset: can't tell what a column of the table means: column 'b' has 'x' in data row 20",
        ),
        ("\n1,2,", "dataset.target: column 'label' has a missing value in data row 20 (line 22)"),
        ("\n1,1e300,y", "dataset.path: column 'b' has 1e+300 in data row 20 (line 22), too large to be"),
        ("\n1,2,3,y", "is not a table separated by ',': line 22 has 4 cells where the first has 3"),
    ],
)
def test_a_bad_table_is_one_line(refused, tmp_path: Path, rows: str, said: str) -> None:
    assert said in refused(CSV + table(tmp_path, rows))
    assert "dataset.target: no column 'lable'" in refused(
        CSV.replace("=label", "=lable") + table(tmp_path, "")
    )


def test_a_checkpoint_of_another_shape_is_refused_naming_the_layer(refused, tmp_path: Path) -> None:
    torch.save(mlp(10, 1, (64, 128)).state_dict(), tmp_path / "m.pt")
    assert "model.checkpoint: layer 1.weight has shape (64, 10)" in refused(
        f"model.checkpoint={tmp_path}/m.pt"
    )


def test_a_users_own_code_that_fails_is_named_with_its_line(refused, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "faulty.py").write_text("def data():\n    return {}['x']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "dataset=custom dataset.train._target_=faulty.data dataset.test._target_=faulty.data"
    assert "dataset: KeyError: 'x' (faulty.py, line 2)" in refused(own)


def test_a_module_that_a_users_module_lacks_is_named_with_its_line(
    refused, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "lacking.py").write_text("\nimport pandaz\n\ndef loss(o, t): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = "lacking.loss can't be imported: lacking.py, line 2 imports 'pandaz', which is not installed"
    assert f"model.loss: {said}" in refused("model.loss=lacking.loss")


def test_a_reader_that_closes_the_output_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "argv", ["src.run", "--help"])
    with pytest.raises(SystemExit) as ended:
        main(ROOT / "conf")
    assert ended.value.code == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("way", [KeyboardInterrupt, SystemExit(1)])  # of Python, of a Lightning Trainer
def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, way) -> None:
    def interrupted(*_: object) -> None:
        raise way

    monkeypatch.setattr("fimo.app.experiment.run_experiment", interrupted)
    monkeypatch.setattr(sys, "argv", ["src.run", f"hydra.run.dir={tmp_path}/run"])
    with pytest.raises(SystemExit) as caught:
        main(ROOT / "conf")
    assert caught.value.code == 130
    assert (
        capsys.readouterr().err.strip() == "interrupted; the same command goes on from what is in the store"
    )


def test_a_folder_that_can_not_be_written_is_one_line(refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    printed = refused(f"hydra.run.dir={tmp_path}/file/run")
    assert f"error: hydra.run.dir: {tmp_path}/file/run: Not a directory" in printed
    assert f"error: hydra.run.dir: expected a folder but {tmp_path}/file is a file" in refused(
        f"hydra.run.dir={tmp_path}/file"
    )
    assert "Traceback" not in printed


def test_the_console_command_imports_modules_of_the_folder_it_runs_in(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", ["/elsewhere/bin"])
    monkeypatch.setattr("fimo.app.command.main", lambda conf: None)
    monkeypatch.chdir(tmp_path)
    console()
    assert sys.path[0] == str(tmp_path)


def test_a_flag_that_there_is_not_is_one_line(refused) -> None:
    assert "error: --epochs: unknown flag; settings are given as epochs=VALUE" in refused("--epochs 3")


def test_a_full_disk_is_one_line_with_the_file(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fimo.store.files.save_file", full)
    printed = refused("trainer.max_epochs=1 model.network.hidden=[]", training=True)
    assert re.search(r"^error: \S+model\.safetensors: No space left on device$", printed, re.MULTILINE)
    assert "Traceback" not in printed
    assert "Error executing job" not in printed


def test_a_disk_that_is_full_when_the_report_is_written_is_one_line_with_the_file(
    refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, text: str, *more: Any, **options: Any) -> int:
        if path.name.startswith(".report.html"):
            raise OSError(errno.ENOSPC, "No space left on device")  # as writing says it: of no file
        return write(path, text, *more, **options)

    monkeypatch.setattr(Path, "write_text", full)
    short = "further_training.epochs=1 further_training.seeds=2 further_training.left_out=3"
    printed = refused(
        f"trainer.max_epochs=1 model.network.hidden=[] model.accept_poor=true +method=graddot {short}",
        training=True,
    )
    assert re.search(r"^error: \S+/report\.html: No space left on device$", printed, re.MULTILINE)
    assert "Traceback" not in printed


def test_help_explains_the_groups_without_importing_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from fimo.app.command import main\n"
        "sys.argv = ['src.run', '--help']\n"
        "try: main(Path('conf'))\n"
        "finally: assert 'torch' not in sys.modules"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for group in (
        "dataset: breast_cancer",
        "further_training: ",
        "+method=[tracin,datainf]",
        "logger: csv, none",
    ):
        assert group in printed.stdout
