"""Further training: the gold standard, and the trajectories of its full runs.

:func:`further_train` and its companions are imported when first used, so that reading a protocol costs no
import of Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.further_training.gold_standard import evaluation_points as evaluation_points
    from fimo.further_training.gold_standard import further_train as further_train
    from fimo.further_training.protocol import Protocol as Protocol
    from fimo.further_training.replicas import Replica as Replica
    from fimo.further_training.schedule import Batch as Batch
    from fimo.further_training.schedule import BatchStream as BatchStream
    from fimo.further_training.seeds import other_seeds as other_seeds
    from fimo.further_training.sensitivity import Sensitivity as Sensitivity
    from fimo.further_training.tangent import TangentOutputs as TangentOutputs
    from fimo.further_training.tangent import tangent_outputs as tangent_outputs
    from fimo.further_training.trajectories import full_runs as full_runs
    from fimo.further_training.trajectory import FurtherTraining as FurtherTraining
    from fimo.further_training.trajectory import Trajectory as Trajectory

_HOMES = {
    "further_train": "gold_standard",
    "evaluation_points": "gold_standard",
    "full_runs": "trajectories",
    "tangent_outputs": "tangent",
    "TangentOutputs": "tangent",
    "Protocol": "protocol",
    "Replica": "replicas",
    "Batch": "schedule",
    "BatchStream": "schedule",
    "Sensitivity": "sensitivity",
    "other_seeds": "seeds",
    "FurtherTraining": "trajectory",
    "Trajectory": "trajectory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
