"""Attribution methods beside their peers (dattri 0.3.0, kronfluence 1.0.1): seconds, ratio, rank correlation.

    python benchmarks/methods.py --peers PYTHON [--only datainf,ekfac] [--growth]

PYTHON is the interpreter of an environment with the peers:

    python -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/pip install --no-deps dattri==0.3.0 kronfluence==1.0.1
    peers/bin/pip install numpy accelerate einops einconv opt-einsum pyyaml tqdm scikit-learn safetensors

(kronfluence declares torchvision but never imports it.) Both sides get the same model, data and damping, one
thread each, one after the other; times are CPU seconds of one process. Without --peers the table has fimo's
own times.

Measured at the default size on a busy machine: DataInf 238, CG 79, Arnoldi 135, LiSSA (Gauss-Newton) 108,
EK-FAC 23 and Grad-Dot 36 times faster than the peer; LiSSA with the Hessian, which is what dattri computes,
14 to 16 times (.93 to .97 s against 13.2 to 15.2 s), and 2.6 times where the same 200 steps on batches of
32 are taken. Ours is five products of the Hessian with 77 vectors in a block Krylov space, .08 s each where
automatic differentiation takes .28 (Gauss-Newton by rows, .05 to .06, and what is left of it summed over the
instances once; .24 for smooth or deeper networks), and as much again for the Krylov basis. A residual falls
eightfold with each product; leaving out directions below the tolerance would save half a product. 50 times
would need all of it in .29 s. Its time does not depend on the depth; dattri's is 200 products with a batch of
its own for every test instance, and time and memory grow with the depth (at 1,000 steps 8 GiB do not suffice;
its default is 5,000). On a small case (N=150, J=20, width 16) the ratio is 200.

Growth, seconds as one of N = 345, 691, 1382, J = 38, 77, 154, width = 64, 128, 256 (P = 4,800, 17,800,
68,400) changes:

    Grad-Dot   .0021 .0027 .0041    .0018 .0025 .0037    .0014 .0025 .0053
    DataInf    .013  .040  .159     .028  .040  .049     .031  .039  .058
    CG         .032  .133  .766     .125  .132  .153     .128  .127  .161   an eigenproblem of size N, as
    LiSSA      .028  .127  .791     .145  .147  .154     .117  .124  .159   LiSSA's and
    exact      .026  .125  .675     .136  .122  .129     .111  .125  .153   exact's
    EK-FAC     .064  .073  .105     .038  .076  .179     .018  .080  .585   rotations of J gradients
    Arnoldi    .026  .035  .116     .034  .036  .042     .029  .035  .055
    LiSSA-H    .99   .95   1.59     .44   .93   2.4      .21   .91   4.2    a basis of 5 or 6 J vectors

On a classification (N=2000, J=50, MLP 64-512-512-10, P=301,000): Grad-Dot .04, DataInf .5, LiSSA 22 (its
kernel of size 18,000 is not decomposed), EK-FAC 4.4 and kronfluence's 24.6 (5.6 times, rank correlation .93).
dattri's DataInf and LiSSA pass 10 GiB there in training batches of 1,000 and test batches of 10 (a smaller
training batch solves for the test instances once more each; CG would then add up inverses of batches, another
method).

BERT-base (random weights, 32 tokens, J=4), peak GiB of the process at N = 32, 64, 128 (1.3 before it starts):
attention of the last layer, pooler and head (P=3.0M, memory_mb=256): Grad-Dot 1.95 2.21 2.22, DataInf 2.26
2.48 (128 not run), EK-FAC 2.21 2.43 2.45 (21, 38, 69 s); the last two layers (P=14.8M, memory_mb=1024):
Grad-Dot 4.22 4.69 4.71, DataInf 5.25 5.74, EK-FAC 4.83 at N=32 (117 s). Flat from 64 to 128 where both were
run; what is beyond memory_mb are the network's activations and copies of a block. Gradients that don't fit
are computed again, all N for each block of J: Grad-Dot with all 109M parameters and N=8 computes 20 gradients
in 13.5 s and 4.7 GiB (two to a block), or 12 in 14.4 s and 9.8 GiB (memory_mb=4096). It pays for few test
instances only: DataInf's N x N products took 196 gradients at N=32, 452 at 64. A cache folder computes each
once.

Where scores differ:
- CG, LiSSA and Arnoldi of dattri use the Hessian, ours (but lissa_h) Gauss-Newton. The Hessian's least
  eigenvalue is -1.95 at the default size. With a damping of 1 CG then solves an indefinite system in 10
  iterations (it agreed with ours only to .73); with 5, the damping here, 10 iterations of dattri's CG in
  float32 and in float64 agree with scipy's MINRES in float64 on double-backward products (residual 1e-9) to
  1.000, and with the Gauss-Newton solve (by its kernel, float64) to .997, as ours do. (Grad-Dot: .47.)
- LiSSA (.93): batches. lissa_h is within 8e-6 of MINRES. Our own steps on batches of 32 agree with it to
  .94, .95, .94, .91, .94 for five seeds, .88 to .91 with each other, and their mean .97, .974, .981, .985
  for two to five seeds. dattri's damping is ours divided by the scale: its step is g + (1 - damping) x - H
  x / scale.
- EK-FAC (.90): sampled targets. Ours with one sample for each instance agrees with our exact factors to .87
  to .88, with 10 samples .975, with 100 .996; two of our own samples agree to .80.
- dattri's Arnoldi gives nan: one pass of Gram-Schmidt in float32 leaves 100 vectors orthogonal to .7 only, so
  that three of its 99 eigenvalues are negative, although those of the Hessian with the damping are above 3;
  it counts them out of `proj_dim`, but keeps them and takes their square roots.

curvlinops 3.0.1, one thread, CPU seconds for all vectors, ours second, equal to 3e-7: MLP 8-128-128-1, 691
instances, 77 vectors: Hessian .28, .24 (.08 with sums over the instances); Gauss-Newton .23, .31 through the
network and .05 by rows. A conv net (two convolutions, P=3962), 256 instances, 16 vectors: .55, .45; .34, .31
and .016 by rows (.12 to make them, once). K-FAC's and EK-FAC's factors with one product (ours: one solve):
.03, .05 and .06, .05; conv net .13, .25 and .36, .40.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DAMPING = 5.0
"""Above minus the Hessian's least eigenvalue (-1.95 at the default size), without which CG and LiSSA with the
Hessian, as the peers have it, solve nothing: see above."""

SCALE = 50.0
"""Of LiSSA's series, as dattri's default."""

DEPTH = int(os.environ.get("DEPTH", 200))
"""Of LiSSA's series on both sides; dattri's default is 5000."""

PATIENCE = 120
"""CPU seconds that a peer gets."""

PAIRS = {
    "datainf": "dattri DataInf",
    "cg": "dattri CG (10 iterations)",
    "lissa": "dattri LiSSA",
    "lissa_h": "dattri LiSSA",
    "lissa_h32": "dattri LiSSA",
    "arnoldi": "dattri Arnoldi",
    "ekfac": "kronfluence EK-FAC",
    "graddot": "vmap Gram matrix",
}


def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each instance ``[n]``: squared error, or cross-entropy for class indices."""
    if targets.is_floating_point():
        return (outputs - targets).square().mean(1)
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def example(n: int, j: int, inputs: int, width: int, outputs: int = 1) -> dict[str, Any]:
    """Return a trained regression (one output) or classification with its data."""
    torch.manual_seed(0)
    x = torch.randn(n + j, inputs)
    if outputs == 1:
        y = (x @ torch.randn(inputs, 3)).sin().sum(1, keepdim=True) + 0.3 * torch.randn(n + j, 1)
    else:
        y = (x @ torch.randn(inputs, outputs) + 3 * torch.randn(n + j, outputs)).argmax(1)
    model = network(inputs, width, outputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(model(x[:n]), y[:n]).mean().backward()
        optimizer.step()
    sizes = {"inputs": inputs, "width": width, "outputs": outputs}
    return {"state": model.state_dict(), "x": x, "y": y, "n": n, "sizes": sizes}


def restored(data: dict[str, Any]) -> nn.Sequential:
    model = network(**data["sizes"])
    model.load_state_dict(data["state"])
    return model


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return CPU seconds, which other programs on the machine distort least, and the result."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found.detach()


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
    from fimo.models.losses import cross_entropy, mean_squared_error

    make: dict[str, Callable[[], Any]] = {
        "graddot": GradDot,
        "datainf": lambda: DataInf(DAMPING),
        "exact": lambda: ExactInfluence(DAMPING),
        "cg": lambda: ConjugateGradients(DAMPING),
        "lissa": lambda: Lissa(DAMPING, depth=DEPTH, scale=SCALE),
        "lissa_h": lambda: LissaHessian(DAMPING, depth=DEPTH, scale=SCALE),
        "lissa_h32": lambda: LissaHessian(DAMPING, depth=DEPTH, scale=SCALE, batch_size=32),
        "ekfac": Ekfac,
        "arnoldi": lambda: Arnoldi(100, 100, DAMPING),
        "trak": Trak,
    }
    loss = mean_squared_error if data["y"].is_floating_point() else cross_entropy
    final, n = FinalModel(restored(data), loss), data["n"]
    train, test = Instances(data["x"][:n], data["y"][:n]), Instances(data["x"][n:], data["y"][n:])
    runs = [timed(lambda: make[name]().attribute(final, train, test).values) for _ in range(repeats)]
    return min(t for t, _ in runs), runs[0][1]


def plain_gram(data: dict[str, Any]) -> tuple[float, Tensor]:
    """Return the time of a Gram matrix of gradients by vmap, all in memory."""
    model = restored(data)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, p, (x[None],)), y[None])[0]

    gradient = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> Tensor:
        found = gradient(parameters, data["x"], data["y"])
        rows = torch.cat([g.flatten(1) for g in found.values()], 1)
        return rows[data["n"] :] @ rows[: data["n"]].T

    return min((timed(run) for _ in range(2)), key=lambda pair: pair[0])


