"""The further-training engine against a plain loop, side by side in one run.

    python benchmarks/further_training.py [--seconds 5] [--only mlp_regression ...] [--growth]

Prints, for each network: milliseconds per replica-step (evaluation at every epoch included) of a plain
PyTorch loop with all threads, of the same loop over a DataLoader (as most training code is written), of one
plain loop per thread in processes of their own, and of the engine under the Trainer; their ratios; the
engine's share of the measured matrix-multiply peak; and the largest difference between the test losses of a
run by the loop and by the engine, relative to the largest loss. With ``--growth``: time and memory against
the number of replicas and epochs, the share of CPU time outside the chunks' arithmetic, and what a tangent or
an adjoint costs in replicas. A loop with several threads suffers most from other work on the machine.

Convolutions gain little from being stacked on a CPU: one by one or as a grouped convolution they already run
at the matrix-multiply peak (1.2 GFLOP in 12 ms of one thread); unfolding them into batched products took up
to 4 times as long. What stacking saves is calls, so large networks run one replica after another.

torch.compile was tried with Inductor's C++ code (torch 2.13, GCC, one thread, side by side, busy machine, CPU
milliseconds per replica-step) and is left out. Steps of the MLPs gain nothing, since matrix products are all
that takes long: regression at 5, 10 and 25 replicas .207, .184, .212 as written here and .203, .181, .203
compiled (``max-autotune`` .204 and .193 at 10); classification at 9 and 25 .204, .224 and .207, .224; each
shape of a batch takes 5 to 25 s to compile. Of networks by torch.func (vmap(grad), eager and compiled), a
convolutional step takes 1.51 and 1.57, but the transformer's 1.52 and .85: elementwise operations are fused.
As written here, without vmap(grad), it takes 1.35, so compiling would pay from some 50,000 replica-steps for
each shape of a batch on.

Up to an eighth of a convolutional step is page faults: glibc gives freed memory back between operations (an
MLP's step has none). The thresholds are the process's to set, not a library's: with glibc.malloc's
mmap_threshold=33554432, trim_threshold=1073741824 and top_pad=67108864 (GLIBC_TUNABLES, or mallopt as
measured) a convolutional net's job takes 8 % and a transformer's 5 % less CPU time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cases import mlp
from tests.reference.further_training import plain_run

from fimo.cost import measured, peak_memory_mb
from fimo.data.instances import Instances
from fimo.engine import driver
from fimo.engine.context import Setting
from fimo.further_training import Protocol, further_train, tangent_outputs
from fimo.further_training.adjoint import adjoint
from fimo.models.final_model import FinalModel, apply
from fimo.models.losses import Loss, cross_entropy, mean_squared_error


@dataclass
class Problem:
    """A network with data."""

    final_model: FinalModel
    train: Instances
    test: Instances
    batch_size: int
    lr: float = 0.01

    def protocol(self, epochs: int) -> Protocol:
        return Protocol(lr=self.lr, batch_size=self.batch_size, epochs=epochs)


class SmallConvNet(nn.Module):
    """Two convolutions and a linear layer: ``[n, 1, 16, 16] -> [n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.head(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1))


class SmallTransformer(nn.Module):
    """One layer of attention over 16 tokens of width 32: ``[n, 16] -> [n, 2]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def table(n: int, d: int, outputs: int, test: int) -> Problem:
    """An MLP d-128-128-outputs; the work does not depend on what the data say."""
    x = torch.randn(n + test, d)
    y = torch.randn(n + test, 1) if outputs == 1 else torch.randint(outputs, (n + test,))
    loss: Loss = mean_squared_error if outputs == 1 else cross_entropy
    network = mlp(d, (128, 128), outputs, nn.ReLU)
    return Problem(FinalModel(network, loss), *split(x, y, n), 128)


def conv_net() -> Problem:
    x, y = torch.randn(600, 1, 16, 16), torch.randint(10, (600,))
    return Problem(FinalModel(SmallConvNet(), cross_entropy), *split(x, y, 512), 32)


def transformer() -> Problem:
    x, y = torch.randint(100, (600, 16)), torch.randint(2, (600,))
    return Problem(FinalModel(SmallTransformer(), cross_entropy), *split(x, y, 512), 32)


def split(x: Tensor, y: Tensor, n: int) -> tuple[Instances, Instances]:
    return Instances(x[:n], y[:n]), Instances(x[n:], y[n:])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp_regression": lambda: table(691, 8, 1, 77),
    "mlp_classification": lambda: table(9400, 23, 2, 1044),
    "conv_net": conv_net,
    "transformer": transformer,
}


def plain_loop(problem: Problem, seconds: float, loader: bool = False) -> float:
    """Return milliseconds per step of one run after another.

    Args:
        loader: batches come from a DataLoader, not by indexing the tensors.
    """
    train, test, loss, size = problem.train, problem.test, problem.final_model.loss, problem.batch_size
    network = copy.deepcopy(problem.final_model.network).train().requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), problem.lr)
    steps, start = 0, 0.0
    assert isinstance(train.inputs, Tensor)
    loaded = DataLoader(TensorDataset(train.inputs, train.targets), size, shuffle=True)

    def indexed() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(train))
        for first in range(0, len(train), size):
            batch = train[order[first : first + size]]
            yield batch.inputs, batch.targets

    while True:
        for inputs, targets in loaded if loader else indexed():
            optimizer.zero_grad()
            loss(network(inputs), targets).mean().backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            loss(apply(network, test.inputs), test.targets)
        network.train()
        if not start:  # the first epoch warms up
            start = time.perf_counter()
            continue
        steps += -(-len(train) // size)
        if time.perf_counter() - start > seconds:
            return 1e3 * (time.perf_counter() - start) / steps


def _process(name: str, seconds: float, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problem = PROBLEMS[name]()
    plain_loop(problem, 0.1)
    barrier.wait()
    queue.put(plain_loop(problem, seconds))


def plain_processes(name: str, processes: int, seconds: float) -> float:
    """Return milliseconds per step of that many loops side by side, one thread each."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    jobs = [context.Process(target=_process, args=(name, seconds, barrier, queue)) for _ in range(processes)]
    for job in jobs:
        job.start()
    rates = [1 / queue.get() for _ in jobs]
    for job in jobs:
        job.join()
    return 1 / sum(rates)


