"""Predictions as numbers that can be explained, and as people read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from fimo.data.display import Display
from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.final_model import FinalModel
from fimo.models.quantities import Link, predicted


@dataclass(frozen=True)
class Shown:
    """How people read predictions, and rows.

    Args:
        class_names: by class index; the index itself where there are none.
        units: network outputs ``[...]`` of a regression in the target's own units, elementwise; as they are
            when None.
        unit: its name.
        row: a training row, by position; None where there is nothing to read.
        table: reads the source of the training rows, as the user has it; None where there is no table.
    """

    class_names: Sequence[str] = ()
    units: Callable[[Tensor], Tensor] | None = None
    unit: str = ""
    row: Callable[[int], Display] | None = None
    table: Callable[[], pd.DataFrame | None] | None = None

    def label(self, index: int) -> str:
        return str(self.class_names[index]) if self.class_names else str(index)

    def values(self, outputs: Tensor) -> Tensor:
        """Return outputs of a regression in the target's own units."""
        return outputs if self.units is None else self.units(outputs)


@dataclass(frozen=True)
class Explained:
    """The one number by which a test instance's prediction is explained.

    It is the probability of the class that the final model predicts, a regression's value in the target's own
    units, or the mean probability of a text's tokens.

    Args:
        position: of the test instance.
        which: the prediction (:mod:`fimo.models.quantities`) that is measured.
        link: how it follows from the outputs.
        value: of the final model.
        target: the label's number, or a regression's value.
        label: the class that the final model predicts; -1 where there are none.
    """

    position: int
    which: int
    link: Link
    value: float
    target: float
    label: int = -1

    @property
    def sign(self) -> int:
        """-1 where the measured probability is that of the other of two classes."""
        return -1 if self.link == "sigmoid" and self.label == 0 else 1

    def read(self, values: Tensor, shown: Shown) -> Tensor:
        """Return measured values of the number as people read them."""
        if self.link == "identity":
            return shown.values(values)
        return 1 - values if self.sign < 0 else values


def explained(
    final_model: FinalModel, test: Instances, positions: Sequence[int], shown: Shown
) -> list[Explained]:
    """Return the numbers by which the predictions of some test instances are explained.

    Raises:
        InputError: ``audit.test``: a prediction is several numbers, of which none stands for the others.
    """
    chosen = test[torch.tensor(list(positions), device=test.targets.device)]
    link, values = predicted(final_model, chosen)
    refuse_several(values.shape[1] if link != "softmax" else chosen.targets[0].numel())
    values = values.double().cpu()
    targets = chosen.targets.reshape(len(chosen), -1)[:, 0].double().cpu()
    if link == "identity":
        targets = shown.values(targets)
    which, labels = [0] * len(chosen), [-1] * len(chosen)
    if link == "softmax":
        which = labels = values.argmax(1).tolist()
    elif link == "sigmoid":
        labels = (values[:, 0] >= 0.5).int().tolist()
    found = []
    for k, position in enumerate(positions):
        number = Explained(int(position), which[k], link, 0.0, float(targets[k]), labels[k])
        found.append(replace(number, value=float(number.read(values[k, which[k]], shown))))
    return found


def refuse_several(numbers: int) -> None:
    """Refuse to explain predictions of several numbers each one by one.

    Raises:
        InputError: ``audit.test``.
    """
    if numbers > 1:
        problem = (
            f"each instance has {numbers} outputs or targets, and one is explained by a single one; leave it "
            "out: the mean test loss, of all of them, is explained without it"
        )
        raise InputError("audit.test", problem)


def typical_error(final_model: FinalModel, test: Instances, shown: Shown) -> float:
    """Return the root mean square error of a regression's predictions in its target's units; else NaN."""
    link, values = predicted(final_model, test)
    if link != "identity":
        return float("nan")
    targets = test.targets.reshape(len(test), -1)[:, 0]
    errors = shown.values(values[:, 0].double().cpu()) - shown.values(targets.double().cpu())
    return float(errors.square().mean().sqrt())
