"""More ways to judge, from the configuration to their tables, each through the engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn

from fimo.app.build import build_final_model, build_module, build_tasks
from fimo.app.config import validated
from fimo.app.experiment import prepare, run_experiment
from fimo.app.final_models import FinalModels
from fimo.app.journal import Journal
from fimo.app.run import Run
from fimo.app.search_path import SearchPath
from fimo.errors import InputError
from fimo.further_training import Protocol
from fimo.tasks import Datamodeling, Mislabelled
from fimo.tasks.mislabelled import CLEANLAB, GOLD_STANDARD, OWN_LOSS, SUSPECTS, held_out_losses
from fimo.tasks.retraining import check_retraining
from tests.reference.further_training import plain_sensitivity

CONF = Path(__file__).parents[2] / "conf"
PLACES = SearchPath((CONF,))
SMALL = [
    "dataset=digits", "trainer.max_epochs=2", "further_training.epochs=1", "further_training.seeds=2",
    "further_training.left_out=4", "further_training.test=5", "trainer.enable_progress_bar=false",
    "model.network.hidden=[8]", "evaluation.bootstrap=0", "logger=none", "report=false", "threads=1",
    "+method=[graddot,random]",
]  # fmt: skip


def configured(store: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validated(compose("config", overrides=[*SMALL, f"store={store}", *overrides]), PLACES)


def judged(config: DictConfig) -> Run:
    """Return a run whose final model is untrained."""
    return prepare(config, Journal(Path(config.store))).run


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything")
    (folder / "run").mkdir()
    config = configured(
        folder / "store", "evaluation=everything", "evaluation.tasks.datamodeling.subsets=5",
        "evaluation.tasks.removal.counts=[1,20]", "evaluation.tasks.mislabelled.candidates=30",
        "evaluation.tasks.mislabelled.repeats=2",
    )  # fmt: skip
    run_experiment(config, folder / "run")
    return folder / "run"


def test_every_way_to_judge_writes_its_table_with_error_bars_and_cost(everything: Path) -> None:
    lds = pd.read_csv(everything / "evaluation_datamodeling.csv")
    assert list(lds["method"]) == ["graddot", "random"]
    assert lds["sem"].notna().all()
    removal = pd.read_csv(everything / "evaluation_removal.csv")
    assert set(zip(removal["method"], removal["removed"], strict=True)) == {
        (name, k) for name in ("graddot", "random", "chance") for k in (1, 20)
    }
    assert removal["sem"].notna().all()
    mislabelled = pd.read_csv(everything / "evaluation_mislabelled.csv")
    assert list(mislabelled["method"]) == ["graddot", "random", GOLD_STANDARD, OWN_LOSS, CLEANLAB, SUSPECTS]
    assert mislabelled["mean"].between(0, 1).all()
    assert (mislabelled["repeats"] == 2).all()
    stages = list(pd.read_csv(everything / "cost.csv")["stage"])
    tasks = ["datamodeling", "removal", "mislabelled", "retraining", "distribution"]
    assert stages[-7:] == [*tasks, "evaluation", "report"]


def test_distributions_over_seeds_are_of_the_gold_standards_runs(everything: Path) -> None:
    table = pd.read_csv(everything / "evaluation_distribution.csv")
    found = load_file(everything / "sensitivity.safetensors")
    effect = found["raw"][:, -1].double().mean(0).flatten()
    assert len(table) == 5 * 4
    assert table["mean"].to_numpy() == pytest.approx(effect.numpy(), abs=1e-7)
    assert table["mean_p"].between(0, 1).all()
    assert table["train_row"].nunique() == 4
    cost = pd.read_csv(everything / "cost.csv").set_index("stage")
    again = cost.loc["distribution", "seconds"]
    assert again < cost.loc["further_training", "seconds"] + 5  # no run was made for it


def test_retraining_is_on_the_same_instances_as_the_sensitivity(everything: Path) -> None:
    again, further = (load_file(everything / f"{name}.safetensors") for name in ("retraining", "sensitivity"))
    assert again["raw"].shape == (2, 1, 5, 4)
    for axis in ("left_out", "test", "seeds"):
        assert again[axis].tolist() == further[axis].tolist()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_retraining_equals_plain_training_from_each_seeds_initial_parameters(
    clip: float | None, tmp_path: Path
) -> None:
    config = configured(
        tmp_path, "dataset=diabetes", "model.optimizer=adam", "model.lr=0.001", "model.weight_decay=0.01",
        "further_training.left_out=[0,3]", "further_training.dtype=float64",
        f"trainer.gradient_clip_val={'null' if clip is None else clip}",
    )  # fmt: skip
    run = judged(config)
    found = run.retrain(run.plan.left_out, [0, 5])
    protocol = Protocol(
        "adam", lr=0.001, batch_size=32, epochs=2, weight_decay=0.01, clip_norm=clip, dtype="float64"
    )
    for s, seed in enumerate([0, 5]):
        own = OmegaConf.merge(config, {"seed": seed})
        assert isinstance(own, DictConfig)
        initial = build_final_model(build_module(own, run.data), own)
        test = run.data.test[run.plan.test]
        plain = plain_sensitivity(initial, run.data.train, test, protocol, [seed], [(0,), (3,)])
        torch.testing.assert_close(
            found.raw[s, -1].double(), plain["raw"][0, -1].double(), rtol=1e-4, atol=1e-8
        )
    assert found.step.tolist() == [26]
    assert not torch.equal(found.raw[0], found.raw[1])


def test_the_datamodeling_score_can_train_from_scratch(tmp_path: Path) -> None:
    run = judged(configured(tmp_path, "dataset=diabetes"))
    table = Datamodeling(subsets=4, start="random")(run)
    assert list(table["method"]) == ["graddot", "random"]
    assert table["step"].tolist() == [26, 26], "after the last epoch of training"
    assert table["mean"].between(-1, 1).all()


def test_flipped_labels_train_another_model_and_leave_the_runs_data_alone(tmp_path: Path) -> None:
    run = judged(configured(tmp_path))
    before = run.data.train.targets.clone()
    targets = (before + 1) % 10
    other = run.with_targets(targets)
    assert torch.equal(run.data.train.targets, before)
    assert torch.equal(other.data.train.targets, targets)
    right, wrong = (float(m.losses(run.data.test).mean()) for m in (run.final_model, other.final_model))
    assert wrong > right, "a model of wrong labels fits right ones worse than an untrained one"


def test_a_label_flipped_on_purpose_is_found_by_the_gold_standard_and_by_self_influence(
    tmp_path: Path,
) -> None:
    run = judged(configured(tmp_path, "trainer.max_epochs=8"))
    for order_by in ("test", "self"):
        found = Mislabelled(order_by=order_by, repeats=1, candidates=60)(run).set_index("method")
        assert found.loc[[GOLD_STANDARD, "graddot"], "mean"].min() > 3 * found["chance"].iloc[0], order_by
        assert found.loc[[OWN_LOSS, CLEANLAB, SUSPECTS], "mean"].min() > 3 * found["chance"].iloc[0], order_by


def test_a_held_out_loss_is_that_of_a_model_trained_without_the_instances_fold(tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        "dataset=breast_cancer",
        "further_training.leave_out=shift",
        "further_training.dtype=float64",
    )
    run = judged(config)
    found = held_out_losses(run, [3, 40])
    order = torch.randperm(len(run.data.train), generator=torch.Generator().manual_seed(0))
    position = order.argsort()
    initial = run.final_models.initial(run.data, 0)
    protocol = run.final_models.protocol(run.data, run.plan.protocol)
    for loss, row in zip(found, [3, 40], strict=True):
        fold = tuple(sorted(order[int(position[row]) % 5 :: 5].tolist()))
        assert row in fold
        own = run.data.train[[row]]
        plain = plain_sensitivity(initial, run.data.train, own, protocol, [0], [fold])
        expected = plain["full_losses"][0, -1, 0] + plain["raw"][0, -1, 0, 0]
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["evaluation=mislabelled", "dataset=diabetes"], "mislabelled", "this is regression"),
        (["evaluation=mislabelled", f"model.checkpoint={__file__}"], "mislabelled", "model.checkpoint"),
        (["evaluation=mislabelled", "evaluation.tasks.mislabelled.share=1.5"], "mislabelled.share", "share"),
        (["evaluation=counterfactual", "evaluation.tasks.removal.counts=[2000]"], "removal.counts", "1617"),
        (["evaluation=lds", "evaluation.tasks.datamodeling.start=none"], "datamodeling.start", "random"),
        (["evaluation=lds", "+evaluation.tasks.datamodeling.subset=3"], "datamodeling.subset", "subsets?"),
    ],
)  # fmt: skip
def test_a_task_that_does_not_apply_is_refused_before_any_training(
    tmp_path: Path, overrides: list[str], key: str, said: str
) -> None:
    config = configured(tmp_path, *overrides)
    of_data = [o for o in overrides if o.startswith("dataset")]
    run = dataclasses.replace(judged(configured(tmp_path, *of_data)), final_models=FinalModels(config))
    with pytest.raises(InputError) as refused:
        build_tasks(config, run)
    assert refused.value.key == f"evaluation.tasks.{key}"
    assert said in refused.value.problem


def test_batch_statistics_are_not_trained_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, "evaluation=retraining")
    network = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    run = judged(configured(tmp_path))
    monkeypatch.setattr("fimo.app.build.build", lambda node, key, **_: network)
    run = dataclasses.replace(run, final_models=FinalModels(config))
    with pytest.raises(InputError, match="batch normalisation"):
        check_retraining(run, "evaluation.tasks.retraining")


def test_several_ways_to_judge_compose(tmp_path: Path) -> None:
    config = configured(tmp_path, "evaluation=[lds,retraining]")
    assert set(config.evaluation.tasks) == {"datamodeling", "retraining"}
