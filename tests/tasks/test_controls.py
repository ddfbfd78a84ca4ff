"""quanda's controls on constructed cases whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.evaluation.controls import (
    chance_of_class,
    chance_of_marked,
    merged_classes,
    permuted,
    precision_of_marked,
    share_of_class,
    with_mark,
)
from fimo.scores import Scores
from fimo.tasks import ClassDetection, MixedDatasets, RandomisedModel, ShortcutDetection, SubclassDetection

CLASSES = 4


class Run:
    """A run whose method's scores are a function of its training and test instances.

    Args:
        score: of training and test instances, ``[J, N]``.
        takes_for: what the network takes for class 0, ``[n]`` bool; everything when None.
    """

    def __init__(self, score: Any, takes_for: Any = None, data: Any = None, randomised: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        if data is None:
            whole = Instances(torch.rand(140, 8, generator=generator), torch.arange(140) % CLASSES)
            data = SimpleNamespace(
                train=whole[:100], test=whole[100:], outputs=CLASSES, task="classification"
            )
        self.score, self.takes_for, self.data, self.is_randomised = score, takes_for, data, randomised
        self.trained_here = True
        self.final_model = SimpleNamespace(outputs=self.outputs, measurement=None)

    def outputs(self, instances: Instances) -> Tensor:
        first = torch.ones(len(instances)) if self.takes_for is None else self.takes_for(instances).float()
        return torch.stack([first, *[torch.full_like(first, 0.5)] * (CLASSES - 1)], 1)

    def with_data(self, **changes: Any) -> Run:
        data = SimpleNamespace(**{**vars(self.data), **changes})
        return Run(self.score, self.takes_for, data, self.is_randomised)

    def with_training_set(self, train: Instances) -> Run:
        return self.with_data(train=train)

    def explaining(self, test: Instances) -> Run:
        return self.with_data(test=test)

    def randomised(self, seed: int) -> Run:
        return Run(self.score, self.takes_for, self.data, True)

    def scores(self) -> dict[str, Scores]:
        values = self.score(self.data.train, self.data.test, self.is_randomised)
        return {"given": Scores(values, torch.arange(len(self.data.train)))}


def near(train: Instances, test: Instances, randomised: bool = False) -> Tensor:
    return -torch.cdist(test.inputs, train.inputs)  # type: ignore[arg-type]


def same_class(train: Instances, test: Instances, randomised: bool = False) -> Tensor:
    return (test.targets[:, None] == train.targets).float()


def random_order(train: Instances, test: Instances, randomised: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1 + randomised)
    return torch.rand(len(test), len(train), generator=generator)


def row(task: Any, run: Any) -> Any:
    task.check(run)
    (found,) = task(run).itertuples()
    return found


def test_helpful_instances_of_the_same_class_are_counted() -> None:
    train, test = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [-1.0, -2.0, 0.0, 1.0]])
    assert share_of_class(scores, train, test, 2).tolist() == [0.5, 1.0]
    scores[0, 3] = torch.nan
    assert share_of_class(scores, train, test, 2).isnan().tolist() == [True, False]
    assert row(ClassDetection(), Run(same_class)).mean == 1
    assert row(ClassDetection(), Run(lambda *a: -same_class(*a))).mean == 0


def test_chance_is_what_random_orders_find() -> None:
    found = row(ClassDetection(), Run(random_order))
    assert found.chance == 0.25
    assert found.mean == pytest.approx(found.chance, abs=4 * found.sem)
    generator = torch.Generator().manual_seed(0)
    marked = torch.rand(40, generator=generator) < 0.2
    precision = precision_of_marked(torch.rand(4000, 40, generator=generator), marked)
    assert float(precision.mean()) == pytest.approx(chance_of_marked(marked), abs=0.01)
    train, test = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 2])
    assert chance_of_class(train, test) == pytest.approx((1 / 2 + 1 / 3) / 2)
    known = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1])
    assert chance_of_class(train, test, known) == pytest.approx((3 / 4 + 1) / 2)


def test_knowing_merged_classes_alone_is_chance_for_subclasses() -> None:
    task = SubclassDetection(test=40, top=25)
    merged = row(task, Run(same_class))  # of the classes that it was trained on
    assert merged.chance == pytest.approx(0.5, abs=0.01)
    assert merged.mean == pytest.approx(merged.chance, abs=0.1)

    def knows(train: Instances, test: Instances, randomised: bool = False) -> Tensor:
        own, whole = Run(near).data.train, Run(near).data.test
        assert torch.equal(own.inputs, train.inputs)  # type: ignore[arg-type]
        assert set(train.targets.tolist()) == {0, 1}
        return same_class(own, whole[: len(test)])

    assert row(task, Run(knows)).mean == 1
    merged_into = merged_classes(7, 3, torch.Generator().manual_seed(0))
    assert sorted(merged_into.bincount().tolist()) == [2, 2, 3]
    with pytest.raises(InputError, match="expected 2 to 2, half of the 5 classes, but got 3"):
        merged_classes(5, 3, torch.Generator())


def test_a_shortcut_s_instances_are_those_to_find() -> None:
    seen = []

    def finds(train: Instances, test: Instances, randomised: bool = False) -> Tensor:
        marked = train.inputs[:, 0] == Run(near).data.train.inputs.max()
        seen.append((train, test, marked))
        return marked.float().expand(len(test), -1)

    run = Run(finds, lambda instances: instances.inputs[:, 1] > 0.5)
    found = row(ShortcutDetection(size=0.125), run)
    ((train, test, marked),) = seen
    assert found.mean == 1 > found.chance > 0
    assert (train.targets[marked] == 0).all()
    assert int(marked.sum()) == 12  # half of the class; the maximum itself may be one more
    assert (test.targets == 0).all()
    assert (test.inputs[:, 1] > 0.5).all()
    assert (test.inputs[:, 0] == train.inputs.max()).all()
    whole = Run(near).data.test
    kept = (whole.targets != 0) & (whole.inputs[:, 1] > 0.5)
    assert torch.equal(test.inputs[:, 1:], whole.inputs[kept][:, 1:])
    with pytest.raises(InputError, match="no test instance is taken for the planted class"):
        ShortcutDetection()(Run(finds, lambda instances: torch.zeros(len(instances))))  # type: ignore[arg-type]
    marks = with_mark(torch.zeros(2, 3, 4), 0.25, 5.0)
    assert marks[0].tolist() == [[5, 5, 5, 0], [0] * 4, [0] * 4]


def test_another_data_set_s_instances_are_those_to_find() -> None:
    own = Run(near).data.train.inputs

    def finds(train: Instances, test: Instances, randomised: bool = False) -> Tensor:
        foreign = (train.inputs != own).any(1)
        assert int(foreign.sum()) == 10
        assert (train.targets[foreign] == 3).all()
        assert torch.equal(train.inputs[foreign].sort(1).values, own[foreign].sort(1).values)
        return foreign.float().expand(len(test), -1)

    def takes(instances: Instances) -> Tensor:
        return torch.ones(len(instances))

    run = Run(finds, takes)
    run.outputs = lambda instances: torch.eye(CLASSES)[torch.full((len(instances),), 3)]  # type: ignore
    run.with_training_set = lambda train: _taking_for(run.with_data(train=train), 3)  # type: ignore
    found = row(MixedDatasets(label=3), run)
    assert found.mean == 1
    assert found.instances == 40
    x = torch.arange(6.0).view(1, 2, 3).repeat(2, 1, 1)
    again = permuted(x, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], again[1])
    assert sorted(again[0].flatten().tolist()) == list(range(6))


def _taking_for(run: Run, label: int) -> Run:
    run.final_model.outputs = lambda x: torch.eye(CLASSES)[torch.full((len(x),), label)]
    return run


def test_a_method_that_ignores_the_model_is_found_out() -> None:
    assert row(RandomisedModel(), Run(near)).mean == pytest.approx(1)
    found = row(RandomisedModel(), Run(random_order))
    assert found.mean == pytest.approx(found.chance, abs=4 * found.sem)
    assert found.chance == 0


def test_what_cannot_be_asked_is_refused() -> None:
    run = Run(near)
    run.data.task = "regression"
    with pytest.raises(InputError, match=r"evaluation\.tasks\.class_detection: needs classes"):
        ClassDetection().check(run)  # type: ignore[arg-type]
    run.data.task, run.trained_here = "classification", False
    with pytest.raises(InputError, match=r"evaluation\.tasks\.mixed_datasets: changes the training set"):
        MixedDatasets().check(run)  # type: ignore[arg-type]
    run.trained_here = True
    with pytest.raises(InputError, match=r"shortcut_detection\.label: expected 0 to 3 but got 4"):
        ShortcutDetection(label=4).check(run)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"shortcut_detection\.share: expected a share between 0 and 1"):
        ShortcutDetection(share=1)
    with pytest.raises(InputError, match=r"class_detection\.top: expected at least 1"):
        ClassDetection(top=0)
