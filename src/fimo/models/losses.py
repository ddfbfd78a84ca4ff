"""Losses with closed forms, and what else may be explained, by the names that configurations use.

A new one is a class beside its kind (see :class:`~fimo.models.loss_function.Loss`) and its name here.
"""

from __future__ import annotations

from fimo.models.class_losses import (
    CorrectProbability,
    CrossEntropy,
    LanguageModelling,
    logit_margin,
)
from fimo.models.loss_function import Loss as Loss
from fimo.models.value_losses import BinaryCrossEntropy, Huber, MeanSquaredError

mean_squared_error = MeanSquaredError()
cross_entropy = CrossEntropy()
binary_cross_entropy = BinaryCrossEntropy()
huber = Huber()
language_modelling = LanguageModelling()
language_modelling_sum = LanguageModelling(total=True)
correct_probability = CorrectProbability()

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        mean_squared_error,
        cross_entropy,
        binary_cross_entropy,
        huber,
        language_modelling,
        language_modelling_sum,
    )
}

MEASUREMENTS: dict[str, Loss] = {
    **LOSSES,
    **{measurement.name: measurement for measurement in (logit_margin, correct_probability)},
}
"""What may be explained on test instances, by name."""
