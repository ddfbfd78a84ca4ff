"""How near the ceiling methods stay as further training grows, and at what part of the gold standard's cost.

    python benchmarks/response.py --dataset concrete --path FILE --optimizer sgd --lr 0.03 --epochs 50

prints, per method, the agreement (cosine, mean over test instances) at a few epochs, its ratio to the noise
ceiling in brackets, and the CPU time relative to the gold standard's. The final model is trained first.
``again`` is the lower ceiling: what the gold standard made again with as many other seeds would show. Methods
follow as many seeds of their own, which the gold standard does not use, and ``fewer seeds`` is real runs of
all left-out instances with a tenth as many of these; ``--follow-from 0`` takes the gold standard's own seeds,
whose noise both then know, and the table says so.

    python benchmarks/response.py --suite

does so for a list of data sets, optimizers and amounts of further training (docs/measurements.md); add
``--path FILE`` for concrete's, which is left out otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
from sklearn.datasets import load_wine, make_friedman1
from torch import Tensor

from fimo.data.bundled import BundledData
from fimo.data.concrete import ConcreteData
from fimo.data.instances import Instances
from fimo.data.tabular import Table, TabularModule
from fimo.engine.protocol import Protocol
from fimo.engine.settings import LEAVE_OUT_RULES, OPTIMIZERS
from fimo.evaluation import agreement, noise_ceilings
from fimo.further_training import full_runs, further_train, other_seeds
from fimo.further_training.seeds import relation
from fimo.further_training.sensitivity import Sensitivity
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.base import AttributionMethod
from fimo.methods.best import Best
from fimo.methods.bif import BayesianInfluence
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.daunce import Daunce
from fimo.methods.exact import ExactInfluence
from fimo.methods.graddot import GradDot
from fimo.methods.mirrored import Mirrored
from fimo.methods.response import Response
from fimo.methods.source import Source
from fimo.methods.unlearning import Unlearning
from fimo.methods.unrolled import Unrolled
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, mean_squared_error
from fimo.models.mlp import mlp

METHODS: dict[str, Callable[[], AttributionMethod]] = {
    "graddot": GradDot,
    "exact": ExactInfluence,
    "exact_time_matched": lambda: ExactInfluence(damping="time_matched"),
    "source": Source,
    "response_final": lambda: Response(along="final"),
    "response_end": lambda: Response(along="end"),
    "response_loss": lambda: Response(propagate="loss"),
    "response": Response,
    "calibrated": CalibratedResponse,
    "best": Best,
    "unrolled": Unrolled,
    "unlearning": Unlearning,
    "unlearning_far": lambda: Unlearning(steps=30, direction="up"),
    "bif": BayesianInfluence,
    "daunce": Daunce,
    "daunce_256": lambda: Daunce(runs=256),
    "mirrored": Mirrored,
    "mirrored_up": lambda: Mirrored("up"),
    "mirrored_all_seeds": lambda: Mirrored(seeds=None),
}


SUITE = """
--dataset concrete --final-epochs 1000 --batch-size 128 --lr 0.03 --epochs 500
--dataset concrete --final-epochs 1000 --batch-size 128 --optimizer adam --lr 1e-4 --epochs 100
--dataset breast_cancer --batch-size 128 --lr 0.03 --epochs 500
--dataset breast_cancer --batch-size 128 --optimizer adam --lr 1e-4 --epochs 100
--dataset diabetes --final-lr 0.01 --batch-size 64 --lr 0.01 --epochs 300
--dataset diabetes --final-lr 0.01 --optimizer adam --lr 1e-4 --epochs 50
--dataset digits --final-epochs 30 --batch-size 128 --lr 0.03 --epochs 60 --left-out 20
--dataset friedman1 --final-lr 0.03 --batch-size 64 --lr 0.01 --epochs 200
--dataset friedman1 --batch-size 64 --optimizer adam --lr 1e-4 --epochs 60
--dataset wine --final-lr 0.01 --lr 0.01 --epochs 300
"""
"""What ``--suite`` runs, one line each, with the command line's own options after it."""


