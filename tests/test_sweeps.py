"""Sweeps: failures are reported, the same command repeats only what is missing, launchers agree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from fimo.app.command import main
from fimo.app.definitions import libraries
from fimo.app.jobs import JobRecord, job_identity, run_once
from fimo.app.search_path import SearchPath
from fimo.app.sweep import Sweep, is_sweep, job_overrides
from fimo.errors import InputError
from fimo.store.fingerprint import code_identity, job_key

ROOT = Path(__file__).parents[1]
SMALL = [
    "trainer.max_epochs=3", "further_training.epochs=1", "further_training.seeds=2",
    "further_training.left_out=4", "further_training.test=3", "trainer.enable_progress_bar=false",
    "model.network.hidden=[4]", "evaluation.bootstrap=0", "logger=none", "report=false", "threads=1",
]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "src.run", "-m", *SMALL, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def records(sweep: Path) -> list[JobRecord]:
    found = [JobRecord.read(path.parent) for path in sweep.glob("*/job.json")]
    return sorted((r for r in found if r is not None), key=lambda r: r.number)


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Run a sweep in this process with the basic launcher; return its exit status and what it printed."""
    for module in ("fimo.app.sweep", "fimo.store.fingerprint"):  # someone may be at work on the code
        monkeypatch.setattr(f"{module}.code_identity", lambda: "as it is")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["src.run", "-m", f"store={tmp_path}/store", *SMALL, *arguments])
        status = 0
        try:
            main(ROOT / "conf")
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().out

    return run


def table(path: Path) -> str:
    path.write_text("a,b,label\n" + "\n".join(f"{k},{k % 7},{'yn'[k % 2]}" for k in range(40)))
    return str(path)


