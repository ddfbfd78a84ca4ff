"""How well attribution scores agree with the sensitivity."""

from fimo.evaluation.assessment import COLUMNS, Evaluation, assess, evaluate
from fimo.evaluation.ceiling import noise_ceiling
from fimo.evaluation.metrics import METRICS, MetricName, agreement

__all__ = [
    "COLUMNS",
    "METRICS",
    "Evaluation",
    "MetricName",
    "agreement",
    "assess",
    "evaluate",
    "noise_ceiling",
]
