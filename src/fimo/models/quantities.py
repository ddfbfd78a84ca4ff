"""Losses and predictions of test instances in the same runs.

A run records one value for each test instance: the final model's measurement. Here a test instance says
beside its target which value that shall be, and occurs once for each that is asked of it. So all that takes a
final model and test instances takes these as well: runs, their store and its keys, every attribution method,
the noise of rounding; and where nothing of the kind is asked for, nothing is changed. It costs one more
evaluation for each further value, of test instances that somebody asked about. (Several values from one
forward pass would save that, a small part of a run, and change the shape of all that is recorded.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fimo.data.instances import Instances
from fimo.errors import InputError
from fimo.models.class_losses import CorrectProbability
from fimo.models.final_model import FinalModel
from fimo.models.loss_function import Loss

Link = Literal["softmax", "sigmoid", "tokens", "identity"]
"""From outputs to predictions: probabilities of classes, labels, an instance's tokens; or as they are."""

MEASUREMENT = -1
"""The final model's measurement of an instance: its loss, unless another was chosen."""

CORRECT = -2
"""One where the most probable class is the target, else zero."""

CLASS = -3
"""The number of the most probable class."""


@dataclass(frozen=True)
class Quantities(Loss):
    """One quantity of each instance, named by the first column of its target.

    Args:
        measurement: what -1 stands for.
        link: a number d from 0 stands for the d-th prediction.
        shape: of an instance's target; it is flattened behind the first column, ``[n, 1 + size]``.
    """

    measurement: Loss
    link: Link
    shape: tuple[int, ...]

    name = "quantities"
    targets = "quantities"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        which, own = targets[:, 0].long(), targets[:, 1:].reshape(len(targets), *self.shape)
        shown = predictions(self.link, outputs, own)
        predicted = shown.gather(1, which.clamp(min=0)[:, None])[:, 0]
        values = torch.where(which == MEASUREMENT, self.measurement(outputs, own), predicted)
        if self.link != "softmax":
            return values
        best = shown.argmax(1)
        values = torch.where(which == CORRECT, (best == own).to(values), values)
        return torch.where(which == CLASS, best.to(values), values)

    def following(self, device: torch.device, dtype: torch.dtype) -> Quantities:
        return replace(self, measurement=self.measurement.following(device, dtype))


def link_of(final_model: FinalModel, outputs: Tensor, targets: Tensor) -> Link:
    """Return how predictions follow from some instances' outputs ``[n, ...]``.

    Of a loss of the user's own, labels of several outputs are taken for classes, all else as it is.
    """
    kind = final_model.loss.targets
    if kind == "probabilities":
        return "sigmoid"
    if kind == "tokens":
        return "tokens"
    classes = not targets.is_floating_point() and targets.ndim == 1 and outputs.ndim == 2
    return (
        "softmax" if kind == "classes" or (kind is None and classes and outputs.shape[1] > 1) else "identity"
    )


def predictions(link: Link, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return what is predicted of each instance, ``[n, D]``: probabilities, or the outputs themselves.

    Args:
        targets: of which only ``tokens`` asks, whose one prediction is the tokens' mean probability.
    """
    if link == "softmax":
        return outputs.softmax(1)
    if link == "tokens":
        return CorrectProbability()(outputs, targets)[:, None]
    flat = outputs.flatten(1)
    return flat.sigmoid() if link == "sigmoid" else flat


@torch.no_grad()
def predicted(final_model: FinalModel, instances: Instances) -> tuple[Link, Tensor]:
    """Return how a final model's predictions follow from its outputs, and these predictions ``[n, D]``.

    Args:
        instances: as admitted.
    """
    outputs = final_model.outputs(instances)
    link = link_of(final_model, outputs, instances.targets)
    return link, predictions(link, outputs, instances.targets)


def measuring(
    final_model: FinalModel, parts: Sequence[tuple[Instances, int | Sequence[int]]]
) -> tuple[FinalModel, Instances]:
    """Return a final model and test instances whose measurement is one quantity of each.

    Args:
        parts: instances, as admitted, and of each (or of all) which quantity: :data:`MEASUREMENT`, the number
            of a prediction, and of classes :data:`CORRECT` and :data:`CLASS`.

    Returns:
        The final model with this measurement, and all parts' instances, one part after another.

    Raises:
        InputError: there is no such quantity.
    """
    first = parts[0][0]
    outputs = final_model.outputs(first[:1])
    link = link_of(final_model, outputs, first.targets)
    width = predictions(link, outputs, first.targets[:1]).shape[1]
    marked = []
    for instances, which in parts:
        numbers = [which] * len(instances) if isinstance(which, int) else list(which)
        if len(numbers) != len(instances):
            raise InputError("quantities", f"expected {len(instances)} numbers but got {len(numbers)}")
        least = CLASS if link == "softmax" else MEASUREMENT
        if bad := [number for number in numbers if not least <= number < width]:
            raise InputError("quantities", f"expected numbers from {least} to {width - 1} but got {bad[0]}")
        targets = instances.targets
        column = torch.tensor(numbers, dtype=targets.dtype, device=targets.device)
        marked.append(
            replace(instances, targets=torch.cat([column[:, None], targets.reshape(len(targets), -1)], 1))
        )
    quantities = Quantities(final_model.measurement or final_model.loss, link, tuple(first.targets.shape[1:]))
    model = FinalModel(
        final_model.network, final_model.loss, quantities, final_model.trainable, accept_poor=True
    )
    return model, joined(marked)


def joined(parts: Sequence[Instances]) -> Instances:
    """Return the instances of several parts, one after another.

    Raises:
        InputError: they are of several shapes, as sequences that were padded to other lengths.
    """
    for name, first in parts[0].tensors().items():
        shapes = {tuple(part.tensors()[name].shape[1:]) for part in parts} | {tuple(first.shape[1:])}
        if len(shapes) > 1:
            told = " and ".join(map(str, sorted(shapes)))
            problem = f"{name} of training and test instances differ in shape, {told}: pad them"
            raise InputError("dataset", problem)
    targets = torch.cat([part.targets for part in parts])
    inputs = [part.inputs for part in parts]
    if isinstance(inputs[0], Tensor):
        return Instances(torch.cat(inputs), targets)  # type: ignore[arg-type]
    return Instances({name: torch.cat([i[name] for i in inputs]) for name in inputs[0]}, targets)  # type: ignore[index]
