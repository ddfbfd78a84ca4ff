"""How near the noise ceilings' estimates come to what they estimate, where the truth is known.

    python benchmarks/ceiling.py

draws sensitivities of known signal and noise, and prints for each kind of both, metric and number of seeds S

- ``truth``: the agreement that the noiseless sensitivity really shows with the mean over S seeds, and by how
  much the upper ceiling differs from it;
- ``again``: the agreement that the mean over S other seeds really shows, and by how much the lower ceiling
  differs from it;

``--real`` does the same for the further training of small networks with ``--pool`` seeds, of which S are
taken at random many times; the others' mean, corrected for its own noise, stands for the truth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fimo.evaluation import METRICS, agreement
from fimo.evaluation.ceiling import noise_ceilings
from fimo.evaluation.metrics import MetricName
from fimo.further_training.sensitivity import adjust

SEEDS = (2, 3, 4, 5, 10, 20)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def heavy(freedom: float) -> Callable[..., Tensor]:
    return lambda *shape: torch.distributions.StudentT(freedom).sample(shape)


def alike(size: float) -> Callable[[Tensor], Tensor]:
    return lambda truth: torch.full((1, 1), size)


def mixed(truth: Tensor) -> Tensor:
    """Noise of .3 to 10 times the signal, another for each test instance."""
    return torch.exp(torch.empty(len(truth), 1).uniform_(-1.2, 2.3))


def uneven(truth: Tensor) -> Tensor:
    """Noise of another size for each left-out instance, more for larger effects, as in real runs."""
    return torch.exp(0.4 * torch.randn(truth.shape[-1])) * (0.5 + 0.5 * truth.abs())


def scaled(truth: Tensor, seeds: int) -> Tensor:
    """The whole effect of another size with each seed, as where some seeds move much further than others."""
    size = torch.exp(torch.randn(seeds, 1, 1))
    return truth * size / math.exp(0.5)


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], Callable[..., Tensor], bool]] = {
    "noise .3": (normal, alike(0.3), normal, False),
    "noise 1": (normal, alike(1.0), normal, False),
    "noise 3": (normal, alike(3.0), normal, False),
    "noise 10": (normal, alike(10.0), normal, False),
    "no signal": (torch.zeros, alike(1.0), normal, False),
    "mixed .3 to 10": (normal, mixed, normal, False),
    "uneven": (normal, uneven, normal, False),
    "heavy truth, noise 3": (heavy(2.5), alike(3.0), normal, False),
    "heavy noise 1": (normal, alike(1.0), heavy(2.2), False),
    "heavy noise 3": (normal, alike(3.0), heavy(2.2), False),
    "scaled, noise .3": (normal, alike(0.3), normal, False),
    "scaled, noise 3": (normal, alike(3.0), normal, False),
    "shared, raw": (normal, alike(1.0), normal, True),
}
"""Truth, size of noise, its distribution, and whether the full run's noise is shared and not subtracted."""


def simulate(kind: str, metric: MetricName, seeds: int, tests: int, left_out: int) -> list[float]:
    """Return ``truth, upper, again, lower`` of one draw, means over test instances."""
    draw_truth, size, draw_noise, raw_change = KINDS[kind]
    truth = draw_truth(tests, left_out)
    noise = size(truth) * draw_noise(2 * seeds, tests, left_out)
    if kind.startswith("scaled"):
        noise = noise + scaled(truth, 2 * seeds) - truth
    if raw_change:
        noise = noise + 3 * torch.randn(2 * seeds, tests, 1)
    raw = (truth + noise)[:, None]
    mean, other = (adjust(part.mean(0), not raw_change) for part in raw.split(seeds))
    found = noise_ceilings(raw[:seeds], metric, not raw_change, [seeds])
    real = agreement(adjust(truth, not raw_change), mean, metric).nan_to_num(0)  # no signal: no agreement
    again = agreement(other[0], mean, metric)
    return [real.mean().item(), found.upper.item(), again.mean().item(), found.lower.item()]