class SklearnData(TabularModule):
    """Data sets that no default was chosen on: ``friedman1`` (regression) or ``wine`` (classification)."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "regression" if name == "friedman1" else "classification", 32, 0.1, 0)

    def read(self) -> Table:
        if self.name == "wine":
            bunch = load_wine(as_frame=True)
            return Table(bunch.data, bunch.target)
        features, target = make_friedman1(600, 10, noise=1.0, random_state=0)
        return Table(pd.DataFrame(features).rename(columns=str), pd.Series(target, name="target"))


def load(a: argparse.Namespace) -> TabularModule:
    if a.dataset == "concrete":
        return ConcreteData(a.path)
    return SklearnData(a.dataset) if a.dataset in ("friedman1", "wine") else BundledData(a.dataset)


def main() -> None:
    a = arguments(sys.argv[1:])
    if not a.suite:
        return show(a)
    for line in SUITE.strip().splitlines():
        one = arguments([*line.split(), *(o for o in sys.argv[1:] if o != "--suite")])
        if one.dataset != "concrete" or one.path:
            show(one)


def show(a: argparse.Namespace) -> None:
    """Print one data set's table."""
    torch.set_num_threads(a.threads)
    data = load(a)
    data.setup()
    final_model = train_final_model(data, a.final_epochs, a.final_lr)
    train, test = data.train, data.test[evenly(len(data.test), a.tests)]
    protocol = Protocol(
        optimizer=a.optimizer, lr=a.lr, batch_size=a.batch_size or data.batch_size, epochs=a.epochs,
        leave_out=a.leave_out, momentum=a.momentum,
    )  # fmt: skip
    seeds, left_out = list(range(a.seeds)), evenly(len(train), a.left_out)
    followed = other_seeds(seeds) if a.follow_from is None else [a.follow_from + s for s in seeds]
    start, wall = time.process_time(), time.perf_counter()
    truth = further_train(
        final_model, train, test, protocol, seeds, left_out.tolist(),
        trainer={"enable_progress_bar": False},
    )  # fmt: skip
    gold, gold_wall = time.process_time() - start, time.perf_counter() - wall
    shown = [e for e in (1, 2, 5, 10, 20, 50, 100, 200, 300, 500) if e <= a.epochs]
    at = torch.tensor(shown) - 1
    ceilings = noise_ceilings(truth.raw, "cosine", seed_counts=[a.seeds])
    ceiling, lower = ceilings.upper[at, 0], ceilings.lower[at, 0]
    print(f"{a.dataset}, {a.optimizer} {a.lr}, batch {protocol.batch_size}, {a.leave_out}")
    print(f"N={len(train)}, L={len(left_out)}, J={len(test)}, S={a.seeds}")
    print(f"gold standard: {gold:.1f} s CPU, {gold_wall:.1f} s")
    print(f"followed: seeds {followed[0]} to {followed[-1]} ({relation(followed, seeds)})")
    print(f"{'epoch':20s} {'cost':>6s} " + " ".join(f"{e:>12d}" for e in shown))
    print(f"{'ceiling':20s} {'1':>6s} " + " ".join(f"{c:>12.3f}" for c in ceiling))
    again = " ".join(f"{v:6.3f} ({v / c:.2f})" for v, c in zip(lower, ceiling, strict=True))
    print(f"{'again':20s} {'1':>6s} {again}")
    few = max(1, a.seeds // 10)
    real = further_train(
        final_model, train, test, protocol, followed[:few], left_out.tolist(),
        trainer={"enable_progress_bar": False},
    )  # fmt: skip
    print_row("fewer seeds", few / a.seeds, real.raw.mean(0), truth, at, ceiling)
    ft = FurtherTraining(
        protocol, tuple(truth.step.tolist()), tuple(followed),
        lambda: full_runs(final_model, train, protocol, followed),
    )  # fmt: skip
    for name in a.methods:
        method = METHODS[name]()
        if reason := method.inapplicable(final_model, train):
            print(f"{name:20s} skipped: {reason}")
            continue
        start = time.process_time()
        scores = method.attribute(final_model, train, test, left_out, ft)
        cost = (time.process_time() - start) / gold
        print_row(name, cost, scores.values, truth, at, ceiling)
        for line in scores.notes:
            print(f"  {line}", flush=True)


def print_row(
    name: str, cost: float, scores: Tensor, truth: Sensitivity, at: Tensor, ceiling: Tensor
) -> None:
    """Print a method's agreement, and in brackets its share of the ceiling."""
    found = agreement(centred(scores), truth.sensitivity)[at].nanmean(1)
    row = " ".join(f"{v:6.3f} ({v / c:.2f})" for v, c in zip(found, ceiling, strict=True))
    print(f"{name:20s} {cost:6.3f} {row}", flush=True)


def centred(scores: Tensor) -> Tensor:
    """Subtract the mean over left-out instances, as the adjusted sensitivity does."""
    return scores - scores.mean(-1, keepdim=True)


def train_final_model(data: TabularModule, epochs: int, lr: float) -> FinalModel:
    """Train the paper's MLP by SGD."""
    torch.manual_seed(0)
    regression = data.task == "regression"
    network = mlp(data.train.inputs.shape[1], data.train.targets.shape[1] if regression else data.outputs)
    loss = mean_squared_error if regression else cross_entropy
    optimizer = torch.optim.SGD(network.parameters(), lr)
    for _ in range(epochs):
        order = torch.randperm(len(data.train))
        for start in range(0, len(order), data.batch_size):
            batch: Instances = data.train[order[start : start + data.batch_size]]
            optimizer.zero_grad()
            loss(network(batch.inputs), batch.targets).mean().backward()
            optimizer.step()
    return FinalModel(network, loss)


def evenly(total: int, count: int) -> Tensor:
    """Return at most ``count`` evenly spaced indices."""
    return torch.arange(min(count, total)) * total // min(count, total)


def arguments(words: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dataset",
        default="diabetes",
        choices=["diabetes", "breast_cancer", "digits", "concrete", "friedman1", "wine"],
    )
    p.add_argument("--path", help="concrete's file")
    p.add_argument("--final-epochs", type=int, default=100)
    p.add_argument("--final-lr", type=float, default=0.1)
    p.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--momentum", type=float, default=0.0)
    p.add_argument("--batch-size", type=int, help="the data set's when not given")
    p.add_argument("--leave-out", default="shift", choices=LEAVE_OUT_RULES)
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument(
        "--follow-from", type=int, help="first seed that methods follow; the next unused by default"
    )
    p.add_argument("--left-out", type=int, default=50)
    p.add_argument("--tests", type=int, default=50)
    p.add_argument("--threads", type=int, default=1)
    default = ["graddot", "exact", "exact_time_matched", "source", "response", "calibrated"]
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=default)
    p.add_argument("--suite", action="store_true", help="run the list of settings instead")
    return p.parse_args(words)


if __name__ == "__main__":
    main()
