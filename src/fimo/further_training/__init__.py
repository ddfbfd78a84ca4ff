"""Further training: the gold standard, and the trajectories of its full runs.

:func:`further_train` and its companions are imported when first used, so that reading a protocol costs no
import of Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.engine.leave_out import Batch as Batch
    from fimo.engine.leave_out import BatchStream as BatchStream
    from fimo.engine.protocol import Protocol as Protocol
    from fimo.engine.replicas import Replica as Replica
    from fimo.further_training.gold_standard import evaluation_points as evaluation_points
    from fimo.further_training.gold_standard import further_train as further_train
    from fimo.further_training.seeds import other_seeds as other_seeds
    from fimo.further_training.sensitivity import Sensitivity as Sensitivity
    from fimo.further_training.tangent import TangentOutputs as TangentOutputs
    from fimo.further_training.tangent import tangent_outputs as tangent_outputs
    from fimo.further_training.trajectory import FurtherTraining as FurtherTraining
    from fimo.further_training.trajectory import Trajectory as Trajectory
    from fimo.further_training.trajectory_recorder import full_runs as full_runs

_HOMES = {
    "further_train": "fimo.further_training.gold_standard",
    "evaluation_points": "fimo.further_training.gold_standard",
    "full_runs": "fimo.further_training.trajectory_recorder",
    "tangent_outputs": "fimo.further_training.tangent",
    "TangentOutputs": "fimo.further_training.tangent",
    "Protocol": "fimo.engine.protocol",
    "Replica": "fimo.engine.replicas",
    "Batch": "fimo.engine.leave_out",
    "BatchStream": "fimo.engine.leave_out",
    "Sensitivity": "fimo.further_training.sensitivity",
    "other_seeds": "fimo.further_training.seeds",
    "FurtherTraining": "fimo.further_training.trajectory",
    "Trajectory": "fimo.further_training.trajectory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
