"""Whether a change of the code leaves every number as it was: sensitivities and scores, bit for bit.

    git worktree add ../before HEAD~1
    python benchmarks/same_numbers.py record ../before before      # about four minutes each on one thread
    python benchmarks/same_numbers.py record . after
    python benchmarks/same_numbers.py compare before after

records a list of small runs: both engines, every leave-out rule and optimizer, groups of left-out instances,
losses with and without closed forms, every method and every way to judge methods. ``compare`` prints, for
each run, how many tensors are equal to the bit, and of each one that is not the largest difference, relative
to the tensor's largest entry; it ends with status 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

NETWORKS = '''
import torch
from torch import nn
import torch.nn.functional as F

class Normed(nn.Module):
    """No chain of linear layers: normalisation and dropout."""
    def __init__(self, inputs, outputs, width=12):
        super().__init__()
        self.first, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)
        self.last = nn.Linear(width, outputs)
        self.dropout = nn.Dropout(0.1)
    def forward(self, x):
        return self.last(self.dropout(F.gelu(self.norm(self.first(x)))))

def tanh_net(inputs, outputs, width=12):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))

def huber(outputs, targets):
    return F.huber_loss(outputs, targets, reduction="none").mean(-1)
'''

SMALL = [
    "logger=none",
    "trainer.max_epochs=20",
    "trainer.enable_progress_bar=false",
    "further_training.seeds=3",
    "further_training.left_out=8",
    "further_training.test=6",
    "further_training.epochs=3",
    "evaluation.bootstrap=50",
    "model.accept_poor=true",
]
DIABETES = ["dataset=diabetes", "model.network.hidden=[12]"]
OWN = [
    "model=custom",
    "model.optimizer=sgd",
    "model.lr=0.03",
    "+model.network.inputs=auto",
    "+model.network.outputs=auto",
]
NORMED = [*OWN, "model.network._target_=networks.Normed"]
TANH = [*OWN, "model.network._target_=networks.tanh_net"]

RUNS: dict[str, list[str]] = {
    **{
        f"linear/{optimizer}/{rule}": [
            *DIABETES,
            f"further_training.optimizer={optimizer}",
            f"further_training.lr={0.01 if optimizer == 'sgd' else 0.001}",
            f"further_training.leave_out={rule}",
        ]
        for optimizer in ("sgd", "adam", "adamw")
        for rule in ("shift", "mask", "every_batch")
    },
    "linear/momentum": [
        *DIABETES,
        "further_training.momentum=0.9",
        "further_training.weight_decay=0.01",
        "further_training.lr=0.003",
        "further_training.evaluate_every=4",
    ],
    "linear/groups": [
        *DIABETES,
        "further_training.left_out=[[0,1,2],[3,4],[5]]",
        "+method=[graddot,exact,response]",
    ],
    "linear/classes": ["dataset=breast_cancer", "model.network.hidden=[12,12]", "evaluation=everything"],
    "linear/classes_adam": ["dataset=breast_cancer", *TANH, "further_training=adam"],
    "linear/tanh_huber": ["dataset=diabetes", *TANH, "model.loss=networks.huber"],
    "autograd/sgd": ["dataset=diabetes", *NORMED],
    "autograd/adam": [
        "dataset=breast_cancer",
        *NORMED,
        "further_training=adam",
        "further_training.leave_out=mask",
    ],
    "linear/digits": ["dataset=digits", "model.network.hidden=[16]", "further_training.epochs=2"],
}


def record(root: Path, folder: Path, only: str) -> None:
    """Run the list with the code under ``root``; every run's results in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "networks.py").write_text(NETWORKS)
        paths = [str(root / "src"), str(root), scratch]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        for name, overrides in RUNS.items():
            if only not in name:
                continue
            began = time.monotonic()
            target = folder / name.replace("/", "-")
            command = [
                sys.executable,
                "-m",
                "src.run",
                *SMALL,
                *overrides,
                f"hydra.run.dir={target.resolve()}",
            ]
            command.append(f"store={Path(scratch, 'store')}")
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, check=False
            )
            lines = done.stdout.splitlines() + done.stderr.splitlines()
            status = "" if done.returncode == 0 else f"status {done.returncode}: {' '.join(lines[-1:])}"
            print(f"{name:24} {time.monotonic() - began:5.1f} s  {status}", flush=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every array that a run wrote, by file and name."""
    files = [folder / "sensitivity.safetensors", *sorted(folder.glob("scores/*.safetensors"))]
    return {f"{f.stem}:{k}": t for f in files if f.exists() for k, t in load_file(f).items()}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference over the largest entry; infinite where NaN or shapes differ."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))


def compare(before: Path, after: Path) -> bool:
    """Print what differs; return whether nothing does."""
    same_everywhere = True
    for name in RUNS:
        runs = [tensors(folder / name.replace("/", "-")) for folder in (before, after)]
        if not any(runs):
            continue
        differing = {}
        for key in sorted(runs[0].keys() | runs[1].keys()):
            a, b = (run.get(key) for run in runs)
            if a is None or b is None:
                differing[key] = "only " + ("after" if a is None else "before")
            elif a.dtype != b.dtype or a.numpy().tobytes() != b.numpy().tobytes():
                differing[key] = f"{difference(a, b):.1e}"
        print(f"{name:24} {len(runs[0]) - len(differing):3} of {len(runs[0])} equal to the bit", end="")
        print("  " + ", ".join(f"{k} {v}" for k, v in differing.items()) if differing else "")
        same_everywhere &= not differing
    return same_everywhere


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the list and keep its results")
    recording.add_argument("root", type=Path, help="the repository, or another worktree of it")
    recording.add_argument("folder", type=Path, help="where results go")
    recording.add_argument("--only", default="", help="runs whose name contains this")
    comparing = commands.add_parser("compare", help="two recordings")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.root.resolve(), arguments.folder, arguments.only)
    elif not compare(arguments.before, arguments.after):
        sys.exit(1)


if __name__ == "__main__":
    main()