def measure(raw: Tensor, metric: MetricName, seeds: int) -> list[float]:
    """Return the same for S random seeds of a pool ``[S', 1, J, L]``."""
    order = torch.randperm(len(raw))
    mean, other, rest = (
        adjust(raw[order[a:b]].mean(0)) for a, b in ((0, seeds), (seeds, 2 * seeds), (seeds, len(raw)))
    )
    halves = [adjust(part.mean(0)) for part in raw[order[seeds:]].split(-(-(len(raw) - seeds) // 2))]
    half = agreement(halves[0][0], halves[1], metric).nanmean()
    own = (2 * half / (1 + half)).sqrt()  # of the rest with the truth
    found = noise_ceilings(raw[order[:seeds]], metric, True, [seeds])
    return [
        (agreement(rest[0], mean, metric).nanmean() / own).item(),
        found.upper.item(),
        agreement(other[0], mean, metric).nanmean().item(),
        found.lower.item(),
    ]


def real_pools(count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield raw changes ``[S', 1, J, L]`` of two data sets after 1, 5 and 20 epochs."""
    from sklearn.datasets import load_diabetes, make_friedman1

    from fimo.data.instances import Instances
    from fimo.further_training import Protocol, further_train
    from fimo.models.final_model import FinalModel
    from fimo.models.losses import mean_squared_error
    from fimo.models.mlp import mlp

    data: dict[str, Any] = {
        "diabetes": load_diabetes(return_X_y=True),
        "friedman1": make_friedman1(300, 10, noise=1.0, random_state=0),
    }
    for name, (inputs, targets) in data.items():
        x, y = (torch.as_tensor(v, dtype=torch.float32).reshape(len(inputs), -1) for v in (inputs, targets))
        x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y))
        train, test = Instances(x[:200], y[:200]), Instances(x[200:230], y[200:230])
        torch.manual_seed(0)
        network = mlp(x.shape[1], 1, (24, 24))
        optimizer = torch.optim.SGD(network.parameters(), 0.02)
        for _ in range(100):
            for batch in torch.randperm(200).split(32):
                optimizer.zero_grad()
                mean_squared_error(network(train.inputs[batch]), train.targets[batch]).mean().backward()
                optimizer.step()
        protocol = Protocol(lr=0.01, batch_size=32, epochs=20)
        found = further_train(
            FinalModel(network, mean_squared_error), train, test, protocol, range(count), range(0, 200, 7),
            trainer={"enable_progress_bar": False},
        )  # fmt: skip
        for epoch in (1, 5, 20):
            yield f"{name}, {epoch} epochs", found.raw[:, [epoch - 1]]


def show(name: str, metric: str, seeds: int, draws: list[list[float]]) -> None:
    values = torch.tensor(draws, dtype=torch.float64)
    truth, upper, again, lower = values.mean(0).tolist()
    spread = (values[:, 1] - values[:, 0]).std().item() if len(draws) > 1 else math.nan
    print(
        f"{name:22s} {metric:9s} {seeds:3d}   {truth:6.3f} {upper - truth:+7.3f} ± {spread:.3f}"
        f"   {again:6.3f} {lower - again:+7.3f}",
        flush=True,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tests", type=int, default=100, help="test instances of a draw")
    p.add_argument("--left-out", type=int, default=30)
    p.add_argument("--draws", type=int, default=20)
    p.add_argument("--real", action="store_true")
    p.add_argument("--pool", type=int, default=120, help="seeds of real data")
    p.add_argument("--kinds", nargs="+", choices=KINDS)
    p.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    a = p.parse_args()
    torch.set_num_threads(1)
    head = ("metric", "S", "truth", "upper", "sd", "again", "lower")
    print("{:32s} {:>3s}   {:>6s} {:>7s}   {:5s}   {:>6s} {:>7s}".format(" " * 23 + head[0], *head[1:]))
    if a.real:
        for name, raw in real_pools(a.pool):
            for metric in a.metrics:
                for seeds in (s for s in SEEDS if 4 * s <= a.pool):
                    torch.manual_seed(0)
                    show(name, metric, seeds, [measure(raw, metric, seeds) for _ in range(a.draws)])
        return
    for kind in a.kinds or KINDS:
        for metric in a.metrics:
            for seeds in SEEDS:
                torch.manual_seed(0)
                draws = [simulate(kind, metric, seeds, a.tests, a.left_out) for _ in range(a.draws)]
                show(kind, metric, seeds, draws)


if __name__ == "__main__":
    main()
