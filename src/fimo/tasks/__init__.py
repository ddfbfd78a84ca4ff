"""More ways to judge methods: tasks that run the engine again, each a choice under ``evaluation``."""

from fimo.tasks.base import Judged, Task, build_tasks, with_findings
from fimo.tasks.datamodeling import Datamodeling
from fimo.tasks.mislabelled import Mislabelled
from fimo.tasks.removal import Removal
from fimo.tasks.retraining import Retraining, retrain

__all__ = [
    "Datamodeling",
    "Judged",
    "Mislabelled",
    "Removal",
    "Retraining",
    "Task",
    "build_tasks",
    "retrain",
    "with_findings",
]
