"""How well attribution scores agree with the sensitivity."""

from fimo.evaluation.assessment import COLUMNS, Evaluation, assess, evaluate
from fimo.evaluation.ceiling import Ceilings, noise_ceiling, noise_ceilings, seeds_for
from fimo.evaluation.metrics import METRICS, MetricName, agreement
from fimo.evaluation.over_models import (
    SeedSpread,
    VarianceComponents,
    probability_better,
    variance_components,
)

__all__ = [
    "COLUMNS",
    "METRICS",
    "Ceilings",
    "Evaluation",
    "MetricName",
    "SeedSpread",
    "VarianceComponents",
    "agreement",
    "assess",
    "evaluate",
    "noise_ceiling",
    "noise_ceilings",
    "probability_better",
    "seed_spreads",
    "seeds_for",
    "variance_components",
]
