"""How near the ceiling methods stay as further training grows, and at what part of the gold standard's cost.

    python benchmarks/response.py --dataset diabetes --optimizer sgd --lr 0.01 --epochs 50

prints, per method, the agreement (cosine and Spearman's, means over test instances) at a few epochs, its
ratio to the upper noise ceiling in brackets, and what it took relative to the gold standard: gradients of
instances, and seconds. The final model is trained first. ``again`` is the lower ceiling: what the gold
standard made again with as many other seeds would show. Methods follow as many seeds of their own, which the
gold standard does not use, and ``fewer seeds`` is real runs of all left-out instances with a tenth as many of
these; ``--followed own`` takes the gold standard's seeds, whose noise both then know.

    python benchmarks/response.py --suite --data FOLDER --models 5 --save shares.csv
    python benchmarks/response.py --tables shares.csv

does so for a list of data sets, optimizers and amounts of further training and for several final models, and
prints means over these with their standard errors (docs/measurements.md). FOLDER has the files of concrete,
wine quality and the power plant (``concrete/concrete.txt``, ...); without it they are left out. Settings and
final models may be shared among processes (``--part 0/4``), which append to one file.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.datasets import load_wine, make_friedman1
from torch import Tensor

from fimo.data.bundled import BundledData
from fimo.data.concrete import ConcreteData
from fimo.data.csv import CsvData
from fimo.data.instances import Instances
from fimo.data.tabular import Table, TabularModule
from fimo.engine.protocol import Protocol
from fimo.engine.settings import LEAVE_OUT_RULES, OPTIMIZERS
from fimo.evaluation import agreement, noise_ceilings
from fimo.evaluation.metrics import MetricName
from fimo.further_training import full_runs, further_train, other_seeds
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
--dataset concrete --final-epochs 1000 --batch-size 128 --optimizer adam --lr 1e-4 --epochs 500
--dataset breast_cancer --batch-size 128 --lr 0.03 --epochs 500
--dataset breast_cancer --batch-size 128 --optimizer adam --lr 1e-4 --epochs 500
--dataset diabetes --final-lr 0.01 --batch-size 64 --lr 0.01 --epochs 500
--dataset diabetes --final-lr 0.01 --batch-size 64 --optimizer adam --lr 1e-4 --epochs 500
--dataset friedman1 --final-lr 0.03 --batch-size 64 --lr 0.01 --epochs 500
--dataset friedman1 --final-lr 0.03 --batch-size 64 --optimizer adam --lr 1e-4 --epochs 500
--dataset wine_quality --final-lr 0.03 --batch-size 128 --lr 0.01 --epochs 500
--dataset wine_quality --final-lr 0.03 --batch-size 128 --optimizer adam --lr 1e-4 --epochs 500
--dataset power_plant --final-lr 0.03 --batch-size 128 --lr 0.01 --epochs 500
--dataset power_plant --final-lr 0.03 --batch-size 128 --optimizer adam --lr 1e-4 --epochs 500
"""
"""What ``--suite`` runs, one line each, with the command line's own options after it."""

FILES = {
    "concrete": "concrete/concrete.txt",
    "wine_quality": "wine/wine_quality_red.txt",
    "power_plant": "power_plant/power_plant.txt",
}
"""Of data sets, in the folder ``--data``."""

MOST = 1000
"""Training instances, evenly spaced ones where there are more."""

SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500)
"""Epochs."""

METRICS: tuple[MetricName, ...] = ("cosine", "spearman")


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
    if a.dataset in FILES:
        path = Path(a.data, FILES[a.dataset])
        if a.dataset == "concrete":
            return ConcreteData(path)
        return CsvData(path, task="regression", header=False)
    return SklearnData(a.dataset) if a.dataset in ("friedman1", "wine") else BundledData(a.dataset)


def main() -> None:
    a = arguments(sys.argv[1:])
    if a.tables:
        return print(tables(pd.concat(map(pd.read_csv, a.tables))))
    own = [o for o in sys.argv[1:] if o != "--suite"]
    lines = SUITE.strip().splitlines() if a.suite else [""]
    jobs = [arguments([*line.split(), *own]) for line in lines]
    jobs = [job for job in jobs if job.data or job.dataset not in FILES]
    part, parts = map(int, a.part.split("/"))
    for job, seed in [(job, seed) for seed in range(a.models) for job in jobs][part::parts]:
        rows = show(job, seed)
        if a.save:
            new = not Path(a.save).exists()
            rows.to_csv(a.save, mode="a", header=new, index=False)


