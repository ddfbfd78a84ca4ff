"""What tasks do with their arguments and with a run, without training anything."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from fimo.app.plan import Plan
from fimo.app.run import Run, joined
from fimo.app.summary import with_findings
from fimo.cost import Cost
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.errors import InputError
from fimo.further_training.sensitivity import Sensitivity
from fimo.models.final_model import FinalModel
from fimo.scores import Scores
from fimo.tasks import Datamodeling, Distribution, Mislabelled, Removal, Retraining, datamodeling, mislabelled
from fimo.tasks.base import seeds_of
from fimo.tasks.controls import ClassDetection
from fimo.tasks.mislabelled import GOLD_STANDARD, own

CONF = Path(__file__).parents[2] / "conf" / "evaluation"

PLAN = Plan(Protocol(epochs=1), [7, 8, 9], [1, 2], [(0,), (3,)], [1, 0], True, 3)


def judged(**changes: Any) -> Run:
    """A run whose parts only stand for what they are."""
    whole = Instances(torch.randn(30, 2), torch.arange(30) % 3)
    data = SimpleNamespace(train=whole[:20], test=whole[20:], outputs=3, task="classification", origins={})
    methods = {
        "following": SimpleNamespace(follows_seeds=True, access="FiMO"),
        "plain": SimpleNamespace(follows_seeds=False, access="CPA"),
    }
    model = SimpleNamespace(to=lambda device: f"model on {device}", measurement=None)
    given: dict[str, Any] = {
        "data": data, "final_model": model, "plan": PLAN, "methods": methods, "settings": {},
        "store": "store", "device": torch.device("cpu"), "seed": 5, "trainer": {"accelerator": "cpu"},
        "final_models": SimpleNamespace(trained_here=True), "cost": Cost("task"), **changes,
    }  # fmt: skip
    return Run(**given)


# what a task is handed


def test_scores_are_asked_for_each_method_and_their_cost_is_the_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    shared: list[list[str]] = []

    class Asked:
        @classmethod
        def of(cls, *arguments: Any) -> Asked:
            asked.append(arguments)
            return cls()

        def sharing(self, methods: Any) -> AbstractContextManager[None]:
            shared.append(list(methods))
            return nullcontext()

        def scores(self, name: str, method: Any, settings: Any, cost: Cost) -> str:
            asked.append((name, method, settings))
            cost.gradient_evaluations = 10
            return f"scores of {name}"

    monkeypatch.setattr("fimo.app.run.Scoring", Asked)
    methods = {"following": {"a": 1}, "plain": {"b": 2}, "other": {}}
    run = judged(settings=methods)
    assert run.scores([2, 5]) == {"following": "scores of following", "plain": "scores of plain"}
    (model, data, plan, seed, store, device, problem), *each = asked
    assert problem is None
    assert (model, data, seed, store, device) == (run.final_model, run.data, 5, "store", run.device)
    assert plan == dataclasses.replace(PLAN, left_out=[2, 5])
    assert each == [(name, run.methods[name], methods[name]) for name in ("following", "plain")]
    assert run.cost.gradient_evaluations == 20
    assert shared == [list(run.methods)]
    run.scores()
    assert asked[3][2].left_out == list(range(20))
    assert run.cost.gradient_evaluations == 40
    assert run.plan is PLAN


def test_leaving_out_takes_the_runs_protocol_seeds_and_test_instances(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def further_train(*arguments: Any, cost: Cost, **named: Any) -> str:
        cost.gradient_evaluations = 5
        calls.append((arguments, named))
        return "sensitivity"

    monkeypatch.setattr("fimo.app.run.further_train", further_train)
    run = judged()
    for seeds, expected in ((None, [7, 8, 9]), ([4], [4])):
        assert run.leave_out([[1, 2]], seeds) == "sensitivity"
        (model, train, test, protocol, used, groups), named = calls[-1]
        assert (model, train, protocol, used, groups) == (
            run.final_model, run.data.train, PLAN.protocol, expected, [[1, 2]]
        )  # fmt: skip
        assert torch.equal(test.targets, run.data.test.targets[[1, 0]])
        assert named == {
            "test_index": [1, 0], "store": "store", "chunk": 3, "subtract_mean": True,
            "trainer": {"accelerator": "cpu"}, "problem": None, "keep_states": True,
        }  # fmt: skip
    assert run.cost.gradient_evaluations == 10


def test_the_first_so_many_seeds_of_the_run_are_taken() -> None:
    run = judged()
    assert seeds_of(None, run, "key") == [7, 8, 9]
    assert [seeds_of(k, run, "key") for k in (1, 3)] == [[7], [7, 8, 9]]
    for wrong in (0, 4):
        with pytest.raises(InputError, match=r"key: expected 1 to 3 \(further_training.seeds\)") as refused:
            seeds_of(wrong, run, "key")
        assert refused.value.problem.endswith(f"got {wrong}")


def test_findings_are_added_to_the_results_or_written(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Found:
        tasks: Any = None
        retraining: Any = None

    table = pd.DataFrame({"method": ["a"], "mean": [0.5]})
    again = Sensitivity(
        torch.zeros(1, 1, 1, 2), torch.tensor([1]), torch.tensor([1]), torch.tensor([0, 1]),
        torch.tensor([0]), torch.tensor([0]),
    )  # fmt: skip
    findings = {"removal": table, "mine": 2 * table, "retraining": again}
    found: Any = with_findings(Found(), findings, tmp_path)  # type: ignore[arg-type]
    assert list(found.tasks) == ["removal"]
    assert found.retraining is again
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation_mine.csv"]
    assert (tmp_path / "evaluation_mine.csv").read_text() == "method,mean\naa,1.0\n"
    assert with_findings(Found(), {"removal": table}, tmp_path).retraining is None  # type: ignore[arg-type]


# arguments


@pytest.mark.parametrize(
    ("make", "key", "right", "wrong"),
    [
        (Datamodeling, "datamodeling.subsets", [3], [2]),
        (Datamodeling, "datamodeling.share", [1e-9, 0.999], [0, 1]),
        (Datamodeling, "datamodeling.start", ["random", "final_model"], ["final"]),
        (Mislabelled, "mislabelled.share", [1e-9, 0.999], [0, 1]),
        (Mislabelled, "mislabelled.candidates", [2, None], [1]),
        (Mislabelled, "mislabelled.repeats", [1], [0]),
        (Mislabelled, "mislabelled.order_by", ["self", "test"], ["own"]),
        (Removal, "removal.counts", [[1]], [[], [0, 2]]),
        (Removal, "removal.random_sets", [1], [0]),
        (Distribution, "distribution.permutations", [1], [0]),
    ],
)
def test_an_argument_is_refused_from_where_it_means_nothing(
    make: Any, key: str, right: Sequence[Any], wrong: Sequence[Any]
) -> None:
    name = key.rpartition(".")[2]
    for value in right:
        assert getattr(make(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(InputError) as refused:
            make(**{name: value})
        assert refused.value.key == f"evaluation.tasks.{key}"


@pytest.mark.parametrize(
    "name",
    [
        "lds",
        "counterfactual",
        "mislabelled",
        "retraining",
        "distribution",
        "fact_tracing",
    ],
)
def test_a_task_and_its_file_have_the_same_defaults(name: str) -> None:
    ((key, config),) = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml").tasks).items()  # type: ignore[union-attr]
    signature = inspect.signature(get_class(config.pop("_target_")).__init__)
    defaults = {k: p.default for k, p in signature.parameters.items() if k != "self"}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == defaults, key


def test_seeds_that_there_are_not_are_named_with_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "scores", lambda self, left_out=None: {})
    tasks = {"datamodeling": Datamodeling, "removal": Removal, "retraining": Retraining}
    for name, task in tasks.items():
        with pytest.raises(InputError, match=rf"evaluation\.tasks\.{name}\.seeds: expected 1 to 3"):
            task(seeds=4)(judged())
    with pytest.raises(InputError, match=r"evaluation\.tasks\.mislabelled\.seeds: expected 1 to 3"):
        Mislabelled(seeds=4)._found(judged(methods={}), [0, 5])


def test_distributions_are_the_gold_standards_own_under_the_rows_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = torch.randn(2, 1, 2, 2)
    found = Sensitivity(
        raw, torch.tensor([5]), torch.tensor([1]), torch.tensor([0, 3]), torch.tensor([1, 0]),
        torch.tensor([7, 8]), full_losses=torch.rand(2, 1, 2, dtype=torch.float64),
    )  # fmt: skip
    asked: list[Any] = []
    monkeypatch.setattr(Run, "leave_out", lambda self, *given: asked.append(given) or found)
    origin = SimpleNamespace(row=np.array([10, 20, 30, 40]))
    run = judged(data=SimpleNamespace(origin=lambda split: origin))
    table = Distribution(seeds=2)(run)
    assert asked == [([(0,), (3,)], [7, 8])]
    assert table[["test_row", "train_row"]].to_numpy().tolist() == [[20, 10], [20, 40], [10, 10], [10, 40]]
    np.testing.assert_allclose(table["mean"], raw[:, 0].double().mean(0).flatten(), atol=1e-7)
    Distribution(seeds=2).check(run)
    with pytest.raises(InputError, match="needs at least 2 but there is 1"):
        Distribution(seeds=1).check(run)


def test_labels_are_flipped_of_classes_before_a_training_that_is_made_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Mislabelled().check(judged())
    with pytest.raises(InputError, match=r"without model\.checkpoint"):
        Mislabelled().check(judged(final_models=SimpleNamespace(trained_here=False)))
    with pytest.raises(InputError, match="this is regression"):
        Mislabelled().check(judged(data=SimpleNamespace(task="regression")))


def test_training_from_scratch_is_checked_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    for module in ("datamodeling", "retraining"):
        monkeypatch.setattr(f"fimo.tasks.{module}.check_retraining", lambda *a: checked.append(a))
    run = judged()
    Datamodeling(start="random").check(run)
    Datamodeling().check(run)
    Retraining().check(run)
    assert checked == [
        (run, "evaluation.tasks.datamodeling.start"), (run, "evaluation.tasks.retraining"),
    ]  # fmt: skip


def test_trainings_of_one_seed_each_are_joined_at_their_last_evaluation_point() -> None:
    def one(seed: int) -> Sensitivity:
        return Sensitivity(
            torch.full((1, 2, 1, 2), float(seed)) * torch.tensor([1.0, 10.0])[:, None, None],
            torch.tensor([4, 8]), torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0]),
            torch.tensor([seed]), distance_full=torch.tensor([[seed, 2.0 * seed]]),
            distance=torch.tensor([[[seed, seed], [3.0 * seed, 4.0 * seed]]]),
            full_losses=torch.tensor([[[0.1], [seed]]], dtype=torch.float64),
        )  # fmt: skip

    found = joined([one(5), one(7)])
    assert found.raw[:, :, 0].tolist() == [[[50.0, 50.0]], [[70.0, 70.0]]]
    assert (found.step.tolist(), found.epoch.tolist(), found.seeds.tolist()) == ([8], [2], [5, 7])
    assert found.distance_full is not None
    assert found.distance is not None
    assert found.full_losses is not None
    assert found.distance_full.tolist() == [[10.0], [14.0]]
    assert found.distance.tolist() == [[[15.0, 20.0]], [[21.0, 28.0]]]
    assert found.full_losses.tolist() == [[[5.0]], [[7.0]]]
    assert joined([one(5)]).raw.tolist() == [[[[50.0, 50.0]]]]


def test_as_many_as_all_training_instances_are_not_removed_together() -> None:
    Removal(counts=[19, 3, 3]).check(judged())
    assert Removal(counts=[19, 3, 3]).counts == [3, 19]
    with pytest.raises(InputError, match="expected fewer than all 20 but got 20"):
        Removal(counts=[20, 3]).check(judged())


def test_candidates_are_evenly_spaced_and_at_most_all() -> None:
    assert Mislabelled(candidates=4)._candidates(10) == [0, 2, 5, 7]
    assert Mislabelled(candidates=None)._candidates(3) == [0, 1, 2]
    assert Mislabelled(candidates=100)._candidates(3) == [0, 1, 2]


def test_a_self_influence_is_on_the_diagonal_of_the_last_evaluation_point() -> None:
    scores = torch.arange(8.0).view(2, 2, 2)
    assert own(scores).tolist() == [4.0, 7.0]
    assert own(scores[0]).tolist() == [0.0, 3.0]
    assert own(scores).dtype == torch.float64


# what is judged


def test_every_repeat_and_seed_flips_other_labels_and_candidates_alone_are_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flips(**arguments: Any) -> list[list[int]]:
        targets: list[Tensor] = []
        judged_on: list[Any] = []
        monkeypatch.setattr(Run, "with_targets", lambda self, t: targets.append(t) or self)
        monkeypatch.setattr(Mislabelled, "_found", lambda self, run, c: {"m": torch.zeros(len(c))})
        monkeypatch.setattr(mislabelled, "baselines", lambda run, c: {})
        monkeypatch.setattr(mislabelled, "detection", lambda repeats: judged_on.extend(repeats))
        run = judged()
        Mislabelled(share=0.2, candidates=10, **arguments)(run)
        for target, (_, flipped) in zip(targets, judged_on, strict=True):
            changed = target != run.data.train.targets
            assert changed.sum() == 4
            assert flipped.tolist() == changed[::2].tolist()
        return [t.tolist() for t in targets]

    first, other = flips(repeats=3), flips(repeats=3, seed=1)
    assert first == flips(repeats=3)
    assert first[0] == flips(repeats=1)[0]
    assert len({tuple(t) for t in first + other}) == 6


def test_suspicion_is_harm_to_test_instances_or_influence_on_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.zeros(2, 1, 4, 4)
    raw[0, 0] = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    asked: list[Any] = []

    def scores(self: Run, left_out: Sequence[int]) -> Any:
        asked.append((self, left_out))
        return {"m": Scores(torch.eye(4) * torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor(left_out))}

    monkeypatch.setattr(Run, "scores", scores)
    monkeypatch.setattr(
        Run,
        "leave_out",
        lambda self, groups, seeds: asked.append((groups, seeds)) or SimpleNamespace(raw=raw),
    )
    candidates = [0, 5, 10, 15]
    harm = Mislabelled(order_by="test")._found(judged(), candidates)
    assert asked[-1] == (candidates, [7, 8, 9])
    assert asked[-2][1] == candidates
    assert harm["m"].tolist() == [-1.0, -0.75, -0.5, -0.25]
    assert harm[GOLD_STANDARD].tolist() == [-0.125, -0.25, -0.375, -0.5]  # of the mean over seeds
    found = Mislabelled(order_by="self", seeds=2)._found(judged(), candidates)
    assert asked[-1] == (candidates, [7, 8])
    assert found["m"].tolist() == [4.0, 3.0, 2.0, 1.0]
    assert found[GOLD_STANDARD].tolist() == [0.5, 1.0, 1.5, 2.0]
    run = asked[-2][0]
    assert run.plan.test == [0, 1, 2, 3]
    assert torch.equal(run.data.test.targets, run.data.train[candidates].targets)
    assert list(Mislabelled(seeds=0)._found(judged(), candidates)) == ["m"]
    probable = FinalModel(nn.Linear(2, 3), "cross_entropy", "correct_probability", accept_poor=True)
    turned = Mislabelled(order_by="test", seeds=0)._found(judged(final_model=probable), candidates)
    assert turned["m"].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert Mislabelled(seeds=0)._found(judged(final_model=probable), candidates)["m"].tolist() == [4, 3, 2, 1]
    assert asked[-1][0].final_model.measurement is None, "the loss on itself, whatever tests are measured by"


def test_the_most_helpful_instances_lower_a_probability_that_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[Any] = []

    def leave_out(self: Run, asked: Any, seeds: Any) -> Sensitivity:
        groups.extend(asked)
        axes = {"step": torch.tensor([1]), "epoch": torch.tensor([1]), "test": torch.arange(1)}
        raw = torch.zeros(2, 1, 1, len(asked))
        return Sensitivity(raw, left_out=torch.arange(len(asked)), seeds=torch.arange(2), **axes)

    scores = {"m": Scores(torch.arange(20.0)[None], torch.arange(20))}
    monkeypatch.setattr(Run, "scores", lambda self: scores)
    monkeypatch.setattr(Run, "leave_out", leave_out)
    Removal(counts=[2], random_sets=1, seeds=2)(judged())
    model = FinalModel(nn.Linear(2, 3), "cross_entropy", "correct_probability", accept_poor=True)
    Removal(counts=[2], random_sets=1, seeds=2)(judged(final_model=model))
    assert (groups[0], groups[2]) == ([18, 19], [0, 1])


def test_tasks_that_ask_which_instances_help_refuse_a_measurement_that_does_not_say_it() -> None:
    def own_measure(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum(1)

    model = FinalModel(nn.Linear(2, 3), "cross_entropy", own_measure, accept_poor=True)
    for task in (Removal(counts=[2]), Mislabelled(order_by="test"), ClassDetection()):
        with pytest.raises(InputError, match=r"model\.measurement: expected own_measure\.better"):
            task.check(judged(final_model=model))
    Mislabelled().check(judged(final_model=model))


@pytest.mark.parametrize("start", ["final_model", "random"])
def test_sets_are_left_out_by_further_training_or_from_scratch(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    both = {
        "a": Scores(torch.stack([torch.zeros(2, 20), torch.ones(2, 20)]), torch.arange(20)),
        "b": Scores(torch.ones(2, 20), torch.arange(20)),
    }
    monkeypatch.setattr(Run, "scores", lambda self: both)
    monkeypatch.setattr(Run, "leave_out", lambda self, groups, seeds: ("further", groups, seeds))
    monkeypatch.setattr(Run, "retrain", lambda self, groups, seeds: (self.store, groups, seeds))
    monkeypatch.setattr(datamodeling, "datamodeling_score", lambda *a: given.append(a) or "table")
    assert Datamodeling(6, 0.25, start, 2, 4)(judged()) == "table"
    scores, leave_out, *rest = given[0]
    assert rest == [20, 6, 0.25, 4]
    kind = {"final_model": "further", "random": "store"}[start]
    assert leave_out([[1]]) == (kind, [[1]], [7, 8])
    assert scores["a"].values.shape == ((2, 20) if start == "random" else (2, 2, 20))
    assert scores["b"].values.shape == (2, 20)
    if start == "random":
        assert (scores["a"].values == 1).all()


def test_curves_and_retraining_take_the_runs_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    found = Scores(torch.ones(1, 20), torch.arange(20))
    monkeypatch.setattr(Run, "scores", lambda self: {"m": found})
    monkeypatch.setattr(Run, "leave_out", lambda self, groups, seeds: (groups, seeds))
    monkeypatch.setattr("fimo.tasks.removal.removal_curves", lambda *a: given.append(a) or "curves")
    assert Removal([2, 1], 3, 1, 5)(judged()) == "curves"
    scores, leave_out, *rest = given[0]
    assert scores["m"].values.tolist() == [[1.0] * 20]
    assert rest == [20, [1, 2], 3, 5]
    assert leave_out([[4]]) == ([[4]], [7])
    monkeypatch.setattr(Run, "retrain", lambda *a: a)
    run = judged()
    assert Retraining(2)(run) == (run, PLAN.left_out, [7, 8])
    assert Retraining()(run) == (run, PLAN.left_out, [7, 8, 9])
