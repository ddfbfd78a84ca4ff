"""quanda's controls as tasks (Bareeva et al., 2024): do scores find what is known to matter?

All explain the first test instances by all training instances and say ``method,instances,mean,sem,chance``:
mean ± SEM over test instances.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import pandas as pd
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
from fimo.evaluation.metrics import agreement, mean_and_sem
from fimo.tasks.base import Judged, Task, better

KEY = "evaluation.tasks"

Question = tuple[Judged, Callable[[Tensor], Tensor], float]
"""A run, what a method's scores ``[J, N]`` of it are worth for each test instance ``[J]``, and by chance."""


class Control(Task):
    """What the controls share.

    Args:
        test: test instances that are explained, at most.
        seed: of what is drawn.
    """

    name: str

    def __init__(self, test: int = 50, seed: int = 0) -> None:
        self.refuse(test < 1, f"expected at least 1 but got {test}", "test")
        self.test, self.seed = test, seed

    def refuse(self, condition: bool, problem: str, key: str = "") -> None:
        """Refuse a run or an argument.

        Raises:
            InputError: under the condition.
        """
        if condition:
            raise InputError(f"{KEY}.{self.name}{key and '.'}{key}", problem)


class OfClasses(Control):
    """A control whose question has an answer for each test instance of a classification."""

    def check(self, run: Judged) -> None:
        self.refuse(run.data.task != "classification", f"needs classes; this is {run.data.task}")
        better(run)

    @abstractmethod
    def question(self, run: Judged) -> Question:
        """Return what is asked."""

    def __call__(self, run: Judged) -> pd.DataFrame:
        """Return ``method,instances,mean,sem,chance``: mean ± SEM over the test instances."""
        asked, worth, chance = self.question(run)
        scores = {name: better(run) * found.last.double() for name, found in asked.scores().items()}
        return table((name, worth(values), chance) for name, values in scores.items())


class Trained(OfClasses):
    """A control of final models that are trained on other data than the run's own."""

    def check(self, run: Judged) -> None:
        super().check(run)
        self.refuse(
            not run.trained_here,
            "changes the training set before the final model is trained, so it must be trained here, without "
            "model.checkpoint",
        )


class Planted(Trained):
    """A control that plants instances in the training set: how precisely do scores find them?

    Args:
        share: of the training instances (of one class, for a shortcut) that is planted.
        label: the class of what is planted.
    """

    def __init__(self, share: float, label: int = 0, test: int = 50, seed: int = 0) -> None:
        super().__init__(test, seed)
        self.refuse(not 0 < share < 1, f"expected a share between 0 and 1 but got {share}", "share")
        self.share, self.label = share, label

    def check(self, run: Judged) -> None:
        super().check(run)
        inputs = run.data.train.inputs
        numbers = isinstance(inputs, Tensor) and inputs.is_floating_point()
        self.refuse(not numbers, "needs one tensor of numbers as inputs")
        known = range(run.data.outputs)
        self.refuse(self.label not in known, f"expected 0 to {known[-1]} but got {self.label}", "label")

    @abstractmethod
    def planted(self, inputs: Tensor, run: Judged) -> Tensor:
        """Return inputs ``[n, ...]`` as they are planted."""

    @abstractmethod
    def candidates(self, train: Instances) -> Tensor:
        """Return the positions of the training instances some of which are replaced."""

    @abstractmethod
    def askable(self, test: Instances) -> Tensor:
        """Return which test instances may be asked about once they are planted, ``[n]`` bool."""

    def question(self, run: Judged) -> Question:
        train, generator = run.data.train, torch.Generator().manual_seed(self.seed)
        candidates = self.candidates(train)
        count = round(self.share * len(candidates))
        self.refuse(
            not 0 < count < len(candidates),
            f"{self.share} of {len(candidates)} instances are {count}",
            "share",
        )
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        inputs, targets = self._tensor(train).clone(), train.targets.clone()
        inputs[chosen] = self.planted(inputs[chosen], run)
        targets[chosen] = self.label
        marked = torch.zeros(len(train), dtype=torch.bool)
        marked[chosen] = True
        changed = run.with_training_set(Instances(inputs, targets))
        test = run.data.test[self.askable(run.data.test)]
        asked = Instances(self.planted(self._tensor(test), run), torch.full_like(test.targets, self.label))
        asked = asked[changed.final_model.outputs(asked).argmax(1) == self.label][: self.test]
        self.refuse(not len(asked), "no test instance is taken for the planted class: nothing was learned")
        return (
            changed.explaining(asked),
            lambda scores: precision_of_marked(scores, marked),
            chance_of_marked(marked),
        )

    @staticmethod
    def _tensor(instances: Instances) -> Tensor:
        assert isinstance(instances.inputs, Tensor)
        return instances.inputs


