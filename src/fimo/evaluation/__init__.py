"""How well attribution scores agree with the sensitivity."""

from fimo.evaluation.assessment import COLUMNS, Evaluation, assess, evaluate
from fimo.evaluation.ceiling import Ceilings, noise_ceiling, noise_ceilings, seeds_for
from fimo.evaluation.metrics import METRICS, MetricName, agreement

__all__ = [
    "COLUMNS",
    "METRICS",
    "Ceilings",
    "Evaluation",
    "MetricName",
    "agreement",
    "assess",
    "evaluate",
    "noise_ceiling",
    "noise_ceilings",
    "seeds_for",
]