def peer(folder: Path, names: list[str]) -> None:
    """Run inside the peers' environment: write each peer's time and scores ``[J, N]``."""
    data = torch.load(folder / "data.pt", weights_only=False)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (10 * 2**30, 10 * 2**30))
    model, n = restored(data), data["n"]
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
        x, y = pair
        x, y = (x[None], y[None]) if x.dim() == 1 else (x, y)  # one instance, under vmap
        # (its LiSSA turns class indices into floats)
        y = y if model[-1].out_features == 1 else y.long()
        return loss_of(torch.func.functional_call(model, parameters, (x,)), y).mean()

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = {
        "dattri DataInf": lambda: IFAttributorDataInf(task, regularization=DAMPING),
        "dattri CG (10 iterations)": lambda: IFAttributorCG(task, max_iter=10, regularization=DAMPING),
        "dattri LiSSA": lambda: IFAttributorLiSSA(
            # x <- g + (1 - damping) x - H x / scaling: its damping is ours divided by the scale
            task,
            recursion_depth=DEPTH,
            batch_size=32,
            damping=DAMPING / SCALE,
            scaling=SCALE,
        ),
        "dattri Arnoldi": lambda: IFAttributorArnoldi(
            task, proj_dim=100, max_iter=100, regularization=DAMPING
        ),
    }[name]()
    size = sum(p.numel() for p in model.parameters())
    large = size * len(train) > 2**28  # its gradients of all instances at once take gigabytes

    def loader(dataset: Any, batch_size: int) -> Any:
        return torch.utils.data.DataLoader(dataset, batch_size=batch_size if large else len(dataset))

    # CG adds up the solutions of each batch of these: smaller batches would be another method
    attributor.cache(loader(train, 250 if name == "dattri DataInf" else len(train)))
    # the test side is solved again for each batch of the training side
    return attributor.attribute(loader(train, 1000), loader(test, 10)).T