def show(a: argparse.Namespace, final_seed: int) -> pd.DataFrame:
    """Print one final model's table, and return it."""
    torch.set_num_threads(a.threads)
    data = load(a)
    data.setup()
    train, test = data.train[evenly(len(data.train), MOST)], data.test[evenly(len(data.test), a.tests)]
    final_model = train_final_model(data, train, a.final_epochs, a.final_lr, final_seed)
    protocol = Protocol(
        optimizer=a.optimizer, lr=a.lr, batch_size=a.batch_size or data.batch_size, epochs=a.epochs,
        leave_out=a.leave_out, momentum=a.momentum,
    )  # fmt: skip
    seeds, left_out = list(range(a.seeds)), evenly(len(train), a.left_out)
    others = other_seeds(seeds)
    trainer = {"enable_progress_bar": False, "accelerator": a.accelerator}
    # the first call on a GPU also starts it
    further_train(final_model, train, test, replace(protocol, epochs=1), [0], [0], trainer=trainer)
    start = time.perf_counter()
    truth = further_train(final_model, train, test, protocol, seeds, left_out.tolist(), trainer=trainer)
    gold = time.perf_counter() - start
    gradients = len(seeds) * (len(left_out) + 1) * protocol.run_gradients(len(train))
    shown = [e for e in SHOWN if e <= a.epochs]
    at = torch.tensor(shown) - 1
    ceilings = {m: noise_ceilings(truth.raw, m, seed_counts=[a.seeds]) for m in METRICS}
    print(
        f"{a.dataset}, {a.optimizer} {a.lr}, batch {protocol.batch_size}, {a.leave_out}, model {final_seed}"
    )
    print(f"N={len(train)}, L={len(left_out)}, J={len(test)}, S={a.seeds}; gold standard: {gold:.1f} s")
    rows: list[dict[str, Any]] = []

    def record(
        method: str, followed: str, metric: str, share: Tensor, cost: float = 1.0, seconds: float = 1.0
    ) -> None:
        facts = {
            "dataset": a.dataset, "optimizer": a.optimizer, "model": final_seed, "method": method,
            "followed": followed, "metric": metric, "cost": cost, "seconds": seconds,
        }  # fmt: skip
        rows.extend(facts | {"epoch": e, "share": s} for e, s in zip(shown, share.tolist(), strict=True))

    def add(method: str, followed: str, values: Tensor, cost: float, seconds: float) -> None:
        for metric in METRICS:
            found = agreement(centred(values), truth.sensitivity, metric)[at].nanmean(1)
            share = found / ceilings[metric].upper[at, 0]
            record(method, followed, metric, share, cost, seconds / gold)
            print(f"{method:20s}{followed:6s}{metric:9s}{cost:6.3f} {seconds / gold:6.3f} "
                  + " ".join(f"{v:6.3f} ({s:.2f})" for v, s in zip(found, share, strict=True)),
                  flush=True)  # fmt: skip

    for metric, one in ceilings.items():
        upper, lower = one.upper[at, 0], one.lower[at, 0]
        for method, share in (("ceiling", upper), ("again", lower / upper)):
            record(method, "-", metric, share)
            print(f"{method:26s}{metric:9s}" + " ".join(f"{x:.3f}" for x in share), flush=True)
    few = max(1, a.seeds // 10)
    start = time.perf_counter()
    real = further_train(
        final_model, train, test, protocol, others[:few], left_out.tolist(),
        trainer={"enable_progress_bar": False},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if a.accelerator != "cpu":  # where methods run
        gold = seconds * a.seeds / few
    add("fewer seeds", "other", real.raw.mean(0), few / a.seeds, seconds)
    for followed, which in ((others, "other"), (seeds, "own")):
        if which not in a.followed:
            continue
        ft = FurtherTraining(
            protocol, tuple(truth.step.tolist()), tuple(followed),
            lambda s=followed: full_runs(final_model, train, protocol, s),
        )  # fmt: skip
        for name in a.methods:
            method = METHODS[name]()
            if reason := method.inapplicable(final_model, train):
                print(f"{name:20s} skipped: {reason}")
                continue
            start = time.perf_counter()
            scores = method.attribute(final_model, train, test, left_out, ft)
            seconds = time.perf_counter() - start
            add(name, which, scores.values, scores.gradient_evaluations / gradients, seconds)
            for line in scores.notes:
                print(f"  {line}", flush=True)
    return pd.DataFrame(rows)


def tables(rows: pd.DataFrame) -> str:
    """Return a table for each metric: mean shares of the ceiling ± standard error over final models."""
    keys = ["dataset", "optimizer", "method", "followed"]
    found = []
    for metric, of_metric in rows.groupby("metric", sort=False):
        shares = of_metric.groupby([*keys, "epoch"], sort=False)["share"].agg(["mean", "sem"])
        models = of_metric.groupby(keys, sort=False)[["model", "cost", "seconds"]]
        facts = models.agg({"model": "nunique", "cost": "mean", "seconds": "median"})
        epochs = sorted(of_metric["epoch"].unique())
        lines = [
            f"{metric}, share of the upper ceiling (of `ceiling`: itself), mean ± standard error",
            "| data, optimizer | method | seeds | "
            + " | ".join(map(str, epochs))
            + " | gradients | seconds |",
            "|---|---|---|" + "---|" * len(epochs) + "---|---|",
        ]
        for key, one in facts.iterrows():
            dataset, optimizer, method, followed = key
            of_key = shares.loc[key].reindex(epochs)
            cells = [
                "-" if math.isnan(mean) else f"{mean:.2f}" if math.isnan(sem) else f"{mean:.2f} ± {sem:.2f}"
                for mean, sem in zip(of_key["mean"], of_key["sem"], strict=True)
            ]
            lines.append(
                f"| {dataset}, {optimizer} ({one['model']:.0f}) | {method} | {followed} | "
                + " | ".join(cells) + f" | {one['cost']:.2f} | {one['seconds']:.2f} |"
            )  # fmt: skip
        found.append("\n".join(lines))
    return "\n\n".join(found)


def centred(scores: Tensor) -> Tensor:
    """Subtract the mean over left-out instances, as the adjusted sensitivity does."""
    return scores - scores.mean(-1, keepdim=True)


def train_final_model(
    data: TabularModule, train: Instances, epochs: int, lr: float, seed: int = 0
) -> FinalModel:
    """Train the paper's MLP by SGD."""
    torch.manual_seed(seed)
    regression = data.task == "regression"
    network = mlp(train.inputs.shape[1], train.targets.shape[1] if regression else data.outputs)
    loss = mean_squared_error if regression else cross_entropy
    optimizer = torch.optim.SGD(network.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(train)).split(data.batch_size):
            optimizer.zero_grad()
            loss(network(train[batch].inputs), train[batch].targets).mean().backward()
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
        choices=["diabetes", "breast_cancer", "digits", "friedman1", "wine", *FILES],
    )
    p.add_argument("--data", help="folder of the files of concrete, wine quality and the power plant")
    p.add_argument("--models", type=int, default=1, help="final models, of seeds 0, 1, ...")
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
        "--followed", nargs="+", choices=["other", "own"], default=["other"],
        help="seeds that methods follow: others, or the gold standard's own, whose noise both then know",
    )  # fmt: skip
    p.add_argument("--left-out", type=int, default=50)
    p.add_argument("--tests", type=int, default=50)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument(
        "--accelerator",
        default="cpu",
        help="of the gold standard's runs, such as gpu; seconds are relative to the CPU's",
    )
    default = ["graddot", "exact", "exact_time_matched", "source", "response", "calibrated"]
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=default)
    p.add_argument("--suite", action="store_true", help="run the list of settings instead")
    p.add_argument("--part", default="0/1", help="K/N: every N-th of them, from the K-th")
    p.add_argument("--save", help="CSV file to append to")
    p.add_argument("--tables", nargs="+", help="CSV files to print the means of, and run nothing")
    return p.parse_args(words)


if __name__ == "__main__":
    main()
