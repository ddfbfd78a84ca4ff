"""How well a method agrees with the gold standard, as soon as it has scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fimo.evaluation.assessment import adjusted_scores, aligned
from fimo.evaluation.metrics import MetricName, mean_and_sem
from fimo.evaluation.resampling import mean_agreements
from fimo.further_training.sensitivity import Sensitivity
from fimo.live.log import Log
from fimo.scores import Scores

STEP = "further_training/step"
"""The x-axis of everything that depends on the amount of further training."""


def logs_agreement(
    live: Log, sensitivity: Sensitivity, metrics: Sequence[MetricName]
) -> Callable[[str, Scores], None]:
    """Return what logs ``agreement/METHOD/METRIC`` of a method's scores, as the evaluation will have it."""
    seeds = range(len(sensitivity.seeds))

    def say(name: str, scores: Scores) -> None:
        found = aligned(scores, sensitivity, name)
        values = adjusted_scores(found.values, found.predicts_loss_change, sensitivity.subtract_mean)
        means = {}
        for metric in metrics:
            by_method = mean_agreements(
                {name: values}, sensitivity.raw, {0: [seeds]}, metric, sensitivity.subtract_mean
            )
            means[f"agreement/{name}/{metric}"] = mean_and_sem(by_method[0][name])[0].tolist()
        for e, step in enumerate(sensitivity.step.tolist()):
            live.log({key: each[e] for key, each in means.items()}, STEP, step)

    return say