def _kronfluence(name: str, model: nn.Module, train: Any, test: Any, folder: Path) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Supervised(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0])
            if not sample:
                return loss_of(outputs, batch[1]).sum()
            if outputs.shape[1] > 1:
                drawn = torch.multinomial(outputs.softmax(1), 1)[:, 0]
            else:  # the variance for which the Fisher is the Gauss-Newton matrix of the squared error
                drawn = (outputs + 0.5**0.5 * torch.randn_like(outputs)).detach()
            return loss_of(outputs, drawn).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return loss_of(model(batch[0]), batch[1]).sum()

    task = Supervised()
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


def compare(data: dict[str, Any], names: list[str], peers: str | None, patience: int) -> None:
    found: dict[str, tuple[float, Tensor]] = {}
    if sum(v.numel() for v in data["state"].values()) * len(data["x"]) < 2**28:  # else it takes gigabytes
        found["vmap Gram matrix"] = plain_gram(data)
    print(f"{'method':10} {'seconds':>9}  {'peer':28} {'seconds':>9} {'ratio':>8} {'rank corr.':>10}")
    tried: set[str] = set()
    for name in names:
        other = PAIRS.get(name, "")
        if peers and other and other not in found and other not in tried and other != "vmap Gram matrix":
            tried.add(other)
            with tempfile.TemporaryDirectory() as folder:
                torch.save(data, Path(folder) / "data.pt")
                command = [peers, __file__, "--peer", folder, "--only", other]
                limited = functools.partial(resource.setrlimit, resource.RLIMIT_CPU, (patience, patience))
                done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
                problem = f"failed: {done.stderr.strip().splitlines()[-1:]}"
                if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
                    problem = f"took more than {patience} seconds"
                path = Path(folder) / f"{other}.pt"
                if path.exists():
                    found[other] = torch.load(path, weights_only=True)
                else:
                    print(f"{other} {problem}", flush=True)
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
    parser.add_argument("--sizes", default="691,77,8,128,1", help="N,J,inputs,width,outputs")
    parser.add_argument("--patience", type=int, default=PATIENCE, help="CPU seconds that a peer gets")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer, [arguments.only])
        return
    torch.set_num_threads(1)
    names = arguments.only.split(",") if arguments.only else [*PAIRS, "exact", "trak"]
    if arguments.growth:
        growth(names)
        return
    keys = ("n", "j", "inputs", "width", "outputs")
    sizes = dict(zip(keys, map(int, arguments.sizes.split(",")), strict=True))
    print(f"{sizes}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    compare(example(**sizes), names, arguments.peers, arguments.patience)


if __name__ == "__main__":
    sys.exit(main())
