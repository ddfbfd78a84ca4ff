"""Coverage of error bars: how often ``score ± sem`` contains the real leave-one-out effect.

    python benchmarks/error_bars.py                      # all settings, about 15 minutes on two cores
    python benchmarks/error_bars.py --path concrete.csv  # with the paper's first data set
    python benchmarks/error_bars.py --settings wine/adam diabetes/sgd --methods response
    python benchmarks/error_bars.py --models 3 --sets 2  # means over three final models

prints, for each data set, optimizer and method, and for raw scores and scores minus their mean over left-out
instances, at each amount of further training

    share within one standard error / within two, each with a mark

The truth is the mean over 60 seeds that no method followed; its own standard error is added in squares. Each
method follows several disjoint sets of seeds, and shares are means over them and over final models: an error
that all left-out instances share is a single draw in each. A normal error gives .68 / .95. Networks are small
MLPs, data at most 192 training instances.

A share is itself known only so far: its standard error is that of a mean over sets of seeds, test and left-
out instances at once (Cameron, Gelbach and Miller, 2011, without the interactions). A share within .68 ± .08
or .95 ± .04 has no mark, one outside by less than two standard errors "?", by more "!". Shares are of the
entries whose bar isn't withheld, where those are a quarter or more; "-" otherwise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from response import SklearnData, evenly
from torch import Tensor, nn

from fimo.data.bundled import BundledData
from fimo.data.concrete import ConcreteData
from fimo.data.instances import Instances
from fimo.data.tabular import TabularModule
from fimo.engine.protocol import Protocol
from fimo.further_training import evaluation_points, full_runs, further_train
from fimo.further_training.trajectory import FurtherTraining
from fimo.methods.best import Best
from fimo.methods.calibrated import CalibratedResponse
from fimo.methods.following import FollowingMethod
from fimo.methods.response import Response
from fimo.methods.unrolled import Unrolled
from fimo.models.final_model import FinalModel
from fimo.models.losses import cross_entropy, mean_squared_error

METHODS: dict[str, Callable[[], FollowingMethod]] = {
    "response": Response,
    "calibrated": CalibratedResponse,
    "best": Best,
    "unrolled": lambda: Unrolled(seeds=None),
}

SETS = {"response": 6, "calibrated": 6, "best": 3, "unrolled": 2}
"""Disjoint sets of seeds that a method follows."""

BAND = torch.tensor([[0.60, 0.76], [0.91, 0.99]], dtype=torch.float64)
"""Shares within one and within two standard errors that are right."""

FEWEST = 0.25
"""Of a cell's entries that have a bar, below which no share is given."""


@dataclass(frozen=True)
class Setting:
    """A final model and its further training.

    Args:
        final_epochs, final_lr: of the final model's training by SGD.
        lr, epochs: of further training, by optimizer.
    """

    final_epochs: int
    final_lr: float
    lr: dict[str, float]
    epochs: dict[str, int]


EPOCHS = {"sgd": 40, "adam": 20}
SETTINGS = {
    "diabetes": Setting(60, 0.01, {"sgd": 0.01, "adam": 1e-3}, EPOCHS),
    "wine": Setting(60, 0.03, {"sgd": 0.02, "adam": 1e-3}, EPOCHS),
    "friedman1": Setting(60, 0.03, {"sgd": 0.01, "adam": 1e-3}, EPOCHS),
    "breast_cancer": Setting(60, 0.03, {"sgd": 0.03, "adam": 1e-3}, EPOCHS),
    "digits": Setting(30, 0.05, {"sgd": 0.03, "adam": 1e-3}, EPOCHS),
    "concrete": Setting(200, 0.03, {"sgd": 0.03, "adam": 1e-3}, EPOCHS),
}
SHOWN = (1, 2, 5, 10, 20, 40)
"""Epochs."""

