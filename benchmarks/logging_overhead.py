"""What logging costs further training: the same job with and without loggers, in turn.

    python benchmarks/logging_overhead.py --pairs 4 logger=wandb

Prints the seconds of further training (from ``cost.csv``) and the processor time of the whole process, with
``logger=none`` and with the given settings, and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

JOB = [
    "+method=graddot", "until=further_training", "further_training.epochs=20", "trainer.max_epochs=20",
    "further_training.save_raw=false", "trainer.enable_progress_bar=false", "threads=1",
]  # fmt: skip


def run(folder: Path, settings: list[str]) -> tuple[float, float]:
    """Return the seconds of further training, and of all processors."""
    command = [
        sys.executable,
        "-m",
        "fimo",
        f"store={folder}/store",
        f"hydra.run.dir={folder}/run",
        *JOB,
        *settings,
    ]
    before = os.times()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = os.times()
    cost = pd.read_csv(folder / "run" / "cost.csv").set_index("stage")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return float(cost.loc["further_training", "seconds"]), used


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("settings", nargs="*", default=["logger=wandb"])
    chosen = parser.parse_args()
    ratios = []
    print("pair  without          with             ratio of wall, of processor time")
    for pair in range(chosen.pairs):
        choices = {"none": ["logger=none"], "with": chosen.settings}
        found = {}
        for name in sorted(choices, reverse=bool(pair % 2)):
            with tempfile.TemporaryDirectory() as folder:
                found[name] = run(Path(folder), choices[name])
        (wall, used), (more, used_more) = found["none"], found["with"]
        ratios.append((more / wall, used_more / used))
        print(
            f"{pair:4}  {wall:6.2f} s {used:6.2f} s  {more:6.2f} s {used_more:6.2f} s  "
            f"{more / wall:6.3f} {used_more / used:6.3f}",
            flush=True,
        )
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    print(f"median ratio of wall {medians[0]:.3f}, of processor time {medians[1]:.3f}")


if __name__ == "__main__":
    main()