class ClassDetection(OfClasses):
    """Have the most helpful training instances the test instance's class?

    Args:
        top: how many of them.
    """

    name = "class_detection"

    def __init__(self, top: int = 5, test: int = 50, seed: int = 0) -> None:
        super().__init__(test, seed)
        self.refuse(top < 1, f"expected at least 1 but got {top}", "top")
        self.top = top

    def question(self, run: Judged) -> Question:
        test, train = run.data.test[: self.test], run.data.train.targets
        return (
            run.explaining(test),
            lambda scores: share_of_class(scores, train, test.targets, self.top),
            chance_of_class(train, test.targets),
        )


class SubclassDetection(Trained):
    """Trained on merged classes, have the most helpful instances the test instance's class before merging?

    Chance is that of an order that knows the merged class, and nothing else.

    Args:
        classes: that are left.
        top: how many of the most helpful training instances.
    """

    name = "subclass_detection"

    def __init__(self, classes: int = 2, top: int = 5, test: int = 50, seed: int = 0) -> None:
        super().__init__(test, seed)
        self.refuse(top < 1, f"expected at least 1 but got {top}", "top")
        self.classes, self.top = classes, top

    def check(self, run: Judged) -> None:
        super().check(run)
        merged_classes(run.data.outputs, self.classes, torch.Generator())

    def question(self, run: Judged) -> Question:
        generator = torch.Generator().manual_seed(self.seed)
        merged = merged_classes(run.data.outputs, self.classes, generator)
        train, test = run.data.train.targets, run.data.test[: self.test]
        coarse = merged[train], merged[test.targets]
        changed = run.with_training_set(Instances(run.data.train.inputs, coarse[0]))
        return (
            changed.explaining(Instances(test.inputs, coarse[1])),
            lambda scores: share_of_class(scores, train, test.targets, self.top),
            chance_of_class(train, test.targets, coarse),
        )


class ShortcutDetection(Planted):
    """Instances of one class get a mark: do they explain why marked ones of other classes are taken for it?

    Asked are test instances of other classes that the network takes for this one once they have the mark;
    what is explained is its prediction.

    Args:
        share: of the class that is marked.
        label: the class.
        size: share of an instance's entries that are the mark, its first ones, which get the largest value of
            the training inputs.
    """

    name = "shortcut_detection"

    def __init__(
        self, share: float = 0.5, label: int = 0, size: float = 0.0625, test: int = 50, seed: int = 0
    ) -> None:
        super().__init__(share, label, test, seed)
        self.refuse(not 0 < size < 1, f"expected a share between 0 and 1 but got {size}", "size")
        self.size = size

    def planted(self, inputs: Tensor, run: Judged) -> Tensor:
        return with_mark(inputs, self.size, float(self._tensor(run.data.train).max()))

    def candidates(self, train: Instances) -> Tensor:
        return (train.targets == self.label).nonzero()[:, 0]

    def askable(self, test: Instances) -> Tensor:
        return test.targets != self.label


class MixedDatasets(Planted):
    """Some instances are of another data set, all of one class: do they explain others of that data set?

    The other data set has the entries of an instance in another order. Asked are its test instances that the
    network takes for the class.

    Args:
        share: of the training instances that is replaced.
        label: the class.
    """

    name = "mixed_datasets"

    def __init__(self, share: float = 0.1, label: int = 0, test: int = 50, seed: int = 0) -> None:
        super().__init__(share, label, test, seed)

    def planted(self, inputs: Tensor, run: Judged) -> Tensor:
        return permuted(inputs, torch.Generator().manual_seed(self.seed))

    def candidates(self, train: Instances) -> Tensor:
        return torch.arange(len(train))

    def askable(self, test: Instances) -> Tensor:
        return torch.ones(len(test), dtype=torch.bool)


class RandomisedModel(Control):
    """Are scores of an untrained network like those of the final model? Then they do not depend on the model.

    The rank correlation across training instances for each test instance: 0 by chance, and 1 of a method that
    ignores the model. Lower is better.
    """

    name = "randomised_model"

    def __call__(self, run: Judged) -> pd.DataFrame:
        test = run.data.test[: self.test]
        ours = run.explaining(test).scores()
        theirs = run.randomised(self.seed + 1).explaining(test).scores()
        alike = {
            name: agreement(ours[name].last, theirs[name].last[None], "spearman")[0].double() for name in ours
        }
        return table((name, values, 0.0) for name, values in alike.items())


def table(found: Iterable[tuple[str, Tensor, float]]) -> pd.DataFrame:
    """Return means and standard errors over test instances, of values ``[J]`` and chance by method."""
    rows = []
    for method, values, chance in found:
        mean, sem = mean_and_sem(values)
        rows.append((method, len(values), mean.item(), sem.item(), chance))
    return pd.DataFrame(rows, columns=["method", "instances", "mean", "sem", "chance"])