TRUTH = 60
"""Seeds of the truth."""


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    wanted = a.settings or [f"{d}/{o}" for d in SETTINGS for o in EPOCHS]
    found: dict[tuple[str, bool], list[Tensor]] = {}
    print(f"{'':34s}" + "".join(f"{f'epoch {e}':>14s}" for e in SHOWN) + f"{'withheld':>10s}")
    for name, optimizer in (setting.split("/") for setting in wanted):
        if name == "concrete" and not a.path:
            continue
        for (method, adjusted), table in show(a, name, optimizer).items():
            found.setdefault((method, adjusted), []).append(table)
    print("means over settings and amounts, and shares of these")
    for (method, adjusted), tables in found.items():
        every = torch.cat(tables)
        known = every[every[:, 0].isfinite()]
        right, unsure = marks(known)
        both = (right | unsure).all(1).double().mean()
        print(
            f"{method:12s}{'adjusted' if adjusted else 'raw':9s}"
            + "/".join(f"{x:.2f}" for x in known[:, :2].mean(0))
            + "; in .68 ± .08 and .95 ± .04: "
            + ", ".join(f"{x:.2f}" for x in right.double().mean(0))
            + f" (both {right.all(1).double().mean():.2f}); there or not surely outside: "
            + ", ".join(f"{x:.2f}" for x in (right | unsure).double().mean(0))
            + f" (both {both:.2f}); bars withheld: {every[:, 4].mean():.2f}, in {len(every) - len(known)} of"
            f" {len(every)} cells nearly all",
            flush=True,
        )


def show(a: argparse.Namespace, name: str, optimizer: str) -> dict[tuple[str, bool], Tensor]:
    """Print a setting's rows, and return them ``[points, 5]`` by method and whether scores are adjusted."""
    setting = SETTINGS[name]
    protocol = Protocol(
        optimizer=optimizer, lr=setting.lr[optimizer], batch_size=32, epochs=setting.epochs[optimizer]
    )
    points = [e - 1 for e in SHOWN if e <= setting.epochs[optimizer]]
    problems = [problem(a, name, setting, seed) for seed in range(a.models)]
    left_out = evenly(len(problems[0][1]), a.left_out)
    truths = [
        further_train(
            model, train, test, protocol, range(1000, 1000 + TRUTH), left_out.tolist(),
            trainer={"enable_progress_bar": False},
        ).raw.double()
        for model, train, test in problems
    ]  # fmt: skip
    rows: dict[tuple[str, bool], Tensor] = {}
    for method in a.methods:
        parts: dict[bool, list[Tensor]] = {False: [], True: []}
        start = time.perf_counter()
        for (model, train, test), truth in zip(problems, truths, strict=True):
            steps = tuple(map(int, evaluation_points(protocol, len(train))[0]))
            for k in range(a.sets or SETS[method]):
                seeds = tuple(range(k * a.seeds, (k + 1) * a.seeds))
                ft = FurtherTraining(
                    protocol, steps, seeds, lambda s=seeds, m=model, t=train: full_runs(m, t, protocol, s)
                )  # fmt: skip
                found = METHODS[method]().attribute(model, train, test, left_out, ft)
                scores = found.values.double()
                for adjusted, sem in ((False, found.sem), (True, found.sem_adjusted)):
                    sem = torch.full_like(scores, torch.nan) if sem is None else sem.double()
                    parts[adjusted].append(standardised(scores, sem, truth, adjusted)[points])
        for adjusted, errors in parts.items():
            table = coverage(torch.stack(errors, 1))
            rows[method, adjusted] = table
            right, unsure = marks(table)
            sign = [["" if r else "?" if u else "!" for r, u in zip(*pair, strict=True)] for pair in
                    zip(right.tolist(), unsure.tolist(), strict=True)]  # fmt: skip
            cells = "".join(
                f"{f'{one:.2f}{a}/{two:.2f}{b}' if one == one else '-':>14s}"
                for (one, two, *_), (a, b) in zip(table.tolist(), sign, strict=True)
            )
            label = f"{name} {optimizer}"
            print(
                f"{label:19s}{method:11s}{'adj' if adjusted else 'raw':4s}{cells}"
                f"{'':{14 * (len(SHOWN) - len(points))}s}{table[:, 4].mean():10.2f}"
                f" {time.perf_counter() - start:5.0f} s",
                flush=True,
            )
    return rows


