"""Time and memory of methods against the number of training rows: all of them asked for, at 20 test rows.

    python benchmarks/large.py [--rows 10000 30000 100000] [--networks linear mlp]
        [--methods graddot logra ekfac datainf] [--memory 256] [--extremes 0] [--source tensor]

Rows of 384 random features in ten classes; a linear head, or an MLP with one layer of 128. Weights are
random. Each method runs in a process of its own, on one thread. ``--memory`` is the method's ``memory_mb``.
Seconds are those of the processor; memory is the most that the process allocated above what it held with
the data read (mapped files are the system's cache and do not count). ``--methods graddot+logra`` is one run
of both. ``--extremes k`` keeps only the k at each end. ``--source`` says what holds the rows: ``tensor``,
``memmap`` (a file of NumPy's) or ``datasets`` (Hugging Face's, mapped); memory then includes reading them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fimo

FEATURES, CLASSES, TESTS, WIDTH = 384, 10, 20, 128


def model_of(network: str) -> fimo.FinalModel:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(FEATURES, CLASSES)]
    if network == "mlp":
        layers = [torch.nn.Linear(FEATURES, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, CLASSES)]
    return fimo.FinalModel(torch.nn.Sequential(*layers), "cross_entropy", accept_poor=True)


def written(n: int, source: str, folder: Path) -> None:
    """Write n rows in blocks, so that this process never holds them all."""
    features = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (n, FEATURES))
    generator = np.random.default_rng(0)
    for start in range(0, n, 10_000):
        features[start : start + 10_000] = generator.standard_normal(
            (min(10_000, n - start), FEATURES), np.float32
        )
    targets = generator.integers(CLASSES, size=n)
    np.save(folder / "y.npy", targets)
    if source == "datasets":
        import datasets

        def rows() -> Any:
            for start in range(0, n, 1000):
                for x, y in zip(features[start : start + 1000], targets[start : start + 1000], strict=True):
                    yield {"x": x, "label": int(y)}

        kinds = datasets.Features(
            {"x": datasets.Sequence(datasets.Value("float32"), FEATURES), "label": datasets.Value("int64")}
        )
        made = datasets.Dataset.from_generator(rows, kinds, cache_dir=str(folder / "cache"))
        made.save_to_disk(str(folder / "set"))


def read(source: str, folder: Path) -> Any:
    if source == "datasets":
        import datasets

        return datasets.load_from_disk(str(folder / "set"))
    features, targets = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy", mmap_mode="r")
    if source == "tensor":
        return torch.tensor(features), torch.tensor(targets)
    return features, targets


def allocated_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Peak:
    """The most that the process allocated while it ran, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.before = self.most = allocated_mb()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.003):
            self.most = max(self.most, allocated_mb())


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Run one method in this process."""
    torch.set_num_threads(1)
    (network,), (method,) = options.networks, options.methods
    model, folder, several = model_of(network), Path(options.folder), method.split("+")
    test = torch.randn(TESTS, FEATURES), torch.randint(CLASSES, (TESTS,))
    small = torch.randn(100, FEATURES), torch.randint(CLASSES, (100,))
    fimo.attribute(model, small, test, several)  # what is loaded when first used
    extremes = {"extremes": options.extremes} if options.extremes else {}
    names = {"inputs": "x", "target": "label"} if options.source == "datasets" else {}
    held = read("tensor", folder) if options.source == "tensor" else None
    if options.source == "datasets":
        test_set: Any = [{"x": x, "label": int(y)} for x, y in zip(*test, strict=True)]
    else:
        test_set = test
    began = time.process_time()
    with Peak() as peak:
        train = held if held is not None else read(options.source, folder)
        found = fimo.attribute(model, train, test_set, several, memory_mb=options.memory, **extremes, **names)
    seconds = time.process_time() - began
    assert all(scores.values.shape[0] == TESTS for scores in found.values())
    return {"seconds": seconds, "memory_mb": peak.most - peak.before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    add("--networks", nargs="+", default=["linear", "mlp"])
    add("--methods", nargs="+", default=["graddot", "logra", "ekfac", "datainf"])
    add("--memory", type=float, default=256)
    add("--extremes", type=int, default=0)
    add("--source", default="tensor", choices=("tensor", "memmap", "datasets"))
    add("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measured(options)))
        return
    print(f"{'network':8} {'method':28} {'rows':>8} {'seconds':>8} {'memory':>8} MB")
    for n in options.rows:
        with tempfile.TemporaryDirectory(prefix="fimo-large-") as name:
            written(n, options.source, Path(name))
            for network in options.networks:
                for method in options.methods:
                    command = [
                        sys.executable, __file__, "--networks", network, "--methods", method,
                        "--memory", str(options.memory), "--extremes", str(options.extremes),
                        "--source", options.source, "--folder", name,
                    ]  # fmt: skip
                    found = subprocess.run(command, capture_output=True, text=True, check=False)
                    if found.returncode:
                        print(
                            f"{network:8} {method:28} {n:>8} failed: {found.stderr.strip()[-300:]}",
                            flush=True,
                        )
                        continue
                    result = json.loads(found.stdout.splitlines()[-1])
                    seconds, memory = result["seconds"], result["memory_mb"]
                    print(f"{network:8} {method:28} {n:>8} {seconds:>8.2f} {memory:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