def engine(problem: Problem, seeds: int, left_out: int, epochs: int) -> float:
    """Return milliseconds per replica-step of a whole job under the Trainer."""
    protocol = problem.protocol(epochs)
    start = time.perf_counter()
    further_train(problem.final_model, problem.train, problem.test, protocol, range(seeds), range(left_out))
    steps = protocol.total_steps(len(problem.train)) * seeds * (left_out + 1)
    return 1e3 * (time.perf_counter() - start) / steps


def matmul_peak(threads: int, seconds: float = 0.5) -> float:
    """Return GFLOP/s of batched 128 x 128 products, one stack on each thread."""

    def work(_: int) -> int:
        a, b, c = (torch.randn(16, 128, 128) for _ in range(3))
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            torch.bmm(a, b, out=c)
            done += 1
        return done

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        products = sum(pool.map(work, range(threads)))
    torch.set_num_threads(threads)
    return products * 16 * 2 * 128**3 / seconds / 1e9


def operations(problem: Problem) -> float | None:
    """Return the floating-point operations of a replica-step's products, of networks of linear layers."""
    setting = Setting.build(problem.final_model, problem.train, problem.test, problem.protocol(1))
    if setting.engine != "linear":
        return None
    sizes = [p.numel() for p in problem.final_model.parameters().values() if p.ndim == 2]
    # the epoch's last batch is short
    batch = len(problem.train) / problem.protocol(1).batches_per_epoch(len(problem.train))
    return 2 * batch * (3 * sum(sizes) - sizes[0])


def largest_difference(problem: Problem) -> float:
    """Return the largest relative difference of test losses between loop and engine, or fail."""
    data = (problem.final_model, problem.train, problem.test, problem.protocol(3))
    found = further_train(*data, [0], [5, 17])
    assert found.full_losses is not None
    full = plain_run(*data, 0)[0]
    worst = (found.full_losses[0] - full).abs().max().item()
    for column, i in enumerate([5, 17]):
        change = plain_run(*data, 0, [i])[0] - full
        worst = max(worst, (found.raw[0, :, :, column] - change).abs().max().item())
    worst /= full.abs().max().item()
    assert worst < 1e-5, f"the engine's test losses differ from the loop's by {worst:.1e}"
    return worst


def compare(names: list[str], seconds: float) -> None:
    """Print one line for each network."""
    threads = torch.get_num_threads()
    print(f"{os.cpu_count()} cores, {threads} threads; ms per replica-step, evaluation every epoch included")
    print(
        "network               loop  DataLoader  processes   engine  loop/engine  DataLoader/engine"
        "  processes/engine  of peak  difference"
    )
    for name in names:
        torch.manual_seed(0)
        problem = PROBLEMS[name]()
        difference = largest_difference(problem)
        per_epoch = problem.protocol(1).batches_per_epoch(len(problem.train))
        epochs = max(1, int(1e3 * seconds / (engine(problem, 1, 100, 1) * 101 * per_epoch)))
        rounds = []
        for _ in range(3):  # in turn, so that a busy machine is busy for all
            rounds.append(
                (
                    plain_loop(problem, seconds / 2),
                    plain_loop(problem, seconds / 2, loader=True),
                    plain_processes(name, threads, seconds / 2),
                    engine(problem, 1, 100, epochs),
                    -matmul_peak(threads),
                )
            )
        loop, loader, process, own, peak = (min(column) for column in zip(*rounds, strict=True))
        flops = operations(problem)
        share = f"{flops / own / 1e6 / -peak:.0%}" if flops else "-"
        print(
            f"{name:20s} {loop:5.3f}  {loader:10.3f}  {process:9.3f}  {own:7.4f}  {loop / own:11.1f}"
            f"  {loader / own:17.1f}  {process / own:16.1f}  {share:>7s}  {difference:10.0e}"
            f"  (peak {-peak:.0f} GFLOP/s)",
            flush=True,
        )