def standardised(scores: Tensor, sem: Tensor, truth: Tensor, adjusted: bool) -> Tensor:
    """Return errors in units of their standard errors ``[E, J, L]``.

    Args:
        scores, sem: ``[E, J, L]``.
        truth: ``[S, E, J, L]``, raw changes of seeds that were not followed.
    """
    if adjusted:
        scores, truth = (x - x.mean(-1, keepdim=True) for x in (scores, truth))
    return (scores - truth.mean(0)) / (sem.square() + truth.var(0) / len(truth)).sqrt()


def coverage(errors: Tensor) -> Tensor:
    """Return shares within one and two standard errors, both shares' standard errors, and that withheld.

    Args:
        errors: ``[E, K, J, L]``, standardised, of K sets of seeds; NaN where a bar is withheld.

    Returns:
        ``[E, 5]``
    """
    known = ~errors.isnan()
    columns = []
    for k in (1, 2):
        inside = (errors.abs() <= k).double()
        share = (inside * known).sum((1, 2, 3)) / known.sum((1, 2, 3))
        off = torch.where(known, inside - share[:, None, None, None], 0.0)
        variance = torch.zeros_like(share)
        for axis in (1, 2, 3):
            others = tuple(x for x in (1, 2, 3) if x != axis)
            n = errors.shape[axis]
            variance += off.sum(others).square().sum(1) / known.sum((1, 2, 3)) ** 2 * n / max(n - 1, 1)
        columns.append(torch.stack([share, variance.sqrt()], 1))
    withheld = 1 - known.double().mean((1, 2, 3))
    both = torch.stack(columns, 2).flatten(1)  # share 1, share 2, error 1, error 2
    both[withheld > 1 - FEWEST] = torch.nan
    return torch.cat([both, withheld[:, None]], 1)


def marks(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return which shares of ``[n, 5]`` are in their band, and which others may be: two of ``[n, 2]``."""
    shares, errors = table[:, :2], table[:, 2:4]
    outside = (BAND[:, 0] - shares).maximum(shares - BAND[:, 1])
    return outside <= 1e-9, (outside > 1e-9) & (outside <= 2 * errors)


def problem(
    a: argparse.Namespace, name: str, setting: Setting, seed: int
) -> tuple[FinalModel, Instances, Instances]:
    """Return a small final model of a seed, at most 192 training and 16 test instances."""
    data: TabularModule
    if name == "concrete":
        data = ConcreteData(a.path)
    else:
        data = SklearnData(name) if name in ("friedman1", "wine") else BundledData(name)
    data.setup()
    train, test = data.train[evenly(len(data.train), 192)], data.test[evenly(len(data.test), 16)]
    regression = data.task == "regression"
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(train.inputs.shape[1], 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
        nn.Linear(24, train.targets.shape[1] if regression else data.outputs),
    )  # fmt: skip
    loss = mean_squared_error if regression else cross_entropy
    optimizer = torch.optim.SGD(network.parameters(), setting.final_lr)
    for _ in range(setting.final_epochs):
        for batch in torch.randperm(len(train)).split(32):
            optimizer.zero_grad()
            loss(network(train[batch].inputs), train[batch].targets).mean().backward()
            optimizer.step()
    return FinalModel(network, loss), train, test


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--settings", nargs="+", help="DATASET/OPTIMIZER; all when not given")
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    p.add_argument("--path", help="concrete's file, which is left out otherwise")
    p.add_argument("--seeds", type=int, default=10, help="that a method follows")
    p.add_argument("--sets", type=int, help="of seeds, of every method")
    p.add_argument("--models", type=int, default=1, help="final models, of seeds 0, 1, ...")
    p.add_argument("--left-out", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


if __name__ == "__main__":
    main()