def test_a_failed_job_is_reported_and_is_all_that_the_same_command_repeats(sweep, tmp_path: Path) -> None:
    first, second = table(tmp_path / "one.csv"), tmp_path / "two.csv"
    command = (
        "+method=graddot", "dataset=csv", "dataset.target=label", "dataset.task=classification",
        f"dataset.path={first},{second}", f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    status, printed = sweep(*command)
    assert status == 1
    assert "2 jobs" in printed
    assert "1 finished, 1 failed" in printed
    assert f"dataset.path: no such file: {second}" in printed
    assert "no such file" in (tmp_path / "sweep" / "1" / "error.txt").read_text()
    kept = tmp_path / "sweep" / "0" / "sensitivity.safetensors"
    before = kept.stat().st_mtime_ns
    table(second)
    status, printed = sweep(*command)
    assert status == 0
    assert "1 of 2 jobs are done" in printed
    assert "1 done before, skipped, 1 finished" in printed
    assert kept.stat().st_mtime_ns == before
    assert not (tmp_path / "sweep" / "1" / "error.txt").exists()
    assert [r.status for r in records(tmp_path / "sweep")] == ["skipped", "finished"]
    jobs = pd.read_csv(tmp_path / "sweep" / "jobs.csv")
    assert jobs["status"].tolist() == ["skipped", "finished"]
    assert jobs["dataset.path"].tolist() == [first, str(second)]
    assert jobs["best_method/cosine"].tolist() == ["graddot", "graddot"]
    assert "+method" not in jobs
    assert "method" not in jobs, "what all jobs share is no column"


def test_a_sweep_ends_with_a_report_of_its_jobs_side_by_side(sweep, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shared = ("+method=graddot", f"hydra.sweep.dir={folder}", "report=true")
    status, printed = sweep("further_training=default,adam", *shared)
    assert status == 0
    assert f"the jobs side by side: {folder}/report.html" in printed
    page = (folder / "report.html").read_text()
    assert "adam" in page
    assert "sgd" in page


def test_a_failed_job_does_not_keep_later_batches_from_running(sweep, tmp_path: Path) -> None:
    status, printed = sweep(
        "+method=graddot", "further_training.lr=-1,0.1", "hydra.sweeper.max_batch_size=1",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    assert status == 1
    assert "1 finished, 1 failed" in printed
    assert [r.status for r in records(tmp_path / "sweep")] == ["failed", "finished"]


def test_the_gold_standard_assembles_from_shards_to_the_same_bytes(sweep, tmp_path: Path) -> None:
    shards = ("until=further_training", f"hydra.sweep.dir={tmp_path}/shards")
    for axes in ("further_training.seeds=[0],[1]", "further_training.left_out=[0,132],[264,396]"):
        assert sweep(axes, *shards)[0] == 0, axes
    # what was made so far: both seeds with all left out, and seeds 0, 1 with halves
    assert not (tmp_path / "shards" / "0" / "scores").exists()
    whole = ("+method=graddot,random", f"hydra.sweep.dir={tmp_path}/whole")
    assert sweep(*whole)[0] == 0
    costs = (tmp_path / "whole" / "0" / "cost.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in costs if line.startswith("further_training")] == ["1.0"]
    assert sweep(*whole, f"store={tmp_path}/another", f"hydra.sweep.dir={tmp_path}/unsharded")[0] == 0
    made = [tmp_path / name / "0" / "sensitivity.safetensors" for name in ("whole", "unsharded")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_shards_divide_the_seeds_or_else_the_left_out_instances(sweep, tmp_path: Path) -> None:
    shards = "further_training.shard=0/4,1/4,2/4,3/4"  # of 2 seeds and 4 left-out instances
    assert sweep(shards, "until=further_training", f"hydra.sweep.dir={tmp_path}/shards")[0] == 0
    assert sweep("+method=graddot,random", f"hydra.sweep.dir={tmp_path}/whole")[0] == 0
    costs = (tmp_path / "whole" / "0" / "cost.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in costs if line.startswith("further_training")] == ["1.0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("until=further_training further_training.shard=3/3", "expected k/n with k from 0 to n - 1"),
        ("until=further_training further_training.shard=0/9", "expected at most 4 parts but got 9"),
        ("further_training.shard=0/2", "is for runs with until=further_training"),
        ("until=final_model", "until: expected one of check, further_training, report"),
    ],
)
def test_a_part_that_there_is_not_is_refused(sweep, tmp_path: Path, arguments: str, said: str) -> None:
    status, printed = sweep(*arguments.split(), f"hydra.sweep.dir={tmp_path}/sweep")
    assert status == 1
    assert said in printed


@pytest.mark.launcher
def test_a_job_killed_in_the_middle_is_repeated_to_the_same_result(tmp_path: Path) -> None:
    arguments = (
        "+method=graddot,tracin", "further_training.epochs=100", "further_training.seeds=10",
        f"store={tmp_path}/store", f"hydra.sweep.dir={tmp_path}/sweep", "hydra/launcher=submitit_local",
    )  # fmt: skip
    code = code_identity()
    process = start(*arguments)
    victim = wait_for_further_training(tmp_path / "sweep" / "1", process)
    os.kill(victim, signal.SIGKILL)
    printed = process.communicate()[0]
    assert process.returncode == 1, printed
    assert "1 ended without a result" in printed
    assert records(tmp_path / "sweep")[1].done is False
    again = start(*arguments)
    printed = again.communicate()[0]
    assert again.returncode == 0, printed
    if code_identity() != code:
        pytest.skip("the code was edited meanwhile, so that its finished jobs are repeated too")
    assert "#0 +method=graddot: done before, skipped" in printed
    assert "1 done before, skipped, 1 finished" in printed
    results = [tmp_path / "sweep" / job / "sensitivity.safetensors" for job in "01"]
    assert results[0].read_bytes() == results[1].read_bytes()


def wait_for_further_training(folder: Path, process: subprocess.Popen[str]) -> int:
    """Return the process id of a job once it has a final model, and is thus further training it."""
    while process.poll() is None:
        record = JobRecord.read(folder)
        if record is not None and (folder / "final_model.ckpt").exists():
            return int(record.process.rpartition(":")[2])
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


@pytest.mark.launcher
@pytest.mark.parametrize("choice", ["joblib", "ray"])
def test_processes_give_the_basic_launchers_result(sweep, tmp_path: Path, choice: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{choice}_launcher", reason=f"{choice} is an extra")
    arguments = ("+method=graddot,tracin", f"hydra.sweep.dir={tmp_path}/{choice}", f"hydra/launcher={choice}")
    process = start(f"store={tmp_path}/other", *arguments)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert "2 jobs" in printed
    assert "deprecated" not in printed
    assert sweep("+method=graddot,tracin", f"hydra.sweep.dir={tmp_path}/basic")[0] == 0
    for job in "01":
        files = [tmp_path / name / job / "sensitivity.safetensors" for name in (choice, "basic")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_search_raises_the_agreement_and_skips_trials_that_are_done(sweep, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="optuna is an extra")
    command = (
        "hydra/sweeper=search", "hydra.sweeper.n_trials=3", "+method=datainf",
        "methods.datainf.damping=tag(log,interval(0.001,10))", f"hydra.sweep.dir={tmp_path}/search",
    )  # fmt: skip
    assert sweep(*command)[0] == 0
    trials = records(tmp_path / "search")
    best = OmegaConf.load(tmp_path / "search" / "optimization_results.yaml")
    assert best.best_value == max(trial.objective for trial in trials)
    status, printed = sweep(*command)
    assert status == 0
    assert "3 done before, skipped" in printed


@pytest.mark.parametrize("choice", ["joblib", "submitit_local", "submitit_slurm", "ray"])
def test_every_launchers_settings_are_known_to_its_plugin(choice: str) -> None:
    module = {"joblib": "joblib", "ray": "ray"}.get(choice, "submitit")
    pytest.importorskip(f"hydra_plugins.hydra_{module}_launcher", reason=f"{choice} is an extra")
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()
    schema = ConfigStore.instance().load(f"hydra/launcher/{choice}.yaml").node
    ours = OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / f"{choice}.yaml")
    assert set(ours) == set(schema)
    OmegaConf.merge(schema, ours)


def test_a_launcher_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["src.run", "-m", "hydra/launcher=ray"])
    with pytest.raises(SystemExit) as ended:
        main(ROOT / "conf")
    assert ended.value.code == 2
    assert "hydra/launcher: ray needs hydra_ray_launcher: pip install 'fimo[ray]'" in capsys.readouterr().err


def test_the_same_command_goes_on_in_its_folder_and_a_changed_one_gets_another(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    pattern = f"{tmp_path}/sweeps/${{now:%Y-%m-%d}}/${{now:%H-%M-%S-%f}}"
    (conf / "config.yaml").write_text(f"hydra: {{sweep: {{dir: '{pattern}'}}}}")
    first = Sweep(["-m", "a=1,2"], SearchPath((conf,)))
    assert first.arguments == [f"hydra.sweep.dir='{first.folder}'"]
    beside = Sweep(["-m", "a=1,2"], SearchPath((conf,)))
    assert beside.folder != first.folder, "two at a time never share a folder"
    with pytest.raises(InputError, match="another sweep is running"):
        Sweep(["-m", "a=1,2", f"hydra.sweep.dir={first.folder}"], SearchPath((conf,)))
    beside.lock.release()
    first.lock.release()
    assert Sweep(["-m", "a=1,2"], SearchPath((conf,))).folder in (first.folder, beside.folder)
    assert Sweep(["-m", "a=1,3"], SearchPath((conf,))).folder not in (first.folder, beside.folder)
    (conf / "config.yaml").write_text((conf / "config.yaml").read_text() + "\nb: 1")
    assert Sweep(["-m", "a=1,2"], SearchPath((conf,))).folder not in (first.folder, beside.folder)
    capsys.readouterr()


def test_a_folder_with_jobs_of_a_larger_sweep_is_refused_and_other_settings_are_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    conf, folder = tmp_path / "conf", tmp_path / "sweep"
    conf.mkdir()
    (conf / "config.yaml").write_text("hydra: {sweep: {dir: sweeps}}")

    def sweep_of(values: str) -> Sweep:
        return Sweep(["-m", f"a={values}", f"hydra.sweep.dir={folder}"], SearchPath((conf,)))

    first = sweep_of("1,2,3")
    for number, overrides in enumerate(first.jobs):
        (folder / str(number)).mkdir()
        JobRecord(number, overrides, status="finished", done=True).write(folder / str(number))
    assert first.conclude()
    with pytest.raises(InputError, match=r"jobs of another sweep, and this one has only 2 \(job 2: a=3\)"):
        sweep_of("1,2")
    capsys.readouterr()
    other = sweep_of("1,2,4")  # the refused one holds the folder no longer
    assert "2 of 3 jobs are done" in capsys.readouterr().out
    JobRecord(0, ["a=1"], status="skipped", done=True).write(folder / "0")
    JobRecord(1, ["a=2"], status="finished", done=True).write(folder / "1")
    assert not other.conclude()
    assert "1 done before, skipped, 1 finished, 1 not started" in capsys.readouterr().out


def test_a_finished_job_is_skipped_unless_its_settings_files_or_code_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []

    def run(config: dict) -> float | None:
        return run_once(lambda: runs.append(1) or 0.5, OmegaConf.create(config), tmp_path, 3, ["a=1"], True)

    data = tmp_path / "data.csv"
    data.write_text("1")
    config = {"dataset": {"path": str(data)}, "a": 1}
    assert [run(config), run(config), len(runs)] == [0.5, 0.5, 1]
    data.write_text("23")
    run(config)
    run({**config, "a": 2})
    assert len(runs) == 3
    prompts = tmp_path / "prompts.csv"  # any setting may name a file
    for text in ("1", "23"):
        prompts.write_text(text)
        run({**config, "dataset": {"path": str(data), "prompts": str(prompts)}})
    assert len(runs) == 5
    run({**config, "a": 2})
    assert len(runs) == 6
    monkeypatch.setattr("fimo.store.fingerprint.code_identity", lambda: "edited")
    run({**config, "a": 2})
    assert len(runs) == 7
    assert json.loads((tmp_path / "job.json").read_text())["objective"] == 0.5


def test_an_edited_module_of_the_users_own_is_another_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own_network.py").write_text("class Net: pass")
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create({"network": {"_target_": "own_network.Net"}})
    before = job_identity(config)
    assert job_identity(config) == before
    (tmp_path / "own_network.py").write_text("class Net: layers = 2")
    assert job_identity(config) != before


@pytest.mark.parametrize(
    ("target", "library"),
    [("bergson.BergsonGradients", "bergson"), ("captum.CaptumTracIn", "captum"),
     ("dattri.DattriEkfac", "dattri"), ("kronfluence.KronfluenceEkfac", "kronfluence"),
     ("traker.TrakerTrak", "trak")],
)  # fmt: skip
def test_another_version_of_a_library_is_another_job_of_its_methods_alone(
    target: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(version: str) -> list[str]:
        monkeypatch.setattr("fimo.app.definitions.version", lambda m: version if m == library else "1")
        methods = [f"fimo.methods.others.{target}", "fimo.methods.graddot.GradDot"]
        nested = [OmegaConf.create({"methods": {"a": {"_target_": m}}}) for m in methods]
        flat = [{"methods.a._target_": m} for m in methods]
        return [job_identity(c) for c in nested] + [job_key(c, libraries(c)) for c in flat]

    same = [a == b for a, b in zip(keys("1"), keys("2"), strict=True)]
    assert same == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "swept"),
    [("-m a=1", True), ("--multirun a=1", True), ("a=1", False), ("-m --help", False), ("-m -c job", False)],
)
def test_a_sweep_is_told_from_a_run_and_from_help(arguments: str, swept: bool) -> None:
    assert is_sweep(arguments.split()) is swept


def test_the_jobs_of_a_command_line_are_known_before_they_start() -> None:
    jobs = job_overrides(["-m", "a=1,2", "b=[0,1],[2]", "hydra.sweep.dir=x", "hydra/launcher=joblib"])
    assert jobs == [["a=1", "b=[0,1]"], ["a=1", "b=[2]"], ["a=2", "b=[0,1]"], ["a=2", "b=[2]"]]
    assert job_overrides(["-m", "hydra/sweeper=search", "a=interval(0,1)"]) == []
