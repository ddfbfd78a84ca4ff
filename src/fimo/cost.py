"""What each stage of a run cost."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pandas as pd
import torch

from fimo.store.files import written_aside


@dataclass
class Cost:
    """The cost of one stage; where a result came from the store, of making it.

    Args:
        stage: ``final_model``, ``further_training``, a method's name, ``evaluation`` or ``report``.
        seconds: wall-clock time.
        peak_memory_mb: the process's largest resident memory during the stage (where the system can reset
            that mark, else since the process began), plus the accelerator's.
        gradient_evaluations: gradients of one instance's loss (or products with its Jacobian).
        reused: share of the result that came from the store; of a method that follows full runs which were
            there already, or was given gradients that another had taken, their share of the seconds.
        reused_seconds: of ``seconds``, what results that were there already took when they were made.
    """

    stage: str
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    gradient_evaluations: int = 0
    reused: float = 0.0
    reused_seconds: float = field(default=0.0, repr=False, compare=False)
    started: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    def keep(self, folder: Path) -> None:
        """Write beside a stored result what it has cost to make so far."""
        kept = asdict(self) | {"seconds": self.seconds + time.perf_counter() - self.started}
        kept["peak_memory_mb"] = max(self.peak_memory_mb, peak_memory_mb())
        with written_aside(folder / "cost.json") as path:
            path.write_text(json.dumps(kept))

    def reuse(self, seconds: float) -> None:
        """Charge a part of the result that was there already with what it took to make."""
        self.seconds += seconds
        self.reused_seconds += seconds

    def recall(self, folder: Path) -> None:
        """Take over what a stored result cost to make, if that is known, and mark it as reused."""
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads((folder / "cost.json").read_text())
            for name in ("seconds", "peak_memory_mb", "gradient_evaluations"):
                setattr(self, name, kept[name])
        self.reused = 1.0


@contextlib.contextmanager
def measured(stage: str) -> Iterator[Cost]:
    """Time a stage and record its peak memory; the body may set the other fields."""
    cost = Cost(stage)
    _reset_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cost.reused < 1:
            cost.seconds += time.perf_counter() - start
            cost.peak_memory_mb = max(cost.peak_memory_mb, peak_memory_mb())
            if cost.reused_seconds:
                cost.reused = cost.reused_seconds / cost.seconds


def cost_table(costs: Sequence[Cost]) -> pd.DataFrame:
    """Return ``stage,seconds,peak_memory_mb,gradient_evaluations,reused``, a row per stage."""
    return (
        pd.DataFrame([asdict(c) for c in costs], columns=[f.name for f in fields(Cost)])
        .drop(columns=["started", "reused_seconds"])
        .round({"seconds": 4, "peak_memory_mb": 1})
    )


def write_costs(costs: Sequence[Cost], path: Path) -> None:
    """Write ``cost.csv``."""
    with written_aside(path) as aside:
        cost_table(costs).to_csv(aside, index=False)


def held_memory_mb() -> float:
    """Return the memory that the process holds now, less what it can return to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    accelerator = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return _status("VmRSS") + accelerator


def _status(name: str) -> float:
    """Return a number of megabytes of the process's status; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Return the largest memory of process and accelerator (since the stage began, where that is known)."""
    accelerator = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    if peak := _status("VmHWM"):
        return peak + accelerator
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 1024) + accelerator