def growth() -> None:
    """Print time and memory against the number of runs and epochs (101 replicas for each seed)."""
    print("\n  runs  epochs  seconds  ms per replica-step  peak memory MB  of it since the start")
    torch.manual_seed(0)
    problem = PROBLEMS["mlp_regression"]()
    sizes = [
        (1, 10, 10),
        (1, 100, 10),
        (10, 100, 10),
        (10, 100, 1),
        (100, 100, 1),
        (1, 100, 1),
        (1, 100, 100),
    ]
    for seeds, left_out, epochs in sizes:
        before = peak_memory_mb()
        with measured("further_training") as cost:
            each = engine(problem, seeds, left_out, epochs)
        runs = seeds * (left_out + 1)
        more = cost.peak_memory_mb - before
        memory = f"{cost.peak_memory_mb:14.0f}  {more:21.0f}"
        print(f"{runs:6d}  {epochs:6d}  {cost.seconds:7.2f}  {each:19.4f}  {memory}", flush=True)


@dataclass
class Spent:
    """CPU seconds of a job, in its chunks' arithmetic, while training, before and after; and its time."""

    chunks: float
    training: float
    before: float
    after: float
    seconds: float


def spent(problem: Problem, left_out: int, epochs: int, seeds: int = 1) -> Spent:
    """Run a job and say where its CPU time went (other work on the machine does not count)."""
    inside, lock, advance, at = 0.0, threading.Lock(), driver.advance, {}

    def timed(*arguments: Any) -> int:
        nonlocal inside
        start = time.thread_time()
        steps = advance(*arguments)
        with lock:
            inside += time.thread_time() - start
        return steps

    class Watch(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            at["start"] = time.process_time()

        def on_train_end(self, *_: Any) -> None:
            at["end"] = time.process_time()

    data = (problem.final_model, problem.train, problem.test, problem.protocol(epochs))
    driver.advance = timed
    try:
        began, wall = time.process_time(), time.perf_counter()
        further_train(*data, range(seeds), range(left_out), trainer={"callbacks": [Watch()]})
        wall, ended = time.perf_counter() - wall, time.process_time()
    finally:
        driver.advance = advance
    return Spent(inside, at["end"] - at["start"], at["start"] - began, ended - at["end"], wall)


def overhead(seeds: int, epochs: int) -> None:
    """Print the share of CPU time outside the chunks' arithmetic (Trainer, store, setting up chunks)."""
    torch.manual_seed(0)
    found = spent(PROBLEMS["mlp_regression"](), 100, epochs, seeds)
    print(
        f"\n{101 * seeds} runs of {epochs} epochs, {found.seconds:.0f} s: {found.chunks:.1f} of "
        f"{found.training:.1f} s of CPU time in chunks, {1 - found.chunks / found.training:.1%} outside; "
        f"{found.before:.2f} s before training and {found.after:.2f} s after"
    )


def derivatives(epochs: int = 3) -> None:
    """Print what a tangent or an adjoint costs, on one thread, in replicas (evaluation not counted)."""
    print("\n  chunk  ms per replica-step  per tangent-step  per adjoint-step  in replicas")
    torch.manual_seed(0)
    threads, problem = torch.get_num_threads(), PROBLEMS["mlp_classification"]()
    torch.set_num_threads(1)
    problem.train, test = problem.train[:691], problem.test
    protocol = dataclasses.replace(problem.protocol(epochs), leave_out="mask")
    steps = protocol.total_steps(len(problem.train))
    problem.test = test[:1]
    replica = 1e3 * min(spent(problem, 100, epochs).chunks for _ in range(3)) / steps / 101
    for chunk in (8, 32, 64):
        tangent = back = float("inf")
        for _ in range(3):
            start = time.process_time()
            tangent_outputs(
                problem.final_model, problem.train, test[:1], protocol, 0, range(chunk), chunk=chunk
            )
            middle = time.process_time()
            adjoint(
                problem.final_model,
                problem.train,
                test[:chunk],
                protocol,
                0,
                points=[epochs - 1],
                chunk=chunk,
            )
            tangent = min(tangent, 1e3 * (middle - start) / steps / chunk)
            back = min(back, 1e3 * (time.process_time() - middle) / steps / chunk)
        ratios = f"{tangent / replica:.1f} and {back / replica:.1f}"
        print(f"  {chunk:5d}  {replica:19.4f}  {tangent:16.4f}  {back:16.4f}  {ratios}", flush=True)
    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time of each measurement")
    parser.add_argument("--only", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument(
        "--growth",
        action="store_true",
        help="time and memory against runs and epochs, the Trainer's share, and the cost of derivatives",
    )
    arguments = parser.parse_args()
    if arguments.only:
        compare(arguments.only, arguments.seconds)
    if arguments.growth:
        growth()
        overhead(1, 360)
        overhead(100, 1)
        derivatives()


if __name__ == "__main__":
    main()
