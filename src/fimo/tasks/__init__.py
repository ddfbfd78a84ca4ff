"""More ways to judge methods: tasks that run the engine again, each a choice under ``evaluation``."""

from fimo.tasks.base import Judged, Task
from fimo.tasks.controls import (
    ClassDetection,
    MixedDatasets,
    RandomisedModel,
    ShortcutDetection,
    SubclassDetection,
)
from fimo.tasks.datamodeling import Datamodeling
from fimo.tasks.distribution import Distribution
from fimo.tasks.fact_tracing import FactTracing
from fimo.tasks.mislabelled import Mislabelled
from fimo.tasks.removal import Removal
from fimo.tasks.retraining import Retraining

__all__ = [
    "ClassDetection",
    "Datamodeling",
    "Distribution",
    "FactTracing",
    "Judged",
    "Mislabelled",
    "MixedDatasets",
    "RandomisedModel",
    "Removal",
    "Retraining",
    "ShortcutDetection",
    "SubclassDetection",
    "Task",
]
