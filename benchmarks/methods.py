"""Attribution methods beside their peers (dattri 0.3.0, kronfluence 1.0.1): seconds, ratio, rank correlation.

    python benchmarks/methods.py --peers PYTHON [--only datainf,ekfac] [--growth]

PYTHON is the interpreter of an environment with the peers:

    python -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/pip install --no-deps dattri==0.3.0 kronfluence==1.0.1
    peers/bin/pip install numpy accelerate einops einconv opt-einsum pyyaml tqdm scikit-learn safetensors

(kronfluence declares torchvision but never imports it.) Both sides get the same model, data and damping, one
after the other on the same machine; only the ratio of two neighbours is to be trusted. Without --peers the
table has fimo's own times.

Where scores differ: dattri's CG and LiSSA use the Hessian, ours (but lissa_h) Gauss-Newton. On a small case
(N=150, width 16) its CG equals a dense solve with the Hessian (rank correlation 1.000), its LiSSA, 200 steps
with a scale of 50, is nearly Grad-Dot (0.97), and its Arnoldi gives scores that are not finite (nan here).
There kronfluence, which samples targets, agrees with our exact factors as well (0.92) as our own sampling
does. At the default size CG agrees less (0.73): its 10 iterations may not have converged, which is unchecked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DAMPING = 1.0
"""Large enough for the Hessian, which dattri uses, to be positive and for its 10 iterations to converge."""

PAIRS = {
    "datainf": "dattri DataInf",
    "cg": "dattri CG (10 iterations)",
    "lissa": "dattri LiSSA (200 deep)",
    "lissa_h": "dattri LiSSA (200 deep)",
    "arnoldi": "dattri Arnoldi",
    "ekfac": "kronfluence EK-FAC",
    "graddot": "vmap Gram matrix",
}


def network(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )


def example(n: int, j: int, inputs: int, width: int) -> dict[str, Any]:
    """Return a trained regression with its data."""
    torch.manual_seed(0)
    x = torch.randn(n + j, inputs)
    y = (x @ torch.randn(inputs, 3)).sin().sum(1, keepdim=True) + 0.3 * torch.randn(n + j, 1)
    model = network(inputs, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x[:n]) - y[:n]).square().mean().backward()
        optimizer.step()
    return {"state": model.state_dict(), "x": x, "y": y, "n": n, "inputs": inputs, "width": width}


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found.detach()


def ours(data: dict[str, Any], name: str, repeats: int = 2) -> tuple[float, Tensor]:
    """Return the best time of a fimo method and its scores ``[J, N]``."""
    from fimo.data.instances import Instances
    from fimo.methods.arnoldi import Arnoldi
    from fimo.methods.cg import ConjugateGradients
    from fimo.methods.datainf import DataInf
    from fimo.methods.ekfac import Ekfac
    from fimo.methods.exact import ExactInfluence
    from fimo.methods.graddot import GradDot
    from fimo.methods.lissa import Lissa, LissaHessian
    from fimo.methods.trak import Trak
    from fimo.models.final_model import FinalModel
    from fimo.models.losses import mean_squared_error

    make: dict[str, Callable[[], Any]] = {
        "graddot": GradDot,
        "datainf": lambda: DataInf(DAMPING),
        "exact": lambda: ExactInfluence(DAMPING),
        "cg": lambda: ConjugateGradients(DAMPING),
        "lissa": lambda: Lissa(DAMPING, depth=20000),
        "lissa_h": lambda: LissaHessian(depth=200),
        "ekfac": Ekfac,
        "arnoldi": lambda: Arnoldi(100, 100, DAMPING),
        "trak": Trak,
    }
    model = network(data["inputs"], data["width"])
    model.load_state_dict(data["state"])
    final, n = FinalModel(model, mean_squared_error), data["n"]
    train, test = Instances(data["x"][:n], data["y"][:n]), Instances(data["x"][n:], data["y"][n:])
    runs = [timed(lambda: make[name]().attribute(final, train, test)) for _ in range(repeats)]
    return min(t for t, _ in runs), runs[0][1]


def plain_gram(data: dict[str, Any]) -> tuple[float, Tensor]:
    """Return the time of a Gram matrix of gradients by vmap, all in memory."""
    model = network(data["inputs"], data["width"])
    model.load_state_dict(data["state"])
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (torch.func.functional_call(model, p, (x,)) - y).square().mean()

    gradient = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> Tensor:
        found = gradient(parameters, data["x"], data["y"])
        rows = torch.cat([g.flatten(1) for g in found.values()], 1)
        return rows[data["n"] :] @ rows[: data["n"]].T

    return min((timed(run) for _ in range(2)), key=lambda pair: pair[0])


def peer(folder: Path, names: list[str]) -> None:
    """Run inside the peers' environment: write each peer's time and scores ``[J, N]``."""
    data = torch.load(folder / "data.pt", weights_only=False)
    model = network(data["inputs"], data["width"])
    model.load_state_dict(data["state"])
    n = data["n"]
    train = torch.utils.data.TensorDataset(data["x"][:n], data["y"][:n])
    test = torch.utils.data.TensorDataset(data["x"][n:], data["y"][n:])
    for name in names:
        run = _kronfluence if name.startswith("kronfluence") else _dattri
        seconds, scores = timed(lambda run=run, name=name: run(name, model, train, test, folder))
        torch.save((seconds, scores), folder / f"{name}.pt")
        print(json.dumps({"peer": name, "seconds": seconds}), flush=True)


def _dattri(name: str, model: nn.Module, train: Any, test: Any, folder: Path) -> Tensor:
    from dattri.algorithm.influence_function import (
        IFAttributorArnoldi,
        IFAttributorCG,
        IFAttributorDataInf,
        IFAttributorLiSSA,
    )
    from dattri.task import AttributionTask

    def loss(parameters: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return (torch.func.functional_call(model, parameters, (pair[0],)) - pair[1]).square().mean()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = {
        "dattri DataInf": lambda: IFAttributorDataInf(task, regularization=DAMPING),
        "dattri CG (10 iterations)": lambda: IFAttributorCG(task, max_iter=10, regularization=DAMPING),
        "dattri LiSSA (200 deep)": lambda: IFAttributorLiSSA(
            task, recursion_depth=200, batch_size=32, damping=DAMPING, scaling=50.0
        ),
        "dattri Arnoldi": lambda: IFAttributorArnoldi(
            task, proj_dim=100, max_iter=100, regularization=DAMPING
        ),
    }[name]()
    loader = torch.utils.data.DataLoader(train, batch_size=len(train))
    queries = torch.utils.data.DataLoader(test, batch_size=len(test))
    attributor.cache(loader)
    return attributor.attribute(loader, queries).T


def _kronfluence(name: str, model: nn.Module, train: Any, test: Any, folder: Path) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Regression(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0])
            # the variance for which the Fisher is the Gauss-Newton matrix of the squared error
            targets = (outputs + 0.5**0.5 * torch.randn_like(outputs)).detach() if sample else batch[1]
            return (outputs - targets).square().sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return (model(batch[0]) - batch[1]).square().sum()

    task = Regression()
    analyzer = Analyzer("benchmark", prepare_model(model, task), task, cpu=True, output_dir=str(folder))
    analyzer.fit_all_factors("factors", train, per_device_batch_size=len(train), overwrite_output_dir=True)
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query_dataset=test,
        train_dataset=train,
        per_device_query_batch_size=len(test),
        per_device_train_batch_size=len(train),
        score_args=ScoreArguments(damping_factor=None),  # 0.1 mean eigenvalues, as ours; its default is 1e-8
        overwrite_output_dir=True,
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return the mean over test instances of Spearman's correlation across training instances."""
    ranks = [x.argsort(1).argsort(1).double() for x in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    return nn.functional.cosine_similarity(*centred).mean().item()


def compare(data: dict[str, Any], names: list[str], peers: str | None) -> None:
    found: dict[str, tuple[float, Tensor]] = {"vmap Gram matrix": plain_gram(data)}
    print(f"{'method':10} {'seconds':>9}  {'peer':28} {'seconds':>9} {'ratio':>8} {'rank corr.':>10}")
    for name in names:
        other = PAIRS.get(name, "")
        if peers and other not in found and other:
            with tempfile.TemporaryDirectory() as folder:
                torch.save(data, Path(folder) / "data.pt")
                command = [peers, __file__, "--peer", folder, "--only", other]
                done = subprocess.run(command, capture_output=True, text=True)
                path = Path(folder) / f"{other}.pt"
                if path.exists():
                    found[other] = torch.load(path, weights_only=True)
                else:
                    print(f"{other} failed: {done.stderr.strip().splitlines()[-1:]}")
        seconds, scores = ours(data, name)
        line = f"{name:10} {seconds:9.4f}"
        if other in found:
            theirs, values = found[other]
            finite = bool(values.isfinite().all())
            correlation = rank_correlation(scores, values) if finite else float("nan")
            line += f"  {other:28} {theirs:9.3f} {theirs / seconds:8.1f} {correlation:10.3f}"
        print(line, flush=True)


def growth(names: list[str]) -> None:
    """Print times as N, J and P grow, each alone."""
    base = {"n": 691, "j": 77, "inputs": 8, "width": 128}
    steps = {"n": [345, 691, 1382], "j": [38, 77, 154], "width": [64, 128, 256]}
    for name, (axis, values) in itertools.product(names, steps.items()):
        times = [ours(example(**{**base, axis: v}), name)[0] for v in values]
        print(
            f"{name:10} {axis:6}", *(f"{v}: {t:.4f}s" for v, t in zip(values, times, strict=True)), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="python of an environment with dattri and kronfluence")
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--growth", action="store_true", help="times as N, J and P grow")
    parser.add_argument("--sizes", default="691,77,8,128", help="N,J,inputs,width")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer, [arguments.only])
        return
    names = arguments.only.split(",") if arguments.only else [*PAIRS, "exact", "trak"]
    if arguments.growth:
        growth(names)
        return
    sizes = dict(zip(("n", "j", "inputs", "width"), map(int, arguments.sizes.split(",")), strict=True))
    print(f"{sizes}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare(example(**sizes), names, arguments.peers)


if __name__ == "__main__":
    sys.exit(main())
