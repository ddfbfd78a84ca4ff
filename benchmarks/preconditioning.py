"""What EK-FAC as preconditioner saves LiSSA and conjugate gradients (ASTRA; Wang et al., 2025).

    python benchmarks/preconditioning.py --damping .1

prints for linear models and MLPs, trained by Adam on data that scikit-learn ships, the largest relative
residual |g - (G + damping) x| / |g| over 20 test instances after 10, 50 and 200 products with the
Gauss-Newton matrix G, without and with the preconditioner, and the products that conjugate gradients take to
1e-5.
Everything is in float64; the damping is a multiple of G's mean eigenvalue.
"""

from __future__ import annotations

import argparse
import logging

import torch

from fimo.curvature.gradients import InstanceGradients
from fimo.data.bundled import BundledData
from fimo.data.instances import Instances
from fimo.engine.protocol import Protocol
from fimo.further_training import full_runs
from fimo.linear_response.recursion import with_parameters
from fimo.methods.cg import ConjugateGradients
from fimo.methods.gradient import CurvatureMethod
from fimo.methods.lissa import Lissa
from fimo.models.final_model import FinalModel
from fimo.models.mlp import mlp

NETWORKS: list[tuple[str, tuple[int, ...]]] = [
    ("diabetes", ()), ("diabetes", (8,)), ("diabetes", (16, 16)), ("digits", ()), ("digits", (16,)),
]  # fmt: skip
TRAINING = Protocol("adam", lr=0.003, batch_size=32, epochs=30, dtype="float64")
TESTS, STEPS = 20, (10, 50, 200)


def trained(name: str, hidden: tuple[int, ...]) -> tuple[FinalModel, Instances, Instances]:
    module = BundledData(name=name)
    module.setup()
    train, test = (part.to(dtype=torch.float64) for part in (module.train, module.test))
    assert isinstance(train.inputs, torch.Tensor)
    outputs = int(train.targets.max()) + 1 if module.task == "classification" else 1
    torch.manual_seed(0)
    network = mlp(train.inputs.shape[1], outputs, hidden).double()
    loss = "cross_entropy" if module.task == "classification" else "mse"
    start = FinalModel(network, loss, accept_poor=True)
    run = next(iter(full_runs(start, train, TRAINING, [0])))
    return with_parameters(start, run.parameters[-1]), train, test[:TESTS]


def solved(
    method: CurvatureMethod, model: FinalModel, train: Instances, test: Instances
) -> tuple[float, int]:
    """Return the largest relative residual, and the steps taken."""
    curvature = method.fit(model, train)
    left, right = curvature.gradients.measurements(test), curvature.gradients.losses(train[:1])
    found = curvature.solve(left, right, method.dampings(curvature, None))
    return max(found.residuals), max(found.iterations)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--damping", type=float, default=0.1, help="as a multiple of the mean eigenvalue")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)  # that few steps have not converged
    for name, hidden in NETWORKS:
        model, train, test = trained(name, hidden)
        rows = InstanceGradients(model).gauss_newton(train)
        mean = float(rows.squared_norms().sum()) / len(train) / model.size
        print(f"{name} {'-'.join(map(str, hidden)) or 'linear'}: {model.size} parameters, {len(train)} rows")
        damping = chosen.damping * mean
        for kind in ("none", "ekfac"):
            lissa = [
                solved(Lissa(damping, depth=t, tolerance=1e-12, precondition=kind), model, train, test)[0]  # type: ignore[arg-type]
                for t in STEPS
            ]
            cg = [
                solved(ConjugateGradients(damping, "loss", 1e-12, t, kind), model, train, test)[0]  # type: ignore[arg-type]
                for t in STEPS
            ]
            steps = solved(ConjugateGradients(damping, "loss", 1e-5, 5000, kind), model, train, test)[1]  # type: ignore[arg-type]
            shown = [" ".join(f"{value:8.1e}" for value in values) for values in (lissa, cg)]
            print(f"  {kind:6} LiSSA {shown[0]}   CG {shown[1]}, {steps} to 1e-5")


if __name__ == "__main__":
    main()
